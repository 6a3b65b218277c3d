"""The in-batch contrastive loss: a softmax over the columns of a batch, in blocks of rows.

The B x B matrix of scores is never in memory. The scores of a block of rows are in one buffer, and
the gradient of the block is computed from the buffer. Scores of positives are computed in full
precision, outside the matrix products, and their gradient is minus the share of the negatives, so
no digits cancel where the model is confident. No sum depends on the order of threads.

Legend: M rows (queries), C columns (keys), D width, P positives of a row, U owners (users), J
labels of an owner, R rows of a block.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from trainer.data.batches import Batch
from trainer.data.device_copy import to_device
from trainer.distributed import scale_to_global_mean, world_size
from trainer.losses.base import DrawnItems, ItemVectors, Targets
from trainer.losses.batch_columns import BatchColumns, BatchLoss, batch_columns, own_items
from trainer.losses.chunked_scores import (
    ScoreBlocks,
    accumulate_dtype,
    add_matmul_,
    cast_gradient,
    finite_max,
    matmul_dtype,
    scale_gradients,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """Properties of the columns of an in-batch softmax."""

    label_C: Tensor | None = None
    """(C,) int64, at least 0: the item, or other label, of each column."""
    correction_C: Tensor | None = None
    """(C,) subtracted from scores: the log of the number of times that the column is expected in a
    batch, or of a multiple of this number."""
    corrects_positives: bool = True
    """If false, ``correction_C`` is subtracted from the scores of negatives only."""
    count_C: Tensor | None = None
    """(C,) the number of negatives that a column counts as: duplicate items are one column. A
    column of count 0 is not a negative."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExcludedLabels:
    """Labels whose columns are not negatives, for instance the items of a user's history."""

    own_UJ: Tensor
    """(U, J) int64, the labels of each owner, padded with -1."""
    owner_M: Tensor | None = None
    """(M,) int64 in [0, U), on the CPU, the owner of each row; ``None``: row m has owner m."""


def in_batch(
    query_MD: Tensor,
    key_CD: Tensor,
    positive_MP: Tensor,
    *,
    scale: float = 1.0,
    columns: Columns = Columns(),
    excluded: ExcludedLabels | None = None,
    counted: int | None = None,
) -> Tensor:
    """Return the mean over rows of -log(positives / (positives + negatives)).

    With s_mc = scale q_m . k_c - correction_c, where a positive has no correction without
    ``columns.corrects_positives``, the loss of row m is
    -log( sum_{p in P(m)} e^s_mp / (sum_{p in P(m)} e^s_mp + sum_{c in N(m)} count_c e^s_mc) ).
    N(m) contains every column that is not a positive of the row and whose label is not excluded. A
    positive that is listed twice counts twice.

    Args:
        query_MD: (M, D). float64 is computed in float64, other dtypes in float32; the matrix
            products of bfloat16, or of float32 under autocast, are computed in bfloat16.
        key_CD: (C, D), same dtype.
        positive_MP: (M,) or (M, P) int64, columns. The padding value -1 marks missing positives;
            the first positive is always valid.
        scale: Factor on inner products: 1 / temperature.
        columns: Labels, counts and corrections of the columns.
        excluded: Labels that are not negatives of a row; ``None``: the labels of its positives.
            Ignored if ``columns`` have no labels.
        counted: Number of positives, from the first, in the denominator; ``None``: all. With fewer
            than all, the loss can be negative.

    Returns:
        A scalar, float32 or float64; 0 without rows.
    """
    if positive_MP.dim() == 1:
        positive_MP = positive_MP[:, None]
    exists_MP = positive_MP >= 0
    positive_MP = torch.where(exists_MP, positive_MP, positive_MP[:, :1])
    dtype = accumulate_dtype(query_MD)
    offset_C = None if columns.correction_C is None else -columns.correction_C.to(dtype)
    positive_offset_C = offset_C if columns.corrects_positives else None
    negative_offset_C = offset_C
    if columns.count_C is not None:
        log_count_C = columns.count_C.to(dtype).log()
        negative_offset_C = log_count_C if offset_C is None else offset_C + log_count_C
    softmax = _InBatchSoftmax(
        positive_MP=positive_MP,
        exists_MP=exists_MP,
        positive_offset_C=positive_offset_C,
        negative_offset_C=negative_offset_C,
        excluded=excluded_columns(columns.label_C, positive_MP, excluded),
        scale=scale,
        counted=counted,
    )
    product_dtype = matmul_dtype(query_MD)  # of autocast, which is off inside
    with torch.autocast(query_MD.device.type, enabled=False):
        loss: Tensor = _InBatch.apply(query_MD, key_CD, softmax, product_dtype)
    return loss


