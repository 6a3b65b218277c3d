"""The pairwise losses of GRU4Rec: the target scores above each other item of the batch.

BPR and TOP1 (Hidasi et al., ICLR 2016) average over the negatives of a row. BPR-max and TOP1-max
(Hidasi and Karatzoglou, CIKM 2018) weight the negatives by a softmax of their scores, so that the
negative with the highest score decides. The scores of a block of rows are in memory, and the
gradient of the block is computed from them.

Legend: M rows (queries), C columns (keys), D width, R rows of a block.
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from trainer.data.batches import Batch
from trainer.distributed import scale_to_global_mean
from trainer.losses.base import DrawnItems, ItemVectors, Targets
from trainer.losses.batch_columns import BatchLoss, batch_columns, own_items
from trainer.losses.chunked_scores import (
    ScoreBlocks,
    accumulate_dtype,
    add_matmul_,
    cast_gradient,
    matmul_dtype,
    scale_gradients,
)
from trainer.losses.in_batch import ExcludedColumns, ExcludedLabels, excluded_columns

PairLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Loss of each row (R,), from (R, 1) scores of the targets, (R, C) scores, and (R, C) counts of the
columns, 0 where a column is no negative of the row. A row without negatives has the loss 0."""


def bpr(target_R1: Tensor, score_RC: Tensor, count_RC: Tensor) -> Tensor:
    """Return the mean over the negatives of -log sigma(target - score), Eq. of section 3.1.3."""
    return _mean(functional.softplus(score_RC - target_R1), count_RC)


def top1(target_R1: Tensor, score_RC: Tensor, count_RC: Tensor) -> Tensor:
    """Return the mean over the negatives of sigma(score - target) + sigma(score^2)."""
    return _mean((score_RC - target_R1).sigmoid() + score_RC.square().sigmoid(), count_RC)


def bpr_max(
    target_R1: Tensor, score_RC: Tensor, count_RC: Tensor, *, penalty: float = 1.0
) -> Tensor:
    """Return -log sum_n w_n sigma(target - s_n) + penalty sum_n w_n s_n^2.

    The weights w are the softmax of the scores s of the negatives.
    """
    log_weight_RC = _log_weights(score_RC, count_RC)
    log_win_RC = log_weight_RC + functional.logsigmoid(target_R1 - score_RC)
    squares_R = (log_weight_RC.exp() * score_RC.square()).sum(1)
    loss_R = penalty * squares_R - log_win_RC.logsumexp(1)
    return torch.where(count_RC.sum(1) > 0, loss_R, 0)


def top1_max(target_R1: Tensor, score_RC: Tensor, count_RC: Tensor) -> Tensor:
    """Return sum_n w_n (sigma(s_n - target) + sigma(s_n^2)), weighted as in :func:`bpr_max`."""
    pair_RC = (score_RC - target_R1).sigmoid() + score_RC.square().sigmoid()
    loss_R = (_log_weights(score_RC, count_RC).exp() * pair_RC).sum(1)
    return torch.where(count_RC.sum(1) > 0, loss_R, 0)


def _mean(pair_RC: Tensor, count_RC: Tensor) -> Tensor:
    return (pair_RC * count_RC).sum(1) / count_RC.sum(1).clamp_min(1)


def _log_weights(score_RC: Tensor, count_RC: Tensor) -> Tensor:
    """Return the log of the softmax over the negatives; the lowest number where there is none."""
    lowest = torch.finfo(score_RC.dtype).min / 4
    masked_RC = torch.where(count_RC > 0, score_RC + count_RC.clamp_min(1).log(), lowest)
    return masked_RC.log_softmax(1)


def pairwise(
    query_MD: Tensor,
    key_CD: Tensor,
    positive_M: Tensor,
    pair_loss: PairLoss,
    *,
    scale: float = 1.0,
    count_C: Tensor | None = None,
    label_C: Tensor | None = None,
    excluded: ExcludedLabels | None = None,
) -> Tensor:
    """Return the mean over rows of a pairwise loss, without storing all scores.

    Args:
        query_MD: (M, D). float64 is computed in float64, other dtypes in float32.
        key_CD: (C, D), same dtype.
        positive_M: (M,) int64, the column of the target of each row, which is no negative.
        pair_loss: The loss of a row.
        scale: Factor on inner products: 1 / temperature.
        count_C: The number of negatives that a column counts as; ``None``: 1.
        label_C: (C,) int64, at least 0: the item, or other label, of each column.
        excluded: Labels that are not negatives of a row; ``None``: the label of its target.
            Ignored without ``label_C``.

    Returns:
        A scalar, float32 or float64; 0 without rows.
    """
    dtype = accumulate_dtype(query_MD)
    columns = _PairColumns(
        positive_M=positive_M,
        count_C=(
            torch.ones(len(key_CD), dtype=dtype, device=key_CD.device)
            if count_C is None
            else count_C.to(dtype)
        ),
        excluded=excluded_columns(label_C, positive_M[:, None], excluded),
        scale=scale,
        pair_loss=pair_loss,
    )
    product_dtype = matmul_dtype(query_MD)  # of autocast, which is off inside
    with torch.autocast(query_MD.device.type, enabled=False):
        loss: Tensor = _Pairwise.apply(query_MD, key_CD, columns, product_dtype)
    return loss


