"""Compute exact ranks in the full catalogue by counting, with seen items kept and filtered.

Shape suffixes: U users, B users of one block, N items, C items of one tile, D dimensions,
P pairs of a user and an item, Q pairs of a user and a group of columns, G columns of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from retrieval.blocks import for_each_block, strict_fp32
from retrieval.exact_scores import (
    FP32_ROUNDOFF,
    FP64_ROUNDOFF,
    TargetScores,
)
from retrieval.metrics import UNRANKED
from retrieval.pairs import CorrectedPairs, Pairs, corrected_pairs, seen_pairs
from retrieval.seen_items import SeenItems
from retrieval.sparse_scores import SparseScores

if TYPE_CHECKING:
    import torch

    from retrieval.exact_scores import Indices, Matrix

_GROUP = 32  # columns that share one minimum in the search for the close pairs of a tile


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """Rank of each user's target, from 1; ties count against the model."""

    kept: npt.NDArray[np.int64]
    """(U,) rank among all items."""
    filtered: npt.NDArray[np.int64]
    """(U,) rank among the items that the user has not seen; `retrieval.metrics.UNRANKED` if the
    user has seen the target."""

    @classmethod
    def of(
        cls,
        kept: npt.NDArray[np.int64],
        filtered: npt.NDArray[np.int64],
        targets: npt.NDArray[np.int64],
        exclude: SeenItems | None,
    ) -> Ranks:
        """Return both ranks of each target.

        Args:
            kept: (U,) ranks among all items.
            filtered: (U,) ranks without the seen items; those of seen targets do not count.
            targets: (U,) targets.
            exclude: Items that the filtered rank leaves out; none when None.
        """
        if exclude is not None:
            filtered = np.where(exclude.contain(targets), UNRANKED, filtered)
        return cls(kept=kept, filtered=filtered)

    @classmethod
    def concatenate(cls, parts: Sequence[Ranks]) -> Ranks:
        """Return the ranks of consecutive blocks of users."""
        none = [np.zeros(0, np.int64)]
        return cls(
            kept=np.concatenate([*none, *(part.kept for part in parts)]),
            filtered=np.concatenate([*none, *(part.filtered for part in parts)]),
        )


def rank(
    queries: Matrix,
    items: Matrix,
    targets: Indices,
    exclude: SeenItems | None = None,
    *,
    correction: SparseScores | None = None,
    block: tuple[int, int] | None = None,
) -> Ranks:
    """Rank each user's target among all items, exactly. Each pair is scored once in fp32.

    A score is an inner product plus the correction. rank = 1 + the number of other items that
    score at least as much as the target. A target among the excluded items is not in the filtered
    ranking: its filtered rank is `retrieval.metrics.UNRANKED`.

    The fp32 score decides a pair if it differs from the target's score by more than the error
    bound. Other pairs (in general a few in 10,000) are compared by canonical scores: float64 inner
    products of the fp32 vectors, summed in a fixed order, plus the float64 correction. The ranks
    therefore do not depend on the block, the threads, the BLAS or the device.

    Args:
        queries: (U, D) fp32, torch on any device or numpy.
        items: (N, D) fp32, on the same device.
        targets: (U,) the item that each user interacted with.
        exclude: Items that the filtered rank leaves out; none when None.
        correction: Scores that are added to the inner products; none when None.
        block: Users and items of one tile of scores; each thread has a few tiles in memory.

    Raises:
        ValueError: Shapes, dtypes, devices, targets, excluded or corrected items do not match, a
            vector has NaN or infinity, or scores can exceed the range of fp32.
    """
    target_scores = TargetScores(queries, items, targets, correction)
    return count_ranks(target_scores, exclude, correction, block)


