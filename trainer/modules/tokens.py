"""Tokens of items: masked means, and a learned token for items without any.

Legend: K items, T tokens of an item, D width.
"""

import torch
from torch import Tensor
from torch.nn import functional

Tokens = tuple[Tensor, Tensor]
"""(K, T, D) float, and (K, T) bool, true where a token exists."""


def masked_mean(x_KTD: Tensor, mask_KT: Tensor) -> Tensor:
    """Return the mean of the tokens that exist, at least one for each item: (K, D)."""
    if x_KTD.shape[1] == 1:
        return x_KTD[:, 0]
    total_KD = torch.where(mask_KT[..., None], x_KTD, 0).sum(1)
    return total_KD / mask_KT.sum(1, keepdim=True)


def averaged(x_KTD: Tensor, mask_KT: Tensor) -> Tokens:
    """Return the mean of each item's tokens as its only token: a linear map then costs less."""
    if x_KTD.shape[1] == 1:
        return x_KTD, mask_KT
    total_K1D = torch.where(mask_KT[..., None], x_KTD, 0).sum(1, keepdim=True)
    counts_K1 = mask_KT.sum(1, keepdim=True)
    return total_K1D / counts_K1.clamp_min(1)[..., None], counts_K1 > 0


def fill(x_KTD: Tensor, mask_KT: Tensor, absent_D: Tensor) -> Tokens:
    """Give each item without tokens one learned token."""
    missing_K1 = ~mask_KT.any(1, keepdim=True)
    first_KT = functional.pad(missing_K1, (0, mask_KT.shape[1] - 1))
    return torch.where(first_KT[..., None], absent_D, x_KTD), mask_KT | first_KT
