"""The transition prior: counts of later items, added to the scores of a trained model.

score(item) / T + weight * log(1 + P(item) / eps), in units of the loss with the temperature T. P is
what the model ``transitions`` counts (:mod:`trainer.models.transitions`), without the transitions
of the user's own training history: the user's next item is not among these. A network that learns
with the prior memorises what the counts tell it, so the prior is added after the training. The
weight and eps are chosen on the validation targets; a weight of 0 is one of the choices.

Legend: E users, N items, P entries of the scores, X counted pairs of items.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from features.dataset import EvalSplit, Ints
from retrieval.metrics import per_user
from retrieval.ranking import Ranks, rank
from retrieval.seen_items import SeenItems
from retrieval.sparse_scores import SparseScores
from trainer.data.batches import TrainingData
from trainer.evaluation.encode import encode_catalogue, encode_histories, histories_of, targets_of
from trainer.models.base import Recommender
from trainer.models.transitions import (
    CountedTransitions,
    Floats,
    TransitionsConfig,
    count_pairs,
    sum_by_key,
)

WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)
"""Weights that are compared on validation."""
EPS = (0.01, 0.001, 0.003, 0.03, 0.1)
"""Values of eps that are compared on validation; the weights are compared with the first one."""
_ROUNDING = 1e-9  # largest error of a sum of shares
_USERS_AT_ONCE = 4096  # users whose scores are in memory while the prior is chosen


@dataclass(frozen=True, kw_only=True, slots=True)
class PriorChoice:
    """The weight and eps of a run's prior, and what they are worth on validation."""

    weight: float
    """Factor on the logarithm; 0: the run has no prior."""
    eps: float
    """Probability of a transition at which the logarithm is log 2."""
    monitor: str
    """The metric that chose them, with its split and ranking."""
    without: float
    """The metric of the model alone."""
    best: float
    """The metric with the prior. The prior was chosen by it, so it is a fitted figure."""

    @property
    def line(self) -> str:
        """Describe the choice in one line."""
        figures = f"{self.monitor} {self.without:.4f} without"
        if not self.weight:
            return f"transition prior: weight 0, because no other is better ({figures})"
        return (
            f"transition prior: weight {self.weight:g}, eps {self.eps:g}, chosen by {figures},"
            f" {self.best:.4f} with it"
        )