def count_ranks(
    target_scores: TargetScores,
    exclude: SeenItems | None,
    correction: SparseScores | None,
    block: tuple[int, int] | None = None,
) -> Ranks:
    """Rank the targets of `target_scores` by counting; see `rank`."""
    import torch

    users, count = len(target_scores.query_UD), len(target_scores.item_ND)
    if exclude is not None:
        exclude.check(users, count)
    block = block or _default_block(users, target_scores.device)
    if min(block) < 1:
        raise ValueError(f"block is {block}: both sides must be at least 1")
    width = min(block[1], count, 2**24)  # `_compare` counts in fp32, which is exact up to 2**24
    above_U = torch.zeros(users, dtype=torch.int64, device=target_scores.device)
    seen_above_U = torch.zeros_like(above_U)

    def count_block(part: slice) -> None:
        seen = seen_pairs(exclude, part, count, target_scores.device)
        corrected = corrected_pairs(correction, part, seen, count, target_scores.target_U)
        scratch = torch.empty((part.stop - part.start) * width, device=target_scores.device)
        for low in range(0, count, width):
            tile = slice(low, min(low + width, count))
            above_B, seen_above_B = _count_tile(target_scores, part, tile, seen, corrected, scratch)
            above_U[part] += above_B
            seen_above_U[part] += seen_above_B

    with strict_fp32(target_scores.device):
        for_each_block(count_block, users, block[0], target_scores.device)
    kept = 1 + above_U.cpu().numpy()
    filtered = kept - seen_above_U.cpu().numpy()
    return Ranks.of(kept, filtered, target_scores.target_U.cpu().numpy(), exclude)


