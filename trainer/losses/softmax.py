"""Softmax cross-entropy over the catalogue, exact and in bounded memory.

Legend: M rows (predicted positions), N items, K of them, D width,
P pairs of a row and an item of its history.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from trainer.config import AUTO
from trainer.data.batches import Batch
from trainer.data.negative_sampling import draw_others
from trainer.distributed import global_mean_rows
from trainer.losses.base import DrawnItems, HistoryPairs, ItemVectors, Loss, Targets

_BLOCK_BYTES = 2 * 2**20  # logits of one block of rows: they stay in a core's cache
_FEWEST_ROWS = 192  # with fewer rows, matrix products lose more than the cache gains


def cross_entropy_reference(
    query_MD: Tensor,
    item_ND: Tensor,
    target_M: Tensor,
    scale: float = 1.0,
    bias_MN: Tensor | None = None,
) -> Tensor:
    """Return the mean cross-entropy, computed from all logits: the reference of tests.

    -1/M sum_m log( exp(scale q_m . i_t(m) + b_mt(m)) / sum_n exp(scale q_m . i_n + b_mn) )
    """
    logits_MN = scale * query_MD @ item_ND.T
    if bias_MN is not None:
        logits_MN = logits_MN + bias_MN
    return functional.cross_entropy(logits_MN, target_M)


@dataclass(frozen=True, kw_only=True, slots=True)
class HistoryBias:
    """A bias on the logits of the items of each row's history."""

    bias: Tensor
    """Scalar, added to the logits."""
    pairs: HistoryPairs
    """The rows, and the columns of their history, in the place of items."""


def full_softmax(
    query_MD: Tensor,
    item_ND: Tensor,
    target_M: Tensor,
    scale: float = 1.0,
    history: HistoryBias | None = None,
) -> Tensor:
    """Return the mean cross-entropy of a softmax over all items, without storing all logits.

    The loss of the Cloze task of MMSRec (arXiv:2304.13277) and of SASRec with cross-entropy.
    Rows are computed in blocks, and the gradient of a block while its logits are in memory, so the
    backward pass recomputes nothing. Equal to ``cross_entropy_reference`` up to rounding.

    Args:
        query_MD: (M, D) queries; float32, or bfloat16 for the matrix products.
        item_ND: (N, D) item vectors, same dtype.
        target_M: (M,) int64, the target item of each row.
        scale: Factor on the scores: 1 / temperature.
        history: Bias on the items of each row's history; ``None``: no bias.

    Returns:
        A scalar in float32; zero rows give zero. In one of several processes it is the share of
        the mean over all of their rows, see :mod:`trainer.distributed`.
    """
    rows = global_mean_rows(len(query_MD))
    bias, pairs = (None, None) if history is None else (history.bias, history.pairs)
    loss: Tensor = _FullSoftmax.apply(query_MD, item_ND, target_M, scale, rows or 1.0, bias, pairs)
    return loss


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidates(DrawnItems):
    """The items of a sampled softmax, without repetition, the targets first."""

    includes_targets = True

    target_M: Tensor
    """(M,) int64, the index in ``items_X`` of each row's target."""
    offset_X: Tensor
    """(X,) float32, added to the scores: 0 for targets; for drawn items the log of the number of
    items that are not targets divided by the number of drawn items."""
    history: HistoryPairs | None = None
    """The candidates among the items of each row's history, as indices in ``items_X``; ``None``
    without ``history_bias``."""

    def columns_of(self, pairs: HistoryPairs) -> HistoryPairs:
        """Return the pairs whose item is a candidate, with its index in ``items_X`` as the item.

        All tensors are on the CPU.
        """
        sorted_X, order_X = self.items_X.sort()
        place_P = torch.searchsorted(sorted_X, pairs.item_P).clamp_max(len(sorted_X) - 1)
        is_candidate_P = sorted_X[place_P] == pairs.item_P
        return HistoryPairs(
            row_P=pairs.row_P[is_candidate_P], item_P=order_X[place_P[is_candidate_P]]
        )


