"""Binary cross-entropy with one sampled negative for each position."""

import torch
from torch import Tensor
from torch.nn import functional

from trainer.distributed import global_mean_rows


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
    missed = functional.softplus(-positive_M).sum() / (
        global_mean_rows(len(query_MD), device) or 1.0
    )
    fooled_M = torch.where(exists_M, functional.softplus(negative_M), 0)
    return missed + fooled_M.sum() / (global_mean_rows(int(exists_M.sum()), device) or 1.0)
