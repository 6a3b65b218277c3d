"""The symmetric in-batch contrastive loss of pairs, both directions from one matrix of scores.

:mod:`trainer.losses.in_batch` is the general form of one direction, in which a row can have several
positives and labels of its own.

Legend: B pairs, D width, R rows of a block.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from trainer.losses.chunked_scores import (
    ScoreBlocks,
    accumulate_dtype,
    add_matmul_,
    cast_gradient,
    finite_max,
    matmul_dtype,
    scale_gradients,
)

_SMALL_SCORE = 60.0  # e^60 and e^-60, and sums of many of them, are normal float32
_KEPT_BYTES = 64 * 2**20  # most memory for scores that are kept for the second pass


def in_batch_symmetric(
    x_BD: Tensor,
    y_BD: Tensor,
    *,
    scale: float = 1.0,
    label_B: Tensor | None = None,
    are_units: bool = False,
) -> Tensor:
    """Return the mean of the losses of x_i to y_i among all y, and of y_i to x_i among all x.

    The loss of CLIP (Radford et al., 2021), and half of that of MMSRec's alignment, which is the
    sum. Equal to half the sum of two calls of ``in_batch``, with two thirds of their matrix
    products.

    Args:
        x_BD: (B, D); dtypes as in :func:`trainer.losses.in_batch.in_batch`.
        y_BD: (B, D), same dtype.
        scale: Factor on inner products: 1 / temperature.
        label_B: (B,) int64; pairs with equal labels are not negatives of each other.
        are_units: Whether all vectors have length 1. Otherwise the largest length is read, which
            waits for the device.

    Returns:
        A scalar, float32 or float64; 0 without pairs.
    """
    product_dtype = matmul_dtype(x_BD)  # of autocast, which is off inside
    with torch.autocast(x_BD.device.type, enabled=False):
        length = 1.0 if are_units else _largest_product(x_BD, y_BD)
        is_small = scale * length <= _SMALL_SCORE
        loss: Tensor = _Symmetric.apply(x_BD, y_BD, label_B, scale, is_small, product_dtype)
    return loss


def _largest_product(x_BD: Tensor, y_BD: Tensor) -> float:
    """Return the product of the largest lengths; 1 without pairs."""
    lengths = (part.detach().norm(dim=1).amax() for part in (x_BD, y_BD) if len(x_BD))
    return math.prod(float(length) for length in lengths)


@dataclass(frozen=True, kw_only=True, slots=True)
class _LogSums:
    """The results of the first pass over the scores."""

    positive_B1: Tensor
    """Score of each pair."""
    row_B1: Tensor
    """Log of the sum of exponentials over the negatives of x_i."""
    column_B1: Tensor
    """The same of y_i."""
    kept: list[Tensor]
    """The scores of each block, if they are kept."""


class _Pairs:
    """The matrix of scores, -inf at the pairs themselves and at pairs with equal labels."""

    def __init__(
        self,
        x_BD: Tensor,
        y_BD: Tensor,
        label_B: Tensor | None,
        scale: float,
        is_small: bool,
        product_dtype: torch.dtype,
    ) -> None:
        self.x_BD, self.y_BD, self.label_B, self.scale = x_BD, y_BD, label_B, scale
        self.product_dtype = product_dtype
        self.dtype = accumulate_dtype(x_BD)
        self.blocks = ScoreBlocks(y_BD.to(product_dtype), None, self.dtype, len(x_BD))
        self.small = is_small
        """True if no score can overflow an exponential: then one exponential serves rows and
        columns."""

    def scores(self, rows: slice) -> Tensor:
        """Return the scores of a block (R, B)."""
        score_RB = self.blocks.scores(self.x_BD[rows].to(self.dtype) * self.scale)
        if self.label_B is not None:
            score_RB.masked_fill_(self.label_B[rows, None] == self.label_B, -torch.inf)
        score_RB[:, rows].fill_diagonal_(-torch.inf)
        return score_RB

    def log_sums(self, keep: bool) -> _LogSums:
        """Sum over rows and columns; ``keep``: keep the scores for the second pass."""
        B, x_BD, dtype = len(self.x_BD), self.x_BD, self.dtype
        positive_B1 = x_BD.new_empty((B, 1), dtype=dtype)
        row_B1 = x_BD.new_empty((B, 1), dtype=dtype)
        top_1B = x_BD.new_full((1, B), torch.finfo(dtype).min, dtype=dtype)
        sum_1B = x_BD.new_zeros((1, B), dtype=dtype)
        kept: list[Tensor] = []
        for rows in self.blocks.slices():
            x_RD, y_RD = x_BD[rows].to(dtype), self.y_BD[rows].to(dtype)
            positive_B1[rows] = (x_RD * y_RD).sum(1, keepdim=True).mul_(self.scale)
            score_RB = self.scores(rows)
            if keep:
                kept.append(score_RB.clone())
            if self.small:
                weight_RB = score_RB.exp_()
                sum_1B += weight_RB.sum(0, keepdim=True)
                row_B1[rows] = weight_RB.sum(1, keepdim=True).log_()
                continue
            higher_1B = torch.maximum(top_1B, finite_max(score_RB, 0))
            scratch_RB = self.blocks.scratch(len(score_RB))
            weight_RB = torch.sub(score_RB, higher_1B, out=scratch_RB).exp_()
            sum_1B.mul_((top_1B - higher_1B).exp_()).add_(weight_RB.sum(0, keepdim=True))
            top_1B = higher_1B
            top_R1 = finite_max(score_RB, 1)
            row_B1[rows] = score_RB.sub_(top_R1).exp_().sum(1, keepdim=True).log_() + top_R1
        column_B1 = (sum_1B.log_() if self.small else sum_1B.log_().add_(top_1B)).T
        return _LogSums(positive_B1=positive_B1, row_B1=row_B1, column_B1=column_B1, kept=kept)

    def gradients(
        self, sums: _LogSums, need_x: bool, need_y: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of the mean of both directions."""
        x_BD, y_BD, dtype = self.x_BD, self.y_BD, self.dtype
        grad_x_BD = x_BD.new_empty(x_BD.shape, dtype=dtype) if need_x else None
        grad_y_BD = y_BD.new_zeros(y_BD.shape, dtype=dtype) if need_y else None
        factor = self.scale * (0.5 / max(1, len(x_BD)))
        row_B1 = torch.logaddexp(sums.row_B1, sums.positive_B1)
        column_B1 = torch.logaddexp(sums.column_B1, sums.positive_B1)
        grad_positive_B1 = -((sums.row_B1 - row_B1).exp() + (sums.column_B1 - column_B1).exp())
        for number, rows in enumerate(self.blocks.slices()):
            score_RB = sums.kept[number] if sums.kept else self.scores(rows)
            weight_RB = self._weights(score_RB, row_B1[rows], column_B1).to(self.product_dtype)
            x_RD = x_BD[rows].to(dtype) * factor
            if grad_x_BD is not None:
                grad_RD = (weight_RB @ self.blocks.key_CD).to(dtype)
                grad_RD += grad_positive_B1[rows] * y_BD[rows].to(dtype)
                grad_x_BD[rows] = grad_RD.mul_(factor)
            if grad_y_BD is not None:
                add_matmul_(grad_y_BD, weight_RB.T, x_RD, self.product_dtype)
                grad_y_BD[rows] += grad_positive_B1[rows] * x_RD
        return grad_x_BD, grad_y_BD

    def _weights(self, score_RB: Tensor, row_R1: Tensor, column_B1: Tensor) -> Tensor:
        """Return the sum of the softmax over rows and of that over columns; overwrites scores."""
        scratch_RB = self.blocks.scratch(len(score_RB))
        if self.small:
            torch.add((-row_R1).exp(), (-column_B1.T).exp(), out=scratch_RB)
            return scratch_RB.mul_(score_RB.exp_())
        weight_RB = torch.sub(score_RB, column_B1.T, out=scratch_RB).exp_()
        weight_RB += score_RB.sub_(row_R1).exp_()
        return weight_RB


