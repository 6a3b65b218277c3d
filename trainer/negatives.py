"""Sampled negatives, and the binary cross-entropy that MMSR trains with.

Legend: M rows (predicted positions), N items, D width, J training pairs of user and item.
"""

import torch
from torch import Tensor
from torch.nn import functional

from trainer.data import TrainSet
from trainer.distributed import mean_rows


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


def sampled_bce(
    query_MD: Tensor,
    positive_MD: Tensor,
    negative_MD: Tensor,
    exists_M: Tensor,
    scale: float = 1.0,
) -> Tensor:
    """Binary cross-entropy of one positive and one negative a row (Eq. 6 of MMSR, as a mean).

    mean_m -log sigma(s q_m . p_m)  +  mean_m -log(1 - sigma(s q_m . n_m)), the second over the rows
    that have a negative. In one of several processes it is the share of the means over all of their
    rows, see :mod:`trainer.distributed`.

    Args:
        query_MD: (M, D) queries.
        positive_MD: (M, D) vectors of the targets.
        negative_MD: (M, D) vectors of the negatives.
        exists_M: (M,) bool, which negatives there are.
        scale: s: 1 / temperature.
    """
    positive_M = scale * (query_MD * positive_MD).sum(-1).float()
    negative_M = scale * (query_MD * negative_MD).sum(-1).float()
    device = query_MD.device
    missed = functional.softplus(-positive_M).sum() / (mean_rows(len(query_MD), device) or 1.0)
    fooled_M = torch.where(exists_M, functional.softplus(negative_M), 0)
    return missed + fooled_M.sum() / (mean_rows(int(exists_M.sum()), device) or 1.0)
