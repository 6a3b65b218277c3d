"""Encode the catalogue and the histories of users with a recommender.

Legend: N items, D width, E evaluated users, B users of a batch.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from features.dataset import Dataset, EvalSplit, Ints
from features.errors import UserError
from retrieval.seen_items import SeenItems
from trainer.data.batches import TrainingData
from trainer.models.base import Recommender
from trainer.modules.training_mode import dropout_disabled

_ROWS_PER_CHECK = 2**16  # vectors that are checked together, because the check copies them


@contextmanager
def evaluation_mode(model: Recommender) -> Iterator[None]:
    """Set evaluation mode without gradients, and restore the mode at the end of the block."""
    with dropout_disabled(model), torch.no_grad():
        yield


def encode_catalogue(model: Recommender, data: TrainingData) -> Tensor:
    """Encode every item in evaluation mode: (N, D) float32.

    Raises:
        UserError: A vector is not finite.
    """
    with evaluation_mode(model):
        # Detached, because the result can be a parameter of the model.
        items_ND = model.encode_items(data.features).detach().float()
    return _check_finite(items_ND, "items")


def encode_histories(
    model: Recommender, data: TrainingData, items_ND: Tensor, users: EvalSplit, batch_size: int
) -> Tensor:
    """Encode histories into queries in evaluation mode: (E, D) float32.

    Args:
        model: The recommender.
        data: Data with the histories.
        items_ND: The result of :func:`encode_catalogue`.
        users: The users, and the end of each history. The target is never read.
        batch_size: Histories encoded together.

    Raises:
        UserError: A vector is not finite.
    """
    queries_ED = torch.empty((len(users.users), items_ND.shape[1]), device=items_ND.device)
    with evaluation_mode(model):
        for rows, sequences in data.histories(users, length=model.history, batch_size=batch_size):
            queries_BD = model.encode_sequences(items_ND, sequences, data.features)
            queries_ED[torch.from_numpy(rows).to(items_ND.device)] = queries_BD.float()
    return _check_finite(queries_ED, "histories")


def _check_finite(vectors: Tensor, kind: str) -> Tensor:
    if not all(bool(block.isfinite().all()) for block in vectors.split(_ROWS_PER_CHECK)):
        raise UserError(
            f"the vectors of {kind} are not finite: the training diverged;"
            " train again with a lower lr"
        )
    return vectors


def targets_of(dataset: Dataset, users: EvalSplit) -> Ints:
    """Return the held-out item of each evaluated user: (E,)."""
    return dataset.items[users.targets].astype(np.int64)


def repeated_share(dataset: Dataset, split: str) -> float:
    """Return the share of the targets of a split that the user already had, 0 without targets."""
    users = dataset.eval_split(split)
    if not len(users.users):
        return 0.0
    return float(histories_of(dataset, users).contain(targets_of(dataset, users)).mean())


def histories_of(dataset: Dataset, users: EvalSplit) -> SeenItems:
    """Return the items of each evaluated user before the target, oldest first."""
    counts = users.targets - users.starts
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    index = np.repeat(users.starts - offsets[:-1], counts) + np.arange(offsets[-1])
    return SeenItems(items=dataset.items[index].astype(np.int64), offsets=offsets)
