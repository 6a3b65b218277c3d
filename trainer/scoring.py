"""From a recommender to the ranks of held-out targets, under the one protocol.

Legend: N items, D width, E evaluated users.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from features.dataset import Dataset, Held, Ints
from features.errors import UserError
from retrieval.ranking import Ranks, Seen, rank_static
from trainer.data import TrainingData
from trainer.recommender import Recommender


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """Both towers' vectors for one split, ready to be ranked."""

    held: Held
    queries_ED: Tensor
    items_ND: Tensor


@torch.no_grad()
def encode(model: Recommender, data: TrainingData, split: str, batch_size: int) -> Encoded:
    """Encode the catalogue once and the input of every evaluated user of a split.

    The model is put into evaluation mode and left as it was.

    Raises:
        UserError: A vector is not finite.
    """
    held = data.dataset.held(split)
    was_training = model.training
    model.eval()
    items_ND = model.encode_items(data.features).detach().float()  # may be the weights themselves
    queries_ED = torch.empty((len(held.users), items_ND.shape[1]), device=items_ND.device)
    for rows, sequences in data.histories(held, length=model.history, batch_size=batch_size):
        queries_BD = model.encode_sequences(items_ND, sequences, data.features)
        queries_ED[torch.from_numpy(rows).to(items_ND.device)] = queries_BD.float()
    model.train(was_training)
    if not (items_ND.isfinite().all() and queries_ED.isfinite().all()):
        raise UserError(
            f"the vectors for {split} are not finite: the training diverged;"
            " train again with a lower lr"
        )
    return Encoded(held=held, queries_ED=queries_ED, items_ND=items_ND)


def targets_of(dataset: Dataset, held: Held) -> Ints:
    """(E,) the held-out item of each evaluated user."""
    return dataset.items[held.targets].astype(np.int64)


def seen_by(dataset: Dataset, held: Held) -> Seen:
    """Everything each evaluated user had before the target, the whole history."""
    counts = held.targets - held.starts
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    index = np.repeat(held.starts - offsets[:-1], counts) + np.arange(offsets[-1])
    return Seen(items=dataset.items[index].astype(np.int64), offsets=offsets)


def popularity_ranks(dataset: Dataset, held: Held) -> Ranks:
    """The reference: the same ranking for everyone, by training interactions only."""
    return rank_static(
        dataset.train_counts.astype(np.float64),
        targets_of(dataset, held),
        seen_by(dataset, held),
    )
