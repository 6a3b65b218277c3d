"""Sampled negatives, and the binary cross-entropy that MMSR trains with.

Legend: M rows (predicted positions), N items, D width, J training pairs of user and item.
"""

import torch
from torch import Tensor

from trainer.data.batches import TrainSet


def sample_unseen(
    train: TrainSet, users_M: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw one item for each row, uniform over those that the row's user has not in training.

    Exact, and never drawn twice: a rank among the user's unseen items is drawn, and the item of
    that rank found by bisection in the user's seen ones.

    Args:
        train: The training set.
        users_M: (M,) int64.
        generator: On the CPU; decides.

    Returns:
        (M,) int64 items, and (M,) bool: false where the user has every item, so that there is no
        negative and the item means nothing.
    """
    items = len(train.counts_N)
    first_M = torch.searchsorted(train.keys_J, users_M * items)
    seen_M = torch.searchsorted(train.keys_J, (users_M + 1) * items) - first_M
    unseen_M = items - seen_M
    share_M = torch.rand(len(users_M), dtype=torch.float64, generator=generator)
    rank_M = (share_M.to(users_M.device) * unseen_M).long()
    # The user's seen item number j has item_j - j unseen ones before it. Those that stand before
    # the unseen item of rank r are the j with item_j - j <= r: the first `low`, by bisection.
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
