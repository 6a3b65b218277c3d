"""Tokens of items: means over the tokens that exist, and a token for items without tokens.

Legend: K items, T tokens of an item, D width.
"""

import torch
from torch import Tensor
from torch.nn import functional

Tokens = tuple[Tensor, Tensor]
"""(K, T, D) float tokens, and (K, T) bool, true where a token exists."""


def all_exist(mask: Tensor) -> bool:
    """Return True if a mask is true everywhere, so that it can be left out.

    Only a mask on the CPU is read. The result is False for a mask on another device, where reading
    would wait, and in a graph that is exported, where the values are unknown.
    """
    is_readable = mask.device.type == "cpu" and not torch.compiler.is_exporting()
    return is_readable and bool(mask.all())


def masked_mean(x_KTD: Tensor, mask_KT: Tensor) -> Tensor:
    """Return the mean of the tokens that exist: (K, D). Each item must have at least one."""
    if x_KTD.shape[1] == 1:
        return x_KTD[:, 0]
    total_KD = torch.where(mask_KT[..., None], x_KTD, 0).sum(1)
    return total_KD / mask_KT.sum(1, keepdim=True)


def averaged(x_KTD: Tensor, mask_KT: Tensor) -> Tokens:
    """Return the mean of each item's tokens as its only token, (K, 1, D) and (K, 1).

    A linear map of the result is cheaper than the mean of the mapped tokens.
    """
    if x_KTD.shape[1] == 1:
        return x_KTD, mask_KT
    total_K1D = torch.where(mask_KT[..., None], x_KTD, 0).sum(1, keepdim=True)
    counts_K1 = mask_KT.sum(1, keepdim=True)
    return total_K1D / counts_K1.clamp_min(1)[..., None], counts_K1 > 0


def first_token(x_KTD: Tensor, mask_KT: Tensor) -> Tokens:
    """Return the first token of each item as its only token, (K, 1, D) and (K, 1)."""
    return x_KTD[:, :1], mask_KT[:, :1]


def fill(x_KTD: Tensor, mask_KT: Tensor, absent_D: Tensor) -> Tokens:
    """Replace the first token of each item without tokens by a learned token.

    Args:
        x_KTD: Tokens.
        mask_KT: Bool, true where a token exists.
        absent_D: The learned token.
    """
    missing_K1 = ~mask_KT.any(1, keepdim=True)
    first_KT = functional.pad(missing_K1, (0, mask_KT.shape[1] - 1))
    return torch.where(first_KT[..., None], absent_D, x_KTD), mask_KT | first_KT
