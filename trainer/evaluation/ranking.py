"""From a recommender to the ranks of held-out targets, under the one protocol.

Legend: N items, D width, E evaluated users.
"""

from dataclasses import dataclass

from features.dataset import EvalSplit, Ints
from retrieval.index_ranking import rank_with
from retrieval.ranking import Ranks
from trainer.data.batches import TrainingData
from trainer.evaluation.encode import (
    encode_catalogue,
    encode_histories,
    histories_of,
    targets_of,
)
from trainer.models.base import Catalogue, Recommender
from trainer.models.registry import MODELS

REFERENCES = ("popularity",)
"""Models that are evaluated beside the model in every table; they need no training."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitRanks:
    """The ranks of the targets of one split."""

    users: EvalSplit
    targets_E: Ints
    ranks: Ranks


def rank_split(
    model: Recommender,
    data: TrainingData,
    split: str,
    batch_size: int,
    *,
    index: str = "torch",
) -> SplitRanks:
    """Rank the target of every evaluated user in the full catalogue.

    Args:
        model: The recommender; it is left as it was.
        data: Data with the histories.
        split: ``validation`` or ``test``.
        batch_size: Histories encoded together.
        index: Name in :data:`retrieval.indexes.INDEXES`; all give the same ranks.

    Raises:
        UserError: A vector is not finite.
    """
    users = data.dataset.eval_split(split)
    targets_E, histories = targets_of(data.dataset, users), histories_of(data.dataset, users)
    items_ND = encode_catalogue(model, data)
    if model.has_vectors:
        queries_ED = encode_histories(model, data, items_ND, users, batch_size)
        correction = model.correction(histories)
        ranks = rank_with(index, queries_ED, items_ND, targets_E, histories, correction)
    else:
        raise NotImplementedError
    return SplitRanks(users=users, targets_E=targets_E, ranks=ranks)


def build_reference(name: str, data: TrainingData) -> Recommender:
    """Build a reference model and fit it on the training interactions."""
    recommender = MODELS.find(name).load()
    catalogue = Catalogue(n_items=data.dataset.info.items, widths={})
    model = recommender(recommender.settings_class(), catalogue).to(data.device)
    model.fit_buffers(data.features, data.train)
    return model