@dataclass(frozen=True, kw_only=True, slots=True)
class _PairColumns:
    """Properties of rows and columns, apart from the vectors."""

    positive_M: Tensor
    count_C: Tensor
    excluded: ExcludedColumns | None
    scale: float
    pair_loss: PairLoss

    def loss(self, rows: slice, score_RC: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sum of the losses of a block, and its gradient in the scores (R, C)."""
        count_RC = self.count_C.expand(score_RC.shape).clone()
        if self.excluded is not None:
            count_RC.masked_fill_(self.excluded.mask(rows), 0)
        positive_R1 = self.positive_M[rows, None]
        count_RC.scatter_(1, positive_R1, 0)
        with torch.enable_grad():
            score_RC = score_RC.detach().requires_grad_()
            loss = self.pair_loss(score_RC.gather(1, positive_R1), score_RC, count_RC).sum()
            (grad_RC,) = torch.autograd.grad(loss, score_RC)
        return loss.detach(), grad_RC


class _Pairwise(torch.autograd.Function):
    """Compute loss and gradients block by block."""

    @staticmethod
    def forward(
        ctx: Any,
        query_MD: Tensor,
        key_CD: Tensor,
        columns: _PairColumns,
        product_dtype: torch.dtype,
    ) -> Tensor:
        rows_total = len(query_MD)
        dtype = accumulate_dtype(query_MD)
        blocks = ScoreBlocks(key_CD.to(product_dtype), None, dtype, rows_total)
        grad_query_MD = query_MD.new_zeros(query_MD.shape, dtype=dtype)
        grad_key_CD = key_CD.new_zeros(key_CD.shape, dtype=dtype)
        loss = query_MD.new_zeros((), dtype=dtype)
        for rows in blocks.slices():
            query_RD = query_MD[rows].to(dtype) * columns.scale
            block_loss, grad_RC = columns.loss(rows, blocks.scores(query_RD))
            loss += block_loss
            grad_RC = (grad_RC / rows_total).to(product_dtype)
            grad_query_MD[rows] = (grad_RC @ blocks.key_CD).to(dtype) * columns.scale
            add_matmul_(grad_key_CD, grad_RC.T, query_RD, product_dtype)
        ctx.save_for_backward(
            cast_gradient(grad_query_MD, query_MD), cast_gradient(grad_key_CD, key_CD)
        )
        return loss / max(1, rows_total)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *scale_gradients(ctx.saved_tensors, grad), None, None


class PairwiseLoss(BatchLoss):
    """Base class of the pairwise losses; a subclass sets ``row_loss``."""

    def forward(
        self,
        query_MD: Tensor,
        items: ItemVectors,
        targets: Targets,
        batch: Batch,
        drawn: DrawnItems | None,
    ) -> Tensor:
        """Return the loss; see :func:`pairwise`."""
        columns = batch_columns(items, batch, drawn)
        loss = pairwise(
            query_MD,
            columns.key_CD,
            columns.of(targets.item_M),
            self.row_loss,
            scale=self.settings.scale,
            count_C=columns.count_C,
            label_C=columns.item_C,
            excluded=ExcludedLabels(
                own_UJ=own_items(batch, self.settings.exclude), owner_M=targets.on_host.row_M
            ),
        )
        return scale_to_global_mean(loss, query_MD)

    @abstractmethod
    def row_loss(self, target_R1: Tensor, score_RC: Tensor, count_RC: Tensor) -> Tensor:
        """Return the loss of each row, see :data:`PairLoss`."""


class BPR(PairwiseLoss):
    """``loss=bpr``: see :func:`bpr`."""

    def row_loss(self, target_R1: Tensor, score_RC: Tensor, count_RC: Tensor) -> Tensor:
        """Return :func:`bpr`."""
        return bpr(target_R1, score_RC, count_RC)


class TOP1(PairwiseLoss):
    """``loss=top1``: see :func:`top1`."""

    def row_loss(self, target_R1: Tensor, score_RC: Tensor, count_RC: Tensor) -> Tensor:
        """Return :func:`top1`."""
        return top1(target_R1, score_RC, count_RC)


class BPRMax(PairwiseLoss):
    """``loss=bpr-max``: see :func:`bpr_max`; ``score_penalty`` is its penalty."""

    reads = frozenset({"negatives", "negatives_power", "score_penalty"})

    def row_loss(self, target_R1: Tensor, score_RC: Tensor, count_RC: Tensor) -> Tensor:
        """Return :func:`bpr_max` with the penalty of the settings."""
        return bpr_max(target_R1, score_RC, count_RC, penalty=self.settings.score_penalty)


class TOP1Max(PairwiseLoss):
    """``loss=top1-max``: see :func:`top1_max`."""

    def row_loss(self, target_R1: Tensor, score_RC: Tensor, count_RC: Tensor) -> Tensor:
        """Return :func:`top1_max`."""
        return top1_max(target_R1, score_RC, count_RC)