@dataclass(frozen=True, slots=True)
class ExcludedColumns:
    """The columns whose label the owner of a row has."""

    label_C: Tensor
    """Labels of the columns, ascending."""
    first_C: Tensor
    """(C,) for each column, the index in ``label_C`` of the first column with its label."""
    own_UJ: Tensor
    """(U, J) int64, the labels of each owner, padded with -1."""
    owner_M: Tensor
    """(M,) int64 in [0, U), on the CPU, the owner of each row."""

    def mask(self, rows: slice) -> Tensor:
        """Return (R, C) bool, true where a column is excluded."""
        owners = self.owner_M[rows].unique(return_inverse=True)
        owner_V, row_R = (to_device(x, self.label_C.device) for x in owners)
        own_VJ = self.own_UJ.index_select(0, owner_V)
        C = len(self.label_C)
        # Mark the first column of each label that an owner has; C collects the other labels.
        first_VJ = torch.searchsorted(self.label_C, own_VJ)
        is_label_VJ = self.label_C[first_VJ.clamp_max(C - 1)] == own_VJ
        marked_VE = torch.zeros(len(own_VJ), C + 1, dtype=torch.bool, device=own_VJ.device)
        marked_VE.scatter_(1, torch.where(is_label_VJ, first_VJ, C), True)
        return marked_VE.index_select(1, self.first_C).index_select(0, row_R)


def excluded_columns(
    label_C: Tensor | None, positive_MP: Tensor, excluded: ExcludedLabels | None
) -> ExcludedColumns | None:
    """Return the excluded columns of each row; ``None`` if the columns have no labels.

    Args:
        label_C: Labels of the columns.
        positive_MP: (M, P) columns of the positives.
        excluded: Excluded labels; ``None``: the labels of the positives.
    """
    if label_C is None:
        return None
    if excluded is None:
        excluded = ExcludedLabels(own_UJ=label_C[positive_MP])
    owner_M = excluded.owner_M
    owner_M = torch.arange(len(positive_MP)) if owner_M is None else owner_M.cpu()
    ascending_C = label_C.sort().values
    first_C = torch.searchsorted(ascending_C, label_C)
    return ExcludedColumns(ascending_C, first_C, excluded.own_UJ, owner_M)


