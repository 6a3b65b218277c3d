"""The in-batch contrastive operator: a softmax over what a batch holds, without its B x B matrix.

Rows are worked off in blocks whose scores live in one buffer. Positives are scored apart from the
products, in full precision: their gradient is minus the share of the negatives, so nothing cancels
where the model is sure. No sum is left to the order of threads.

Legend: M rows (queries), C columns (keys), D width, P positives of a row, U owners, J labels that
an owner has, R rows of a block.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from trainer.data.batches import Batch
from trainer.losses.chunked_scores import Scores, add_product, as_kind, product_dtype, times, top


def in_batch(
    query_MD: Tensor,
    key_CD: Tensor,
    positive_MP: Tensor,
    *,
    scale: float = 1.0,
    label_C: Tensor | None = None,
    own_UJ: Tensor | None = None,
    owner_M: Tensor | None = None,
    correction_C: Tensor | None = None,
    count_C: Tensor | None = None,
    counted: int | None = None,
) -> Tensor:
    """The mean over rows of -log( sum of positives / (sum of positives + sum of negatives) ).

    With s_mc = scale q_m . k_c - correction_c, row m gives
    -log( sum_{p in P(m)} e^s_mp / (sum_{p in P(m)} e^s_mp + sum_{c in N(m)} count_c e^s_mc) ).
    N(m) is every column that is no positive of the row and whose label is not the row's own. Both
    sums run over a row's positives as they are listed: one that is listed twice counts twice.

    Args:
        query_MD: (M, D). float64 is computed in float64, all else in float32; bfloat16, or float32
            under autocast, has its matrix products in bfloat16.
        key_CD: (C, D), same dtype.
        positive_MP: (M,) or (M, P) int64, columns; -1 behind a row's first: there is none.
        scale: Factor on inner products: 1 / temperature.
        label_C: (C,) int64, at least 0: what each column is, for instance its item.
        own_UJ: (U, J) int64, labels that are no negatives of the rows of an owner, -1 where there
            are fewer. Without it a row's own are the labels of its positives.
        owner_M: (M,) int64, the row of ``own_UJ`` that each query goes by; ``None``: its number.
        correction_C: (C,) what is subtracted from scores: the log of a column's chance to be there.
        count_C: (C,) as how many negatives a column counts: duplicates held once; 0: it is none.
        counted: How many of the listed positives, from the first, stand in the denominator;
            ``None``: all. With fewer the loss can be negative.

    Returns:
        A scalar, float32 or float64; zero rows give zero.
    """
    if positive_MP.dim() == 1:
        positive_MP = positive_MP[:, None]
    # What is not there is the first once more, and counts for nothing.
    there_MP = positive_MP >= 0
    positive_MP = torch.where(there_MP, positive_MP, positive_MP[:, :1])
    wide = torch.float64 if query_MD.dtype == torch.float64 else torch.float32
    offset_C = None if correction_C is None else -correction_C.to(wide)
    negative_C = offset_C
    if count_C is not None:
        log_C = count_C.to(wide).log()
        negative_C = log_C if offset_C is None else offset_C + log_C
    own = None
    if label_C is not None:
        if own_UJ is None:
            own_UJ = label_C[positive_MP]
        if owner_M is None:
            owner_M = torch.arange(len(query_MD), device=query_MD.device)
        own = _Own(*label_C.sort(stable=True), own_UJ, owner_M)
    rows = _Rows(positive_MP, there_MP, offset_C, negative_C, own, scale, counted)
    narrow = product_dtype(query_MD)
    with torch.autocast(query_MD.device.type, enabled=False):
        loss: Tensor = _InBatch.apply(query_MD, key_CD, rows, wide, narrow)
    return loss


def own_items(batch: Batch) -> Tensor:
    """The training items of each row's user, as :func:`in_batch` takes them.

    Returns:
        (B, J) int64, ascending; -1 behind a user's last.
    """
    keys_J, items = batch.train.keys_J, len(batch.train.counts_N)
    starts_B = torch.searchsorted(keys_J, batch.users_B * items)
    lengths_B = torch.searchsorted(keys_J, (batch.users_B + 1) * items) - starts_B
    columns = torch.arange(max(1, int(lengths_B.max())), device=keys_J.device)
    at_BJ = (starts_B[:, None] + columns).clamp_max(len(keys_J) - 1)
    return torch.where(columns < lengths_B[:, None], keys_J[at_BJ] % items, -1)


def log_popularity(counts_N: Tensor) -> Tensor:
    """The log of each item's share of the training interactions: (N,) float32.

    An item without any has no share; it is taken for one with half an interaction.
    """
    return (counts_N.clamp_min(0.5) / counts_N.sum().clamp_min(1)).log()


@dataclass(frozen=True, slots=True)
class _Own:
    """Which columns are no negatives of a row: those whose label its owner has."""

    labels_C: Tensor
    """Ascending."""
    order_C: Tensor
    own_UJ: Tensor
    owner_M: Tensor

    def mask(self, begin: int, end: int) -> Tensor:
        """(R, C) bool of the rows from ``begin`` to ``end``."""
        owner_V, row_R = self.owner_M[begin:end].unique(return_inverse=True)
        own_VJ = self.own_UJ[owner_V]
        first_VJ = torch.searchsorted(self.labels_C, own_VJ)
        counts_VJ = torch.searchsorted(self.labels_C, own_VJ, right=True) - first_VJ
        # Each label of an owner is a run of the sorted columns: list all of all runs.
        counts = counts_VJ.flatten()
        runs = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
        within = torch.arange(len(runs), device=counts.device) - (counts.cumsum(0) - counts)[runs]
        column = self.order_C[first_VJ.flatten()[runs] + within]
        C = len(self.labels_C)
        mask_VC = torch.zeros(len(owner_V), C, dtype=torch.bool, device=counts.device)
        mask_VC.view(-1).index_fill_(0, runs // own_VJ.shape[1] * C + column, True)
        return mask_VC[row_R]


@dataclass(frozen=True, slots=True)
class _Rows:
    """What the operator needs beside the vectors."""

    positive_MP: Tensor
    there_MP: Tensor
    offset_C: Tensor | None
    negative_C: Tensor | None
    own: _Own | None
    scale: float
    counted: int | None


class _InBatch(torch.autograd.Function):
    """The gradient is formed while a block's scores are at hand; three matrix products in all."""

    @staticmethod
    def forward(
        ctx: Any,
        query_MD: Tensor,
        key_CD: Tensor,
        rows: _Rows,
        wide: torch.dtype,
        narrow: torch.dtype,
    ) -> Tensor:
        M, C, P = len(query_MD), len(key_CD), rows.positive_MP.shape[1]
        need_query, need_key = ctx.needs_input_grad[:2]
        grad_query_MD = query_MD.new_empty(query_MD.shape, dtype=wide) if need_query else None
        grad_key_CD = key_CD.new_zeros(key_CD.shape, dtype=wide) if need_key else None
        grad_MP = query_MD.new_empty((M, P), dtype=wide)
        share = rows.scale / max(1, M)
        scores = Scores(key_CD.to(narrow), rows.negative_C, wide, M)
        loss = query_MD.new_zeros((), dtype=wide)
        for begin in range(0, M, scores.size):
            end = min(M, begin + scores.size)
            query_RD = query_MD[begin:end].to(wide) * rows.scale
            positive_RP = rows.positive_MP[begin:end]
            held_RPD = key_CD[positive_RP].to(wide)
            score_RP = torch.einsum("rd,rpd->rp", query_RD, held_RPD)
            if rows.offset_C is not None:
                score_RP += rows.offset_C[positive_RP]
            score_RP.masked_fill_(~rows.there_MP[begin:end], -torch.inf)

            score_RC = scores.block(query_RD)
            if rows.own is not None:
                score_RC.masked_fill_(rows.own.mask(begin, end), -torch.inf)
            score_RC.scatter_(1, positive_RP, -torch.inf)
            top_R1 = top(score_RC, 1)
            weight_RC = score_RC.sub_(top_R1).exp_()
            negative_R1 = weight_RC.sum(1, keepdim=True).log_() + top_R1
            numerator_R1 = score_RP.logsumexp(1, keepdim=True)
            if rows.counted is None:
                denominator_R1 = torch.logaddexp(negative_R1, numerator_R1)
                loss += functional.softplus(negative_R1 - numerator_R1).sum()
                pull_RP = -(score_RP - numerator_R1 + negative_R1 - denominator_R1).exp()
            else:
                inside_RP = score_RP[:, : rows.counted]
                denominator_R1 = torch.logaddexp(negative_R1, inside_RP.logsumexp(1, keepdim=True))
                loss += (denominator_R1 - numerator_R1).sum()
                pull_RP = -(score_RP - numerator_R1).exp()
                pull_RP[:, : rows.counted] += (inside_RP - denominator_R1).exp()
            grad_MP[begin:end] = pull_RP
            if not (need_query or need_key):
                continue
            push_R1 = (top_R1 - denominator_R1).exp()
            weight_RC = weight_RC.to(narrow)
            if grad_query_MD is not None:
                found_RD = (weight_RC @ scores.key_CD).to(wide).mul_(push_R1)
                found_RD += torch.einsum("rp,rpd->rd", pull_RP, held_RPD)
                grad_query_MD[begin:end] = found_RD.mul_(share)
            if grad_key_CD is not None:
                pushed_RD = query_RD.mul_(push_R1 / max(1, M))
                add_product(grad_key_CD, weight_RC.T, pushed_RD, narrow)
        if grad_key_CD is not None:
            for p in range(P):
                pulled_MD = grad_MP[:, p, None] * query_MD * share
                grad_key_CD += torch.ops.aten.embedding_dense_backward(
                    pulled_MD.to(wide), rows.positive_MP[:, p], C, -1, False
                )
        ctx.save_for_backward(as_kind(grad_query_MD, query_MD), as_kind(grad_key_CD, key_CD))
        return loss / max(1, M)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *times(ctx.saved_tensors, grad), None, None, None