class TransitionPrior:
    """Scores of later items by counts of transitions; see the documentation of this module.

    Args:
        counts: The transitions of the training histories.
        training: The training histories, oldest item first. Row u is that of user u.
        weight: Factor on the logarithm.
        eps: Added probability.
        scale: Factor on inner products in the loss of the model, 1 / temperature.
    """

    def __init__(
        self,
        counts: CountedTransitions,
        training: SeenItems,
        *,
        weight: float,
        eps: float,
        scale: float,
    ) -> None:
        self._counts = counts
        self._training = training
        self.weight, self.eps, self.scale = weight, eps, scale

    @classmethod
    def of(
        cls, data: TrainingData, *, weight: float, eps: float, scale: float
    ) -> "TransitionPrior":
        """Count the transitions of the training histories of a dataset."""
        training, n_items = data.train.histories, data.dataset.info.items
        counts = CountedTransitions.of(training, n_items, TransitionsConfig())
        return cls(counts, training, weight=weight, eps=eps, scale=scale)

    def scores(self, histories: SeenItems, users_E: Ints) -> SparseScores:
        """Return weight * log(1 + P / eps) / scale: scores in units of the inner product.

        Args:
            histories: The whole histories of E users, oldest item first.
            users_E: (E,) the users, whose own training transitions do not count; -1 for a user
                without a training history.
        """
        return self.scaled(self.probabilities(histories, users_E), self.weight, self.eps)

    def scaled(self, probabilities: SparseScores, weight: float, eps: float) -> SparseScores:
        """Return the scores of P for a weight and eps."""
        values = weight / self.scale * np.log1p(probabilities.values / eps)
        return replace(probabilities, values=values)

    def probabilities(self, histories: SeenItems, users_E: Ints) -> SparseScores:
        """Return P (E, N): the sum over the last items of a history of their later items' shares.

        The share of a later item is its count in the row of the earlier item, divided by the sum of
        the row + the smoothing. The newest item of a history has weight 1, the one before it 1/2,
        and so on.
        """
        counts, n_items = self._counts, self._counts.n_items
        key_Q, weight_Q = counts.newest(histories)
        own_key_X, own_X, place_X = self._own_pairs(users_E, key_Q)
        total_Q = counts.totals_N[key_Q % n_items] - np.bincount(place_X, own_X, len(key_Q))
        factor_Q = weight_Q * counts.shares(total_Q)
        key_P, value_P = counts.expand(key_Q, factor_Q)
        own_key_P = key_Q[place_X] // n_items * n_items + own_key_X % n_items
        key_P, value_P = sum_by_key(
            np.concatenate([key_P, own_key_P]),
            np.concatenate([value_P, -factor_Q[place_X] * own_X]),
        )
        is_left_P = value_P > _ROUNDING  # no other user has counted the rest
        return SparseScores.of_keys(key_P[is_left_P], value_P[is_left_P], len(histories), n_items)

    def _own_pairs(self, users_E: Ints, key_Q: Ints) -> tuple[Ints, Floats, Ints]:
        """Return the pairs of the users' own training histories whose earlier item is read.

        Returns:
            (X,) keys (row of ``users_E`` * N + earlier item) * N + later item, (X,) sums of
            1 / distance, and (X,) the places of the earlier items in ``key_Q``.
        """
        row_E = np.flatnonzero(users_E >= 0)
        own = self._training.take(users_E[row_E])
        n_items, window = self._counts.n_items, self._counts.settings.window
        key_X, value_X = count_pairs(own, row_E, n_items, window)
        place_X = np.searchsorted(key_Q, key_X // n_items)
        is_read_X = place_X < len(key_Q)
        is_read_X[is_read_X] = key_Q[place_X[is_read_X]] == key_X[is_read_X] // n_items
        return key_X[is_read_X], value_X[is_read_X], place_X[is_read_X]


def choose_prior(
    model: Recommender,
    data: TrainingData,
    users: EvalSplit,
    *,
    metric: str,
    seen: str,
    batch_size: int,
) -> PriorChoice:
    """Choose the weight and eps that rank the validation targets best.

    First the weights are compared with one eps, then the values of eps with the best weight.

    Args:
        model: The trained model, with vectors. Its own prior is not read.
        data: Data with the histories.
        users: The validation users, or a sample of them.
        metric: Name of the metric, such as ``NDCG@10``.
        seen: ``filtered`` or ``kept``, the ranking of the metric.
        batch_size: Histories encoded together.
    """
    prior = TransitionPrior.of(data, weight=0.0, eps=EPS[0], scale=model.settings.scale)
    items_ND = encode_catalogue(model, data)
    queries_ED = encode_histories(model, data, items_ND, users, batch_size)
    targets_E, histories = targets_of(data.dataset, users), histories_of(data.dataset, users)

    def measure(candidates: list[tuple[float, float]]) -> dict[tuple[float, float], float]:
        parts: dict[tuple[float, float], list[Ranks]] = {pair: [] for pair in candidates}
        for rows in _blocks(len(targets_E)):
            history = histories.take(np.arange(rows.start, rows.stop))
            own = model.correction(history)
            probabilities = prior.probabilities(history, users.users[rows])
            for weight, eps in candidates:
                added = prior.scaled(probabilities, weight, eps)
                parts[weight, eps].append(
                    rank(
                        queries_ED[rows],
                        items_ND,
                        targets_E[rows],
                        history,
                        correction=added if own is None else own + added,
                    )
                )
        return {
            pair: float(per_user(getattr(Ranks.concatenate(ranks), seen))[metric].mean())
            for pair, ranks in parts.items()
        }

    values = measure([(weight, EPS[0]) for weight in WEIGHTS])
    weight = max(values, key=lambda pair: values[pair])[0]
    if weight:
        values |= measure([(weight, eps) for eps in EPS[1:]])
    best = max(values, key=lambda pair: values[pair])
    return PriorChoice(
        weight=best[0],
        eps=best[1],
        monitor=f"{metric} on validation, {seen}",
        without=values[0.0, EPS[0]],
        best=values[best],
    )


def _blocks(users: int) -> Iterator[slice]:
    for start in range(0, users, _USERS_AT_ONCE):
        yield slice(start, min(start + _USERS_AT_ONCE, users))