@dataclass(frozen=True, kw_only=True, slots=True)
class _InBatchSoftmax:
    """The terms of each row's softmax, apart from the vectors."""

    positive_MP: Tensor
    exists_MP: Tensor
    positive_offset_C: Tensor | None
    negative_offset_C: Tensor | None
    excluded: ExcludedColumns | None
    scale: float
    counted: int | None

    def positive_scores(self, rows: slice, query_RD: Tensor, key_RPD: Tensor) -> Tensor:
        """Return (R, P) scores of the positives; -inf where there is none."""
        score_RP = torch.einsum("rd,rpd->rp", query_RD, key_RPD)
        if self.positive_offset_C is not None:
            score_RP += self.positive_offset_C[self.positive_MP[rows]]
        return score_RP.masked_fill_(~self.exists_MP[rows], -torch.inf)

    def negative_weights(
        self, rows: slice, query_RD: Tensor, blocks: ScoreBlocks
    ) -> tuple[Tensor, Tensor]:
        """Return (R, C) weights e^(s - top) of the negatives, 0 elsewhere, and (R, 1) ``top``."""
        score_RC = blocks.scores(query_RD)
        if self.excluded is not None:
            score_RC.masked_fill_(self.excluded.mask(rows), -torch.inf)
        score_RC.scatter_(1, self.positive_MP[rows], -torch.inf)
        top_R1 = finite_max(score_RC, 1)
        return score_RC.sub_(top_R1).exp_(), top_R1

    def loss(self, score_RP: Tensor, negative_R1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss of a block of rows.

        Args:
            score_RP: Scores of the positives.
            negative_R1: Log of the sum over the negatives.

        Returns:
            The sum over the rows, (R, 1) the log of the denominators, and (R, P) the gradient with
            respect to the scores of the positives.
        """
        positive_R1 = score_RP.logsumexp(1, keepdim=True)
        if self.counted is None:
            denominator_R1 = torch.logaddexp(negative_R1, positive_R1)
            loss = functional.softplus(negative_R1 - positive_R1).sum()
            grad_RP = -(score_RP - positive_R1 + negative_R1 - denominator_R1).exp()
            return loss, denominator_R1, grad_RP
        counted_RP = score_RP[:, : self.counted]
        denominator_R1 = torch.logaddexp(negative_R1, counted_RP.logsumexp(1, keepdim=True))
        loss = (denominator_R1 - positive_R1).sum()
        grad_RP = -(score_RP - positive_R1).exp()
        grad_RP[:, : self.counted] += (counted_RP - denominator_R1).exp()
        return loss, denominator_R1, grad_RP


class _InBatch(torch.autograd.Function):
    """Compute loss and gradients block by block, with three matrix products in all."""

    @staticmethod
    def forward(
        ctx: Any,
        query_MD: Tensor,
        key_CD: Tensor,
        softmax: _InBatchSoftmax,
        product_dtype: torch.dtype,
    ) -> Tensor:
        M, P = softmax.positive_MP.shape
        dtype = accumulate_dtype(query_MD)
        need_query, need_key = ctx.needs_input_grad[:2]
        grad_query_MD = query_MD.new_empty(query_MD.shape, dtype=dtype) if need_query else None
        grad_key_CD = key_CD.new_zeros(key_CD.shape, dtype=dtype) if need_key else None
        grad_MP = query_MD.new_empty((M, P), dtype=dtype)
        scale_of_mean = softmax.scale / max(1, M)
        blocks = ScoreBlocks(key_CD.to(product_dtype), softmax.negative_offset_C, dtype, M)
        loss = query_MD.new_zeros((), dtype=dtype)
        for rows in blocks.slices():
            query_RD = query_MD[rows].to(dtype) * softmax.scale
            key_RPD = key_CD[softmax.positive_MP[rows]].to(dtype)
            score_RP = softmax.positive_scores(rows, query_RD, key_RPD)
            weight_RC, top_R1 = softmax.negative_weights(rows, query_RD, blocks)
            negative_R1 = weight_RC.sum(1, keepdim=True).log_() + top_R1
            block_loss, denominator_R1, grad_RP = softmax.loss(score_RP, negative_R1)
            loss += block_loss
            grad_MP[rows] = grad_RP
            if not (need_query or need_key):
                continue
            factor_R1 = (top_R1 - denominator_R1).exp()  # turns a weight into a probability
            weight_RC = weight_RC.to(product_dtype)
            if grad_query_MD is not None:
                grad_RD = (weight_RC @ blocks.key_CD).to(dtype).mul_(factor_R1)
                grad_RD += torch.einsum("rp,rpd->rd", grad_RP, key_RPD)
                grad_query_MD[rows] = grad_RD.mul_(scale_of_mean)
            if grad_key_CD is not None:
                scaled_RD = query_RD.mul_(factor_R1 / max(1, M))
                add_matmul_(grad_key_CD, weight_RC.T, scaled_RD, product_dtype)
        if grad_key_CD is not None:
            for p in range(P):
                scaled_MD = grad_MP[:, p, None] * query_MD * scale_of_mean
                grad_key_CD += torch.ops.aten.embedding_dense_backward(
                    scaled_MD.to(dtype), softmax.positive_MP[:, p], len(key_CD), -1, False
                )
        ctx.save_for_backward(
            cast_gradient(grad_query_MD, query_MD), cast_gradient(grad_key_CD, key_CD)
        )
        return loss / max(1, M)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *scale_gradients(ctx.saved_tensors, grad), None, None


class InBatch(BatchLoss):
    """``loss=in-batch``: softmax over the items of the batch and drawn items.

    Without drawn items, this is DAP of PMMRec (Eq. 5) and the in-batch loss of MMSR. With them, the
    negatives are mixed (Yang et al., WWW 2020, section 3.3). The correction is the log of the
    expected count of an item: its share of the training interactions, times the size of the batch,
    and its probability of a draw, times the number of draws.
    """

    reads = frozenset({"negatives", "negatives_power", "debias", "debias_target"})

    def forward(
        self,
        query_MD: Tensor,
        items: ItemVectors,
        targets: Targets,
        batch: Batch,
        drawn: DrawnItems | None,
    ) -> Tensor:
        """Return the loss; see :func:`in_batch`."""
        columns = batch_columns(items, batch, drawn)
        own_UJ = own_items(batch, self.settings.exclude)
        loss = in_batch(
            query_MD,
            columns.key_CD,
            columns.of(targets.item_M),
            scale=self.settings.scale,
            columns=Columns(
                label_C=columns.item_C,
                correction_C=self._log_expected(columns, batch) if self.settings.debias else None,
                corrects_positives=self.settings.debias_target,
                count_C=columns.count_C,
            ),
            excluded=ExcludedLabels(own_UJ=own_UJ, owner_M=targets.on_host.row_M),
        )
        return scale_to_global_mean(loss, query_MD)

    def _log_expected(self, columns: BatchColumns, batch: Batch) -> Tensor:
        """Return the log of the expected count of each column: (C,)."""
        n_drawn = self.settings.negatives * world_size()
        n_batch = columns.count_C.sum() - n_drawn
        log_expected_C = batch.train.log_popularity_N[columns.item_C] + n_batch.log()
        if n_drawn:
            probability_C = self.sampler.probability(batch.train, columns.item_C)
            log_expected_C = torch.logaddexp(log_expected_C, (n_drawn * probability_C).log())
        return log_expected_C