class _Symmetric(torch.autograd.Function):
    """Two passes: a row's gradient needs the sums of all columns."""

    @staticmethod
    def forward(
        ctx: Any,
        x_BD: Tensor,
        y_BD: Tensor,
        label_B: Tensor | None,
        scale: float,
        is_small: bool,
        product_dtype: torch.dtype,
    ) -> Tensor:
        pairs = _Pairs(x_BD, y_BD, label_B, scale, is_small, product_dtype)
        need_x, need_y = ctx.needs_input_grad[:2]
        B = len(x_BD)
        keep = (need_x or need_y) and B * B * pairs.dtype.itemsize <= _KEPT_BYTES
        sums = pairs.log_sums(keep)
        loss = functional.softplus(sums.row_B1 - sums.positive_B1).sum()
        loss += functional.softplus(sums.column_B1 - sums.positive_B1).sum()
        grad_x_BD, grad_y_BD = None, None
        if need_x or need_y:
            grad_x_BD, grad_y_BD = pairs.gradients(sums, need_x, need_y)
        ctx.save_for_backward(cast_gradient(grad_x_BD, x_BD), cast_gradient(grad_y_BD, y_BD))
        return loss * (0.5 / max(1, B))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *scale_gradients(ctx.saved_tensors, grad), None, None, None, None
