"""Rank held-out targets with a model, and build the reference models.

Several processes share the users: each process ranks for some of them (:func:`share_of_users`), and
the ranks are joined (:func:`join_shares`). The joined ranks are those of a single process, bit for
bit, if the processes have the same number of threads and equal machines.

Legend: E evaluated users, N items.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from features.dataset import EvalSplit, Ints
from retrieval.approximate_indexes import IndexStore
from retrieval.list_metrics import LIST_LENGTH
from retrieval.ranking import Ranks
from trainer.data.batches import Shard, TrainingData
from trainer.evaluation.encode import targets_of
from trainer.evaluation.search import SCORED_TOGETHER, CatalogueSearch
from trainer.evaluation.search_facts import SearchFacts
from trainer.models.base import Catalogue, Recommender
from trainer.models.registry import MODELS


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitRanks:
    """The ranks of the targets of one split."""

    users: EvalSplit
    """The evaluated users."""
    targets_E: Ints
    """(E,) held-out item of each user."""
    ranks: Ranks
    """Ranks of the targets, seen items filtered and kept."""
    recommended: Mapping[str, Ints] = field(default_factory=dict)
    """``filtered`` and ``kept`` -> (N,) number of lists of 10 items that recommend each item;
    empty if the lists were not counted."""
    facts: SearchFacts | None = None
    """The way in which the index searched; ``None`` if the lists were not counted."""


def rank_split(
    model: Recommender,
    data: TrainingData,
    split: str,
    batch_size: int,
    *,
    index: str = "torch",
    users: EvalSplit | None = None,
    count_lists: bool = False,
    store: IndexStore | None = None,
) -> SplitRanks:
    """Rank the target of every evaluated user in the full catalogue.

    Args:
        model: The recommender. Its mode is restored.
        data: Data with the histories.
        split: ``validation`` or ``test``.
        batch_size: Histories encoded together.
        index: Kind and parameters; all exact indexes give the same ranks.
        users: A sample of the users of the split; all of them by default.
        count_lists: Count the recommended items as well, and tell how the index searched.
        store: Where trained approximate indexes are read and saved.

    Raises:
        UserError: A vector is not finite.
    """
    if users is None:
        users = data.dataset.eval_split(split)
    targets_E = targets_of(data.dataset, users)
    search = CatalogueSearch(model, data, index=index, batch_size=batch_size, store=store)
    if not count_lists:
        ranks = search.rank(users, targets_E)
        return SplitRanks(users=users, targets_E=targets_E, ranks=ranks)
    ranks, recommended = search.rank_and_count(users, targets_E)
    return SplitRanks(
        users=users,
        targets_E=targets_E,
        ranks=ranks,
        recommended=recommended,
        facts=search.facts(LIST_LENGTH),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class RankShare:
    """The users that a process ranks for."""

    rows: Ints
    """Rows of these users among all evaluated users."""
    ranked: SplitRanks | None
    """Their ranks; ``None`` without users."""

    @classmethod
    def of(
        cls, users: EvalSplit, rows: Ints, rank: Callable[[EvalSplit], SplitRanks]
    ) -> "RankShare":
        """Rank for some of the users; nothing is computed if there are none of them.

        Args:
            users: All evaluated users.
            rows: Rows of the users of this process.
            rank: Returns the ranks of some users.
        """
        return cls(rows=rows, ranked=rank(users.take(rows)) if len(rows) else None)


def share_of_users(model: Recommender, users: EvalSplit, batch_size: int, shard: Shard) -> Ints:
    """Return the rows of the users that a process ranks for, ascending.

    A process takes every W-th batch that :meth:`trainer.data.batches.TrainingData.histories` makes
    for all users. Results can depend in the last digit on the other rows of a batch, so batches
    are never divided. The batches of a model without vectors are consecutive users.

    Args:
        model: The recommender.
        users: All evaluated users.
        batch_size: Histories encoded together.
        shard: The process, of W.
    """
    order_E = np.arange(len(users.users))
    if model.has_vectors:
        lengths_E = np.minimum(users.targets - users.starts, model.history)
        order_E = np.argsort(lengths_E, kind="stable")
    else:
        batch_size = SCORED_TOGETHER
    batch_E = np.arange(len(order_E)) // batch_size
    return np.sort(order_E[batch_E % shard.world_size == shard.process_rank])


def join_shares(users: EvalSplit, targets_E: Ints, shares: Sequence[RankShare]) -> SplitRanks:
    """Return the ranks of all users.

    Args:
        users: All evaluated users.
        targets_E: (E,) held-out item of each user.
        shares: The shares of all processes.
    """
    ranks = Ranks(kept=np.zeros_like(targets_E), filtered=np.zeros_like(targets_E))
    recommended: dict[str, Ints] = {}
    parts = [(share.rows, share.ranked) for share in shares if share.ranked is not None]
    for rows, part in parts:
        ranks.kept[rows], ranks.filtered[rows] = part.ranks.kept, part.ranks.filtered
        for seen, lists_N in part.recommended.items():
            recommended[seen] = recommended.get(seen, 0) + lists_N
    return SplitRanks(
        users=users,
        targets_E=targets_E,
        ranks=ranks,
        recommended=recommended,
        facts=parts[0][1].facts if parts else None,
    )


def build_reference(name: str, data: TrainingData) -> Recommender:
    """Build a reference model and fit it on the training interactions."""
    recommender = MODELS.find(name).load()
    info = data.dataset.info
    catalogue = Catalogue(n_items=info.items, n_users=info.users, widths={})
    model = recommender(recommender.settings_class(), catalogue).to(data.device)
    model.fit_buffers(data.features, data.train)
    return model