def _default_block(users: int, device: torch.device) -> tuple[int, int]:
    """Return the numbers of users and items of a tile that keep all CPU threads or the GPU busy."""
    import torch

    if device.type != "cpu":
        return 4096, 32768
    share = -(-users // torch.get_num_threads())
    return min(512, max(64, share)), 4096


def _count_tile(
    target_scores: TargetScores,
    users: slice,
    tile: slice,
    seen: Pairs,
    corrected: CorrectedPairs | None,
    scratch: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Count the items of a tile that score at least as much as each target.

    Args:
        target_scores: Scores of the targets.
        users: The block of B users.
        tile: The C items.
        seen: Distinct (row in the block, seen item).
        corrected: Corrected pairs of the block.
        scratch: At least B * C elements, reused for each tile; its dtype is that of the product.

    Returns:
        (B,) the number of these items, and (B,) the number of the seen items among them.
    """
    import torch

    dtype = scratch.dtype
    score_BC = _score_tile(target_scores, users, tile, scratch)
    roundoff = FP32_ROUNDOFF if dtype == torch.float32 else FP64_ROUNDOFF
    longest = target_scores.item_length_N[tile].max()
    margin_B = target_scores.margin(users, longest, roundoff)
    close = 0
    if corrected is not None:
        pairs = corrected.between(tile)
        above_P, close_P = _compare_corrected(target_scores, users, tile, pairs, score_BC, margin_B)
        close = int(close_P.sum())
    margin_B = margin_B.to(dtype)
    above_B, row, column = _compare(score_BC, target_scores.score_U[users].to(dtype), margin_B)
    many = len(row) + close > 1024 + score_BC.numel() // 64
    if many and dtype == torch.float32:
        # Many scores are close to the target's: the product in float64 decides most of the pairs.
        wide = torch.empty_like(scratch, dtype=torch.float64)
        return _count_tile(target_scores, users, tile, seen, corrected, wide)

    def count(row_P: torch.Tensor) -> torch.Tensor:
        return torch.bincount(row_P, minlength=len(above_B))

    above_B += count(row[_at_least(target_scores, users, row, column + tile.start, many)])
    in_tile = (seen[1] >= tile.start) & (seen[1] < tile.stop)
    seen_row, seen_item = seen[0][in_tile], seen[1][in_tile]
    ahead = score_BC[seen_row, seen_item - tile.start]  # `_compare` subtracted the target's score
    seen_above_B = count(seen_row[ahead > margin_B[seen_row]])
    near = ahead.abs() <= margin_B[seen_row]
    seen_row, seen_item = seen_row[near], seen_item[near]
    seen_above_B += count(seen_row[_at_least(target_scores, users, seen_row, seen_item, many)])
    if corrected is not None:
        pair = pairs.where(close_P)
        above_P[close_P] = _at_least(target_scores, users, pair.row, pair.item, many, pair.value)
        above_B += count(pairs.row[above_P])
        seen_above_B += count(pairs.row[above_P & pairs.is_seen])
    return above_B, seen_above_B


def _score_tile(
    target_scores: TargetScores, users: slice, tile: slice, scratch: torch.Tensor
) -> torch.Tensor:
    """Return the (B, C) inner products of a tile in `scratch`, with -inf for each target."""
    import torch

    query_BD = target_scores.query_UD[users].to(scratch.dtype)
    item_CD = target_scores.item_ND[tile].to(scratch.dtype)
    shape = len(query_BD), len(item_CD)
    score_BC = scratch[: shape[0] * shape[1]].view(shape)
    torch.mm(query_BD, item_CD.T, out=score_BC)
    # The target counts neither as an item above itself nor as a seen item.
    target_B = target_scores.target_U[users]
    own_row = ((target_B >= tile.start) & (target_B < tile.stop)).nonzero()[:, 0]
    score_BC[own_row, target_B[own_row] - tile.start] = -torch.inf
    return score_BC


def _compare_corrected(
    target_scores: TargetScores,
    users: slice,
    tile: slice,
    pairs: CorrectedPairs,
    score_BC: torch.Tensor,
    margin_B: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compare the corrected pairs of a tile with the target, and set their scores to -inf.

    The correction is added in float64, so that a large value does not round off the inner product.

    Returns:
        (P,) bool, True for a pair above the target by more than the margin, and (P,) bool, True for
        a pair within the margin.
    """
    import torch

    place = pairs.row, pairs.item - tile.start
    ahead_P = score_BC[place].double() + pairs.value - target_scores.score_U[users][pairs.row]
    score_BC[place] = -torch.inf
    # Twice the margin covers the float64 roundings that depend on the length of the vectors.
    margin_P = 2 * margin_B[pairs.row] + 8 * FP64_ROUNDOFF * pairs.value.abs()
    return ahead_P > margin_P, ahead_P.abs() <= margin_P


def _compare(
    score_BC: torch.Tensor, target_score_B: torch.Tensor, margin_B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Subtract the target's score in place, count the items above, and list the close items.

    Returns:
        (B,) number of columns above the margin, and the rows and columns of the pairs within the
        margin.
    """
    import torch

    rows, columns = score_BC.shape
    width = columns // _GROUP
    above_B = torch.empty(rows, dtype=torch.int64, device=score_BC.device)
    least_BK = score_BC.new_empty(rows, width)
    # A few rows at a time fit a core's cache, so that all passes over them are fast.
    step = max(1, 2**17 // columns) if score_BC.device.type == "cpu" else rows
    work = score_BC.new_empty(min(step, rows), columns)
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        ahead, spare = score_BC[part], work[: part.stop - part.start]
        ahead.sub_(target_score_B[part, None])
        # Column g * width + k belongs to group k, so that minima run along contiguous columns.
        torch.abs(ahead, out=spare)
        least_BK[part] = spare[:, : _GROUP * width].unflatten(1, (_GROUP, width)).amin(1)
        # Summing flags stored as floats is several times faster than summing booleans.
        above_B[part] = torch.gt(ahead, margin_B[part, None], out=spare).sum(1)
    row_Q, group_Q = (least_BK <= margin_B[:, None]).nonzero(as_tuple=True)
    member_QG = score_BC[:, : _GROUP * width].unflatten(1, (_GROUP, width))[row_Q, :, group_Q]
    near_Q, member = (member_QG.abs_() <= margin_B[row_Q, None]).nonzero(as_tuple=True)
    rest_BC = score_BC[:, _GROUP * width :].abs()
    rest_row, rest = (rest_BC <= margin_B[:, None]).nonzero(as_tuple=True)
    row = torch.cat([row_Q[near_Q], rest_row])
    return above_B, row, torch.cat([member * width + group_Q[near_Q], rest + _GROUP * width])


def _at_least(
    target_scores: TargetScores,
    users: slice,
    row_P: torch.Tensor,
    item_P: torch.Tensor,
    many: bool,
    value_P: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return (P,) bool, True for a close pair whose canonical score is at least the target's.

    With `many` pairs, no score is computed for items with the vector and correction of the target.
    """
    user_P = row_P + users.start
    if not many:
        return target_scores.at_least(user_P, item_P, value_P)
    above_P = target_scores.equals_target(user_P, item_P, value_P)
    rest = (~above_P).nonzero()[:, 0]
    rest_value = None if value_P is None else value_P[rest]
    above_P[rest] = target_scores.at_least(user_P[rest], item_P[rest], rest_value)
    return above_P
