"""Rank held-out targets with a model, and build the reference models.

Legend: E evaluated users, N items.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from features.dataset import EvalSplit, Ints
from retrieval.approximate_indexes import IndexStore
from retrieval.list_metrics import LIST_LENGTH
from retrieval.ranking import Ranks
from trainer.data.batches import TrainingData
from trainer.evaluation.encode import targets_of
from trainer.evaluation.search import CatalogueSearch
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


def build_reference(name: str, data: TrainingData) -> Recommender:
    """Build a reference model and fit it on the training interactions."""
    recommender = MODELS.find(name).load()
    info = data.dataset.info
    catalogue = Catalogue(n_items=info.items, n_users=info.users, widths={})
    model = recommender(recommender.settings_class(), catalogue).to(data.device)
    model.fit_buffers(data.features, data.train)
    return model
