"""From a recommender to the ranks of held-out targets, under the one protocol.

Legend: N items, D width, E evaluated users.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from features.dataset import Dataset, EvalSplit, Ints
from features.errors import UserError
from retrieval.ranking import Ranks, rank_static
from retrieval.seen_items import SeenItems
from trainer.data.batches import TrainingData
from trainer.models.base import Recommender


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """Both towers' vectors for one split, ready to be ranked."""

    held: EvalSplit
    queries_ED: Tensor
    items_ND: Tensor


def encode(model: Recommender, data: TrainingData, split: str, batch_size: int) -> Encoded:
    """Encode the catalogue once and the input of every evaluated user of a split.

    The model is put into evaluation mode and left as it was.

    Raises:
        UserError: A vector is not finite.
    """
    held = data.dataset.held(split)
    items_ND = encode_catalogue(model, data)
    queries_ED = encode_histories(model, data, items_ND, held, batch_size)
    return Encoded(held=held, queries_ED=queries_ED, items_ND=items_ND)


@torch.no_grad()
def encode_catalogue(model: Recommender, data: TrainingData) -> Tensor:
    """Encode every item: (N, D) float32, by the model in evaluation mode.

    Raises:
        UserError: A vector is not finite.
    """
    was_training = model.training
    model.eval()
    items_ND = model.encode_items(data.features).detach().float()  # may be the weights themselves
    model.train(was_training)
    return _finite(items_ND, "items")


@torch.no_grad()
def encode_histories(
    model: Recommender, data: TrainingData, items_ND: Tensor, held: EvalSplit, batch_size: int
) -> Tensor:
    """Encode histories into queries: (E, D) float32, by the model in evaluation mode.

    Args:
        model: The recommender.
        data: Holds the histories.
        items_ND: What :func:`encode_catalogue` gave.
        held: Whose, and up to where; the target itself is never read, and need not be there.
        batch_size: Histories encoded together.

    Raises:
        UserError: A vector is not finite.
    """
    was_training = model.training
    model.eval()
    queries_ED = torch.empty((len(held.users), items_ND.shape[1]), device=items_ND.device)
    for rows, sequences in data.histories(held, length=model.history, batch_size=batch_size):
        queries_BD = model.encode_sequences(items_ND, sequences, data.features)
        queries_ED[torch.from_numpy(rows).to(items_ND.device)] = queries_BD.float()
    model.train(was_training)
    return _finite(queries_ED, "histories")


def _finite(vectors: Tensor, what: str) -> Tensor:
    if not vectors.isfinite().all():
        raise UserError(
            f"the vectors of {what} are not finite: the training diverged;"
            " train again with a lower lr"
        )
    return vectors


def targets_of(dataset: Dataset, held: EvalSplit) -> Ints:
    """(E,) the held-out item of each evaluated user."""
    return dataset.items[held.targets].astype(np.int64)


def seen_by(dataset: Dataset, held: EvalSplit) -> SeenItems:
    """Everything each evaluated user had before the target, the whole history."""
    counts = held.targets - held.starts
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    index = np.repeat(held.starts - offsets[:-1], counts) + np.arange(offsets[-1])
    return SeenItems(items=dataset.items[index].astype(np.int64), offsets=offsets)


def popularity_ranks(dataset: Dataset, held: EvalSplit) -> Ranks:
    """The reference: the same ranking for everyone, by training interactions only."""
    return rank_static(
        dataset.train_counts.astype(np.float64),
        targets_of(dataset, held),
        seen_by(dataset, held),
    )
