"""The prior: scores that are added to those of a trained model, and chosen on validation.

score(item) / T + weight * log(1 + P(item) / eps) + bias * [item is in the history], in units of the
loss with the temperature T. P is what the model ``transitions`` counts
(:mod:`trainer.models.transitions`), without the transitions of the user's own training history: the
user's next item is not among these. A network that learns with the counts memorises what they tell
it, so they are added after the training. The bias is for the ranking that keeps seen items. Where
users do not repeat items, it makes that ranking equal to the filtered one. A weight and a bias of 0
are among the choices.

Legend: E users, N items, P entries of the scores, Q items that the counts are read for, X counted
pairs of items.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

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
BIASES = (0.0, -1.0, -2.0, -4.0, -8.0, -16.0)
"""Biases on the items of the history that are compared on validation, seen items kept."""
_ROUNDING = 1e-9  # largest error of a sum of shares
_USERS_AT_ONCE = 512  # users whose transitions are in memory while the prior is chosen


@dataclass(frozen=True, kw_only=True, slots=True)
class PriorChoice:
    """The prior of a run, and what it is worth on validation."""

    weight: float
    """Factor on the logarithm of the transitions; 0: they are not added."""
    eps: float
    """Probability of a transition at which the logarithm is log 2."""
    bias: float
    """Added to the items of the history."""
    monitor: str
    """The metric that chose the weight and eps, with its split and ranking. The bias was chosen by
    the same metric with seen items kept."""
    without: float
    """The metric of the model alone."""
    best: float
    """The metric with the prior, a fitted figure: the prior was chosen by it."""

    @property
    def line(self) -> str:
        """Describe the choice in one line."""
        counts = f"weight {self.weight:g}, eps {self.eps:g}" if self.weight else "weight 0"
        return (
            f"prior: bias {self.bias:g} on seen items, {counts} of transitions;"
            f" {self.monitor}: {self.without:.4f} without, {self.best:.4f} with it"
        )


class TransitionPrior:
    """Scores by counts of transitions and repeats; see the documentation of this module.

    Args:
        counts: The transitions of the training histories.
        training: The training histories, oldest item first. Row u is that of user u.
        weight: Factor on the logarithm.
        eps: Added probability.
        bias: Added to the items of the history.
        scale: Factor on inner products in the loss of the model, 1 / temperature.
    """

    def __init__(
        self,
        counts: CountedTransitions,
        training: SeenItems,
        *,
        weight: float,
        eps: float,
        bias: float,
        scale: float,
    ) -> None:
        self._counts = counts
        self._training = training
        self.weight, self.eps, self.bias, self.scale = weight, eps, bias, scale

    @classmethod
    def of(
        cls, data: TrainingData, *, weight: float, eps: float, bias: float, scale: float
    ) -> "TransitionPrior":
        """Count the transitions of the training histories of a dataset, unless the weight is 0."""
        training, n_items = data.train.histories, data.dataset.info.items
        counted = training if weight else SeenItems.empty()
        counts = CountedTransitions.of(counted, n_items, TransitionsConfig())
        return cls(counts, training, weight=weight, eps=eps, bias=bias, scale=scale)

    def scores(self, histories: SeenItems, users_E: Ints) -> SparseScores:
        """Return (weight * log(1 + P / eps) + bias of seen items) / scale: in inner products.

        Args:
            histories: The whole histories of E users, oldest item first.
            users_E: (E,) the users, whose own training transitions do not count; -1 for a user
                without a training history.
        """
        if self.bias:
            scores = SparseScores.of_seen(histories, self.bias / self.scale)
        else:
            scores = SparseScores.empty(len(histories))
        if not self.weight:
            return scores
        return scores + self.scaled(self.probabilities(histories, users_E), self.weight, self.eps)

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


class _PriorValues(NamedTuple):
    """One combination of the values of a prior, to be compared with others."""

    weight: float
    eps: float
    bias: float

    def scores(
        self, prior: TransitionPrior, history: SeenItems, probabilities: SparseScores
    ) -> SparseScores:
        """Return the scores of a prior with these values."""
        added = SparseScores.of_seen(history, self.bias / prior.scale)
        if self.weight:
            added = added + prior.scaled(probabilities, self.weight, self.eps)
        return added


def choose_prior(
    model: Recommender,
    data: TrainingData,
    users: EvalSplit,
    *,
    with_transitions: bool,
    metric: str,
    seen: str,
    batch_size: int,
) -> PriorChoice:
    """Choose the prior that ranks the validation targets best.

    First the biases are compared with seen items kept, then the weights with one eps, then the
    values of eps with the best weight.

    Args:
        model: The trained model, with vectors. Its own prior is not read.
        data: Data with the histories.
        users: The validation users, or a sample of them.
        with_transitions: If false, the weight is 0.
        metric: Name of the metric, such as ``NDCG@10``.
        seen: ``filtered`` or ``kept``, the ranking by which weight and eps are chosen.
        batch_size: Histories encoded together.
    """
    scale, counted = model.settings.scale, float(with_transitions)
    prior = TransitionPrior.of(data, weight=counted, eps=EPS[0], bias=0.0, scale=scale)
    items_ND = encode_catalogue(model, data)
    queries_ED = encode_histories(model, data, items_ND, users, batch_size)
    targets_E = targets_of(data.dataset, users)

    def measure(choices: Sequence[_PriorValues], ranking: str) -> dict[_PriorValues, float]:
        """Return the metric of one ranking for each choice."""
        ranks: dict[_PriorValues, list[Ranks]] = {choice: [] for choice in choices}
        counts = prior if any(choice.weight for choice in choices) else None
        for rows, history, own, probabilities in _blocks(data, users, model, counts):
            given = queries_ED[rows], items_ND, targets_E[rows], history
            for choice, blocks in ranks.items():
                added = choice.scores(prior, history, probabilities)
                blocks.append(rank(*given, correction=added if own is None else added + own))
        joined = {choice: Ranks.concatenate(blocks) for choice, blocks in ranks.items()}
        values = {choice: per_user(getattr(r, ranking))[metric] for choice, r in joined.items()}
        return {choice: float(of_users.mean()) for choice, of_users in values.items()}

    plain = _PriorValues(0.0, EPS[0], 0.0)
    biases = measure([plain._replace(bias=bias) for bias in BIASES], "kept")
    first = max(biases, key=lambda choice: biases[choice])
    weights = WEIGHTS if with_transitions else (0.0,)
    values = measure([*(first._replace(weight=weight) for weight in weights), plain], seen)
    best = max(values, key=lambda choice: values[choice])
    if best.weight:
        values |= measure([best._replace(eps=eps) for eps in EPS[1:]], seen)
        best = max(values, key=lambda choice: values[choice])
    return PriorChoice(
        weight=best.weight,
        eps=best.eps,
        bias=best.bias,
        monitor=f"{metric} on validation, {seen}",
        without=values[plain],
        best=values[best],
    )


def _blocks(
    data: TrainingData, users: EvalSplit, model: Recommender, prior: TransitionPrior | None
) -> Iterator[tuple[slice, SeenItems, SparseScores | None, SparseScores]]:
    """Yield rows of users, their histories, the scores that the model adds itself, and P.

    P has no entries without a prior.
    """
    for start in range(0, len(users.users), _USERS_AT_ONCE):
        rows = slice(start, min(start + _USERS_AT_ONCE, len(users.users)))
        history = histories_of(data.dataset, users.take(rows))
        probabilities = SparseScores.empty(len(history))
        if prior is not None:
            probabilities = prior.probabilities(history, users.users[rows])
        yield rows, history, model.correction(history), probabilities