def draw_candidates(
    target_M: Tensor, n_items: int, most: int, generator: torch.Generator
) -> Candidates:
    """Draw the items of a sampled softmax: all targets, and others evenly without replacement.

    The expectation of the sum of exp(score + offset) over the candidates is the sum of exp(score)
    over the catalogue (Horvitz and Thompson, 1952).

    Args:
        target_M: (M,) int64, on the CPU.
        n_items: N.
        most: Largest number of candidates K; exceeded if needed to draw one item for two targets.
        generator: Generator on the CPU.

    Returns:
        The candidates, on the CPU. The costs are proportional to their number, not to N.
    """
    targets_K, where_M = target_M.unique(return_inverse=True)
    n_others = n_items - len(targets_K)
    count = min(n_others, max(most - len(targets_K), (len(targets_K) + 1) // 2))
    offset_K = torch.zeros(len(targets_K) + count)
    if count:
        offset_K[len(targets_K) :] = math.log(n_others / count)
    drawn = draw_others(targets_K, n_items, count, generator)
    return Candidates(items_X=torch.cat([targets_K, drawn]), target_M=where_M, offset_X=offset_K)


def part_softmax(
    query_MD: Tensor,
    item_KD: Tensor,
    part: Candidates,
    scale: float = 1.0,
    history: HistoryBias | None = None,
) -> Tensor:
    """Return the mean cross-entropy of a softmax over candidates that represent the catalogue.

    With all items as candidates it is :func:`full_softmax`, else an estimate of it.

    Args:
        query_MD: (M, D) queries; float32, or bfloat16 for the matrix products.
        item_KD: (K, D) vectors of ``part.items_X``, same dtype.
        part: The candidates.
        scale: Factor on the scores, not on the offsets: 1 / temperature.
        history: Bias on the candidates of each row's history, whose columns are indices of
            candidates; ``None``: no bias.
    """
    # The offset is one more coordinate of each item; the same coordinate of a query is 1 / scale.
    ones_M1 = query_MD.new_full((len(query_MD), 1), 1 / scale)
    query_ME = torch.cat([query_MD, ones_M1], 1)
    item_KE = torch.cat([item_KD, part.offset_X[:, None].to(item_KD.dtype)], 1)
    return full_softmax(query_ME, item_KE, part.target_M, scale, history)


class _FullSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query_MD: Tensor,
        item_ND: Tensor,
        target_M: Tensor,
        scale: float,
        mean: float,
        bias: Tensor | None,
        pairs: HistoryPairs | None,
    ) -> Tensor:
        rows, items = len(query_MD), len(item_ND)
        row_of_pair = None if pairs is None else pairs.on_host.row_P
        grad_bias = None if bias is None else torch.zeros_like(bias)
        loss = torch.zeros((), dtype=torch.float32, device=query_MD.device)
        need_query, need_item = ctx.needs_input_grad[:2]
        grad_query_MD = torch.zeros_like(query_MD) if need_query else None
        grad_item_ND = torch.zeros_like(item_ND, dtype=torch.float32) if need_item else None
        size = max(_FEWEST_ROWS, _BLOCK_BYTES // (4 * items))
        for begin in range(0, rows, size):
            query_BD = query_MD[begin : begin + size] * scale
            target_B1 = target_M[begin : begin + size, None]
            logits_BN = (query_BD @ item_ND.T).float()
            place = None
            if pairs is not None and row_of_pair is not None and bias is not None:
                ends = torch.tensor([begin, begin + len(query_BD)])
                first, last = torch.searchsorted(row_of_pair, ends).tolist()
                place = pairs.row_P[first:last] - begin, pairs.item_P[first:last]
                logits_BN[place] += bias
            hit_B1 = logits_BN.gather(1, target_B1)
            top_B1 = logits_BN.amax(1, keepdim=True)
            weights_BN = logits_BN.sub_(top_B1).exp_()
            total_B1 = weights_BN.sum(1, keepdim=True)
            loss += (total_B1.log() + top_B1 - hit_B1).sum()
            if not any(ctx.needs_input_grad):
                continue
            residual_BN = weights_BN.div_(total_B1)
            # p - 1 in float32: in bfloat16 its digits cancel where the model is confident.
            residual_BN.scatter_add_(1, target_B1, residual_BN.new_full(target_B1.shape, -1.0))
            if place is not None and grad_bias is not None:
                grad_bias += residual_BN[place].sum() / mean
            residual_BN = residual_BN.to(query_MD.dtype)
            if grad_query_MD is not None:
                grad_query_MD[begin : begin + size] = residual_BN @ item_ND * (scale / mean)
            if grad_item_ND is not None:
                grad_item_ND.addmm_(residual_BN.T.float(), query_BD.float(), alpha=1 / mean)
        ctx.save_for_backward(
            grad_query_MD,
            None if grad_item_ND is None else grad_item_ND.to(item_ND.dtype),
            grad_bias,
        )
        return loss / mean

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved: tuple[Tensor | None, ...] = ctx.saved_tensors
        query_MD, item_ND, bias = (None if g is None else g * grad for g in saved)
        return query_MD, item_ND, None, None, None, bias, None


class Softmax(Loss):
    """``loss=softmax``: cross-entropy over the catalogue, or over ``candidates`` of it."""

    reads = frozenset({"candidates"})
    learns_history_bias = True

    @property
    def needs_catalogue(self) -> bool:
        """True if ``candidates`` is 0, or ``auto``, which only a run replaces by a number."""
        return self.settings.candidates in (0, AUTO)

    def draw(self, targets: Targets, batch: Batch) -> Candidates | None:
        """Draw the candidates of the step, see :func:`draw_candidates`."""
        if self.needs_catalogue:
            return None
        n_items = batch.features.n_items - batch.train.hidden
        most = int(self.settings.candidates)
        on_host = targets.on_host
        drawn = draw_candidates(on_host.item_M, n_items, most, batch.generator)
        if on_host.history is not None:
            drawn = replace(drawn, history=drawn.columns_of(on_host.history))
        return drawn.to(batch.device)

    def forward(
        self,
        query_MD: Tensor,
        items: ItemVectors,
        targets: Targets,
        batch: Batch,
        drawn: DrawnItems | None,
    ) -> Tensor:
        """Return the loss; see :func:`full_softmax` and :func:`part_softmax`."""
        scale = self.settings.scale
        if drawn is None:
            history = self._history(targets.history)
            item_ND, hidden = items.vectors_KD, batch.train.hidden
            # A slice of all items would cost a copy of the gradient.
            shown_ND = item_ND[: len(item_ND) - hidden] if hidden else item_ND
            return full_softmax(query_MD, shown_ND, targets.item_M, scale, history)
        assert isinstance(drawn, Candidates)
        item_XD = items.gather(drawn.items_X)
        return part_softmax(query_MD, item_XD, drawn, scale, self._history(drawn.history))

    def _history(self, pairs: HistoryPairs | None) -> HistoryBias | None:
        if pairs is None or self.history_bias is None:
            return None
        return HistoryBias(bias=self.history_bias, pairs=pairs)
