"""Sampled negatives.

Legend: M rows (predicted positions), N items, J training pairs of user and item.
"""

import torch
from torch import Tensor

from trainer.data.batches import TrainSet


def sample_unseen(
    train: TrainSet, users_M: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw one item for each row, uniformly from the items that the row's user has not seen.

    The draw is exact, without rejection: a rank among the user's unseen items is drawn, and a
    bisection of the user's seen items finds the item of that rank.

    Args:
        train: The training set.
        users_M: (M,) int64.
        generator: On the CPU.

    Returns:
        (M,) int64 items, and (M,) bool, false where the user has seen every item: then the item is
        not a negative.
    """
    items = len(train.counts_N)
    first_M = torch.searchsorted(train.keys_J, users_M * items)
    seen_M = torch.searchsorted(train.keys_J, (users_M + 1) * items) - first_M
    unseen_M = items - seen_M
    share_M = torch.rand(len(users_M), dtype=torch.float64, generator=generator)
    rank_M = (share_M.to(users_M.device) * unseen_M).long()
    # The j-th seen item has item_j - j unseen items before it. The seen items before the unseen
    # item of rank r are those with item_j - j <= r: the first `low` of them, found by bisection.
    low_M, high_M = torch.zeros_like(seen_M), seen_M
    while bool((low_M < high_M).any()):
        middle_M = (low_M + high_M) // 2
        at_M = (first_M + middle_M).clamp_max(len(train.keys_J) - 1)
        before_M = train.keys_J[at_M] - users_M * items - middle_M
        right_M = (low_M < high_M) & (before_M <= rank_M)
        high_M = torch.where(right_M | (low_M >= high_M), high_M, middle_M)
        low_M = torch.where(right_M, middle_M + 1, low_M)
    exists_M = unseen_M > 0
    return torch.where(exists_M, rank_M + low_M, 0), exists_M
