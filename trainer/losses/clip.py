"""The in-batch contrastive operator for pairs, both directions from one set of scores.

As :mod:`trainer.losses.in_batch`, in which a row can have several positives and labels of its own.

Legend: B pairs, D width, R rows of a block.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from trainer.losses.chunked_scores import Scores, add_product, as_kind, product_dtype, times, top

_NEAR = 60.0  # e^60 and e^-60, and sums of many, are normal float32
_KEPT_BYTES = 64 * 2**20  # scores that may be kept for the second pass


def in_batch_symmetric(
    x_BD: Tensor, y_BD: Tensor, *, scale: float = 1.0, label_B: Tensor | None = None
) -> Tensor:
    """The mean of both directions, x_i to y_i among all y and y_i to x_i among all x.

    Of CLIP (Radford et al., 2021) and of the alignment of MMSRec, which takes the sum. Equal to
    half of two calls of ``in_batch``, for two thirds of their matrix products.

    Args:
        x_BD: (B, D); dtypes as in :func:`trainer.losses.in_batch.in_batch`.
        y_BD: (B, D), same dtype.
        scale: Factor on inner products: 1 / temperature.
        label_B: (B,) int64: pairs with equal labels are no negatives of each other.

    Returns:
        A scalar, float32 or float64; zero pairs give zero.
    """
    narrow = product_dtype(x_BD)
    with torch.autocast(x_BD.device.type, enabled=False):
        loss: Tensor = _Symmetric.apply(x_BD, y_BD, label_B, scale, narrow)
    return loss


class _Symmetric(torch.autograd.Function):
    """Two passes: the sums of columns must be whole before a row's gradient can be formed."""

    @staticmethod
    def forward(
        ctx: Any,
        x_BD: Tensor,
        y_BD: Tensor,
        label_B: Tensor | None,
        scale: float,
        narrow: torch.dtype,
    ) -> Tensor:
        B = len(x_BD)
        wide = torch.float64 if x_BD.dtype == torch.float64 else torch.float32
        need_x, need_y = ctx.needs_input_grad[:2]
        scores = Scores(y_BD.to(narrow), None, wide, B)
        positive_B1 = x_BD.new_empty((B, 1), dtype=wide)
        row_B1 = x_BD.new_empty((B, 1), dtype=wide)
        top_1B = x_BD.new_full((1, B), torch.finfo(wide).min, dtype=wide)
        sum_1B = x_BD.new_zeros((1, B), dtype=wide)
        keep = (need_x or need_y) and B * B * wide.itemsize <= _KEPT_BYTES
        kept: list[Tensor] = []
        # Where no score can be far from zero, one exponential serves rows and columns.
        lengths = (part.detach().norm(dim=1).amax() for part in (x_BD, y_BD) if B)
        near = scale * math.prod(float(length) for length in lengths) <= _NEAR

        def block(begin: int, end: int) -> Tensor:
            score_RB = scores.block(x_BD[begin:end].to(wide) * scale)
            if label_B is not None:
                score_RB.masked_fill_(label_B[begin:end, None] == label_B, -torch.inf)
            score_RB[:, begin:end].fill_diagonal_(-torch.inf)
            return score_RB

        for begin in range(0, B, scores.size):
            end = min(B, begin + scores.size)
            x_RD, y_RD = x_BD[begin:end].to(wide), y_BD[begin:end].to(wide)
            positive_B1[begin:end] = (x_RD * y_RD).sum(1, keepdim=True).mul_(scale)
            score_RB = block(begin, end)
            if keep:
                kept.append(score_RB.clone())
            if near:
                weight_RB = score_RB.exp_()
                sum_1B += weight_RB.sum(0, keepdim=True)
                row_B1[begin:end] = weight_RB.sum(1, keepdim=True).log_()
                continue
            higher_1B = torch.maximum(top_1B, top(score_RB, 0))
            weight_RB = torch.sub(score_RB, higher_1B, out=scores.spare(end - begin)).exp_()
            sum_1B.mul_((top_1B - higher_1B).exp_()).add_(weight_RB.sum(0, keepdim=True))
            top_1B = higher_1B
            top_R1 = top(score_RB, 1)
            row_B1[begin:end] = score_RB.sub_(top_R1).exp_().sum(1, keepdim=True).log_() + top_R1
        column_B1 = (sum_1B.log_() if near else sum_1B.log_().add_(top_1B)).T
        loss = functional.softplus(row_B1 - positive_B1).sum()
        loss += functional.softplus(column_B1 - positive_B1).sum()

        grad_x_BD = x_BD.new_empty(x_BD.shape, dtype=wide) if need_x else None
        grad_y_BD = y_BD.new_zeros(y_BD.shape, dtype=wide) if need_y else None
        if need_x or need_y:
            share = 0.5 / max(1, B)
            of_row_B1 = torch.logaddexp(row_B1, positive_B1)
            of_column_B1 = torch.logaddexp(column_B1, positive_B1)
            pull_B1 = -((row_B1 - of_row_B1).exp() + (column_B1 - of_column_B1).exp())
            for number, begin in enumerate(range(0, B, scores.size)):
                end = min(B, begin + scores.size)
                score_RB = kept[number] if keep else block(begin, end)
                spare_RB = scores.spare(end - begin)
                if near:
                    torch.add((-of_row_B1[begin:end]).exp(), (-of_column_B1.T).exp(), out=spare_RB)
                    weight_RB = spare_RB.mul_(score_RB.exp_())
                else:
                    weight_RB = torch.sub(score_RB, of_column_B1.T, out=spare_RB).exp_()
                    weight_RB += score_RB.sub_(of_row_B1[begin:end]).exp_()
                weight_RB = weight_RB.to(narrow)
                x_RD = x_BD[begin:end].to(wide) * (scale * share)
                if grad_x_BD is not None:
                    found_RD = (weight_RB @ scores.key_CD).to(wide)
                    found_RD += pull_B1[begin:end] * y_BD[begin:end].to(wide)
                    grad_x_BD[begin:end] = found_RD.mul_(scale * share)
                if grad_y_BD is not None:
                    add_product(grad_y_BD, weight_RB.T, x_RD, narrow)
                    grad_y_BD[begin:end] += pull_B1[begin:end] * x_RD
        ctx.save_for_backward(as_kind(grad_x_BD, x_BD), as_kind(grad_y_BD, y_BD))
        return loss * (0.5 / max(1, B))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *times(ctx.saved_tensors, grad), None, None, None
