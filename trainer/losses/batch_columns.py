"""The items of a batch and drawn items, as the columns of scores of a loss.

Legend: B batch, L sequence length, C columns, K encoded items, X drawn items, J items of a user,
D width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.data.batches import Batch
from trainer.data.device_copy import to_device
from trainer.data.negative_sampling import ItemSampler
from trainer.distributed import gather_ids, gather_rows, rank_offset
from trainer.losses.base import DrawnItems, ItemVectors, Loss, LossSettings, Targets


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchColumns:
    """The distinct items of the batches of all processes and drawn items, as columns of scores."""

    key_CD: Tensor
    """(C, D) item vectors."""
    item_C: Tensor
    """(C,) int64 item ids."""
    count_C: Tensor
    """(C,) int64, the number of times that the item occurs in its batch and is drawn for it."""
    own_K: Tensor
    """(K,) int64 ascending, the items of the columns of this process."""
    begin: int
    """First column of this process."""

    def of(self, item_M: Tensor) -> Tensor:
        """Return the column of each item of this process's batch: (M,) int64."""
        return self.begin + torch.searchsorted(self.own_K, item_M)


def batch_columns(
    items: ItemVectors, batch: Batch, drawn: DrawnItems | None = None
) -> BatchColumns:
    """Return the items of the batch and drawn items as columns.

    Args:
        items: Vectors that include all items of the batch and the drawn items.
        batch: The batch.
        drawn: The drawn items, if any.
    """
    item_K = items.ids_K
    if item_K is None:
        item_K = batch.distinct_items(None if drawn is None else drawn.on_host.items_X)
    counts_K = count_items(item_K, batch)
    if drawn is not None:
        row_X = torch.searchsorted(item_K, drawn.items_X)
        counts_K = counts_K.scatter_add(0, row_X, torch.ones_like(row_X))
    return BatchColumns(
        key_CD=gather_rows(items.gather(item_K)),
        item_C=gather_ids(item_K),
        count_C=gather_ids(counts_K),
        own_K=item_K,
        begin=rank_offset(len(item_K)),
    )


def count_items(item_K: Tensor, batch: Batch) -> Tensor:
    """Return the number of times that each item occurs in a batch: (K,) int64.

    Args:
        item_K: (K,) int64, ascending; it includes all items of the batch.
        batch: The batch.
    """
    windows = batch.sequences
    # Padding, whose value can be any, counts as 0.
    row_BL = torch.searchsorted(item_K, windows.items_BL).clamp_max(len(item_K) - 1)
    zero_K = torch.zeros_like(item_K)
    return zero_K.scatter_add_(0, row_BL.flatten(), windows.mask_BL.flatten().to(item_K.dtype))


def own_items(batch: Batch, exclude: str = "history") -> Tensor:
    """Return the items of each row's user, as ``ExcludedLabels.own_UJ`` takes them.

    Args:
        batch: The batch.
        exclude: ``history``: the training items of the user, ascending; ``window``: the items of
            the row, in the order of the row.

    Returns:
        (B, J) int64, padded with -1.
    """
    if exclude == "window":
        return torch.where(batch.sequences.mask_BL, batch.sequences.items_BL, -1)
    keys_J, items = batch.train.on_host.keys_J, len(batch.train.counts_N)
    users_B = batch.users_on_host
    starts_B = torch.searchsorted(keys_J, users_B * items)
    lengths_B = torch.searchsorted(keys_J, (users_B + 1) * items) - starts_B
    columns = torch.arange(max(1, int(lengths_B.max())))
    at_BJ = (starts_B[:, None] + columns).clamp_max(len(keys_J) - 1)
    own_BJ = torch.where(columns < lengths_B[:, None], keys_J[at_BJ] % items, -1)
    return to_device(own_BJ, batch.device)


class BatchLoss(Loss):
    """Base class of losses over the items of the batch and ``negatives`` drawn items.

    The items of the user are no negatives: its training items, or those of the row
    (``exclude=window``). The items of all processes' batches are the candidates. An item counts as
    often as it occurs in the batch and among the drawn items.
    """

    reads = frozenset({"negatives", "negatives_power"})

    def __init__(self, settings: LossSettings) -> None:
        super().__init__(settings)
        self.sampler = ItemSampler(settings.negatives_power)

    def draw(self, targets: Targets, batch: Batch) -> DrawnItems | None:
        """Draw ``negatives`` items, with repetition; ``None`` if it is 0."""
        if not self.settings.negatives:
            return None
        items_X = self.sampler.draw(batch.train, self.settings.negatives, batch.generator)
        return DrawnItems(items_X=items_X).to(batch.device)
