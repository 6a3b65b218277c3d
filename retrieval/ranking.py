"""Exact full-catalogue ranks by counting, both with and without the seen items.

Shape suffixes: U users, B users of one block, N items, C items of one tile, D dimensions,
P pairs of a user and an item.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from retrieval.blocks import each_block, plain_fp32
from retrieval.exact_scores import (
    FP32_ROUNDOFF,
    FP64_ROUNDOFF,
    TargetScores,
    as_indices,
    as_numpy,
    check_targets,
)

if TYPE_CHECKING:
    import torch

    from retrieval.exact_scores import Indices, Matrix

_GROUP = 32  # columns that share one minimum when the close calls of a tile are looked for


@dataclass(frozen=True, kw_only=True, slots=True)
class SeenItems:
    """Items that each user has already met, as compressed rows (CSR)."""

    items: npt.NDArray[np.int64]
    """(nnz,) item of each entry; a user's own entries may repeat and need no order."""
    offsets: npt.NDArray[np.int64]
    """(U + 1,) user u owns items[offsets[u]:offsets[u + 1]]."""

    def __post_init__(self) -> None:
        """Refuse anything but well-formed compressed rows."""
        for name, values in (("items", self.items), ("offsets", self.offsets)):
            if not isinstance(values, np.ndarray) or values.dtype != np.int64 or values.ndim != 1:
                raise ValueError(f"seen {name} must be a one-dimensional int64 numpy array")
        if len(self.offsets) == 0 or self.offsets[0] != 0 or self.offsets[-1] != len(self.items):
            raise ValueError(f"seen offsets must run from 0 to {len(self.items)}, the entry count")
        if (np.diff(self.offsets) < 0).any():
            raise ValueError("seen offsets must not decrease")

    def __len__(self) -> int:
        """Number of users."""
        return len(self.offsets) - 1

    def check(self, users: int, items: int) -> None:
        """Raise ValueError unless this fits a matrix of users x items."""
        if len(self) != users:
            raise ValueError(f"exclude covers {len(self)} users but there are {users}")
        if len(self.items) and not 0 <= self.items.min() <= self.items.max() < items:
            low, high = self.items.min(), self.items.max()
            raise ValueError(f"exclude holds items {low}..{high}, outside 0..{items - 1}")

    def take(self, users: npt.NDArray[np.int64]) -> SeenItems:
        """The rows of these users, in this order."""
        starts, lengths = self.offsets[users], np.diff(self.offsets)[users]
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        inside = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
        return SeenItems(items=self.items[np.repeat(starts, lengths) + inside], offsets=offsets)

    def pairs(
        self, start: int, stop: int, items: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Distinct (row, item) of the users start..stop-1, sorted; row 0 is user `start`."""
        lengths = np.diff(self.offsets[start : stop + 1])
        rows = np.repeat(np.arange(len(lengths)), lengths)
        keys = np.unique(rows * items + self.items[self.offsets[start] : self.offsets[stop]])
        return keys // items, keys % items


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """Rank of each user's target, from 1; ties count against the model."""

    kept: npt.NDArray[np.int64]
    """(U,) among the whole catalogue."""
    filtered: npt.NDArray[np.int64]
    """(U,) with the user's seen items taken out; the target itself always stays."""


def rank(
    queries: Matrix,
    items: Matrix,
    targets: Indices,
    exclude: SeenItems | None = None,
    *,
    block: tuple[int, int] | None = None,
) -> Ranks:
    """Rank each user's target among all items by inner product, exactly, from one scoring pass.

    rank = 1 + the number of other items that score at least as much as the target. The fp32 matrix
    product decides every pair that its error bound allows it to decide; the rest (in general a few
    in 10,000) are compared as float64 inner products of the fp32 vectors, summed in a fixed order.
    So the ranks depend neither on the block, nor on the threads, the BLAS or the device.

    Args:
        queries: (U, D) fp32, torch on any device or numpy.
        items: (N, D) fp32, on the same device.
        targets: (U,) the item that each user really took.
        exclude: Items that the filtered rank leaves out; none when None.
        block: Users and items of one tile of scores; memory is a few such tiles to a thread.

    Raises:
        ValueError: Shapes, dtypes, devices, targets or excluded items that do not fit, vectors
            with NaN or infinity, or scores beyond fp32.
    """
    import torch

    contest = TargetScores(queries, items, targets)
    users, count = len(contest.query_UD), len(contest.item_ND)
    if exclude is not None:
        exclude.check(users, count)
    if block is None:
        share = -(-users // torch.get_num_threads())
        block = (min(512, max(64, share)), 4096)
        if contest.device.type != "cpu":
            block = (4096, 32768)
    if min(block) < 1:
        raise ValueError(f"block is {block}: both sides must be at least 1")
    width = min(block[1], count, 2**24)  # flags are added up in fp32, exact up to here
    above_U = torch.zeros(users, dtype=torch.int64, device=contest.device)
    seen_above_U = torch.zeros_like(above_U)

    def count_block(part: slice) -> None:
        seen = seen_pairs(exclude, part, count, contest.device)
        scratch = torch.empty((part.stop - part.start) * width, device=contest.device)
        for low in range(0, count, width):
            tile = slice(low, min(low + width, count))
            above_B, seen_above_B = _count_tile(contest, part, tile, seen, scratch)
            above_U[part] += above_B
            seen_above_U[part] += seen_above_B

    with plain_fp32(contest.device):
        each_block(count_block, users, block[0], contest.device)
    kept = 1 + above_U.cpu().numpy()
    return Ranks(kept=kept, filtered=kept - seen_above_U.cpu().numpy())


def seen_pairs(
    exclude: SeenItems | None, users: slice, items: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct (row in the block of users, item) to leave out, on the device."""
    import torch

    if exclude is None:
        nothing = torch.zeros(0, dtype=torch.int64, device=device)
        return nothing, nothing
    row, item = exclude.pairs(users.start, users.stop, items)
    return torch.from_numpy(row).to(device), torch.from_numpy(item).to(device)


def _count_tile(
    contest: TargetScores,
    users: slice,
    tile: slice,
    seen: tuple[torch.Tensor, torch.Tensor],
    scratch: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(B,) items of the tile at or above each target, and (B,) the seen ones among them.

    `scratch` (>= B * C,) sets the precision of the product, and saves fresh memory for each tile.
    """
    import torch

    dtype = scratch.dtype
    query_BD, item_CD = contest.query_UD[users].to(dtype), contest.item_ND[tile].to(dtype)
    shape = len(query_BD), len(item_CD)
    score_BC = scratch[: shape[0] * shape[1]].view(shape)
    torch.mm(query_BD, item_CD.T, out=score_BC)
    # The target neither is above itself nor can be seen.
    target_B = contest.target_U[users]
    own_row = ((target_B >= tile.start) & (target_B < tile.stop)).nonzero()[:, 0]
    score_BC[own_row, target_B[own_row] - tile.start] = -torch.inf
    roundoff = FP32_ROUNDOFF if dtype == torch.float32 else FP64_ROUNDOFF
    longest = contest.item_length_N[tile].max()
    margin_B = contest.margin(users, longest, roundoff).to(dtype)
    above_B, row, column = _compare(score_BC, contest.score_U[users].to(dtype), margin_B)
    many = len(row) > 1024 + score_BC.numel() // 64
    if many and dtype == torch.float32:
        # Vectors that have all but collapsed onto one another: float64 settles most of it.
        return _count_tile(
            contest, users, tile, seen, torch.empty_like(scratch, dtype=torch.float64)
        )

    above_B += _settled(contest, users, row, column + tile.start, many)
    here = (seen[1] >= tile.start) & (seen[1] < tile.stop)
    seen_row, seen_item = seen[0][here], seen[1][here]
    ahead = score_BC[seen_row, seen_item - tile.start]  # by now less the target's score
    seen_above_B = torch.bincount(seen_row[ahead > margin_B[seen_row]], minlength=len(above_B))
    close = ahead.abs() <= margin_B[seen_row]
    seen_above_B += _settled(contest, users, seen_row[close], seen_item[close], many)
    return above_B, seen_above_B


def _compare(
    score_BC: torch.Tensor, target_score_B: torch.Tensor, margin_B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Subtract the target's score in place; count what is above, list what is too close to call.

    Returns:
        (B,) number of columns beyond the margin, and the rows and columns within it.
    """
    import torch

    rows, columns = score_BC.shape
    width = columns // _GROUP
    above_B = torch.empty(rows, dtype=torch.int64, device=score_BC.device)
    least_BK = score_BC.new_empty(rows, width)
    # A few rows at a time stay in a core's own cache through all the passes.
    step = max(1, 2**17 // columns) if score_BC.device.type == "cpu" else rows
    work = score_BC.new_empty(min(step, rows), columns)
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        ahead, spare = score_BC[part], work[: part.stop - part.start]
        ahead.sub_(target_score_B[part, None])
        # Column g * width + k belongs to group k: one minimum for all g, along whole vectors.
        torch.abs(ahead, out=spare)
        least_BK[part] = spare[:, : _GROUP * width].unflatten(1, (_GROUP, width)).amin(1)
        # Flags as floats are added up several times faster than booleans.
        above_B[part] = torch.gt(ahead, margin_B[part, None], out=spare).sum(1)
    row_Q, group_Q = (least_BK <= margin_B[:, None]).nonzero(as_tuple=True)
    member_QG = score_BC[:, : _GROUP * width].unflatten(1, (_GROUP, width))[row_Q, :, group_Q]
    near_Q, member = (member_QG.abs_() <= margin_B[row_Q, None]).nonzero(as_tuple=True)
    rest_BC = score_BC[:, _GROUP * width :].abs()
    rest_row, rest = (rest_BC <= margin_B[:, None]).nonzero(as_tuple=True)
    row = torch.cat([row_Q[near_Q], rest_row])
    return above_B, row, torch.cat([member * width + group_Q[near_Q], rest + _GROUP * width])


def _settled(
    contest: TargetScores, users: slice, row_P: torch.Tensor, item_P: torch.Tensor, many: bool
) -> torch.Tensor:
    """(B,) how many of the close pairs are at or above the target, by their canonical scores."""
    import torch

    user_P = row_P + users.start
    if many:
        # Items that share the target's vector tie with it, whatever the query.
        same_P = contest.vector_N[item_P] == contest.vector_N[contest.target_U[user_P]]
        other_P = (~same_P).nonzero()[:, 0]
        same_P[other_P] = contest.at_least(user_P[other_P], item_P[other_P])
        counted_P = row_P[same_P]
    else:
        counted_P = row_P[contest.at_least(user_P, item_P)]
    return torch.bincount(counted_P, minlength=users.stop - users.start)


def rank_static(
    scores: npt.NDArray[np.generic] | torch.Tensor,
    targets: Indices,
    exclude: SeenItems | None = None,
) -> Ranks:
    """Rank each user's target by a score that is the same for everybody, such as popularity.

    One sort of the N scores; the scores are compared as they are, in their own dtype.

    Args:
        scores: (N,) integers or floats, higher is better.
        targets: (U,) the item that each user really took.
        exclude: Items that the filtered rank leaves out; none when None.

    Raises:
        ValueError: Shapes, targets or excluded items that do not fit, or a score that is NaN or
            infinite.
    """
    score_N: npt.NDArray[Any] = as_numpy(scores)
    if score_N.ndim != 1 or score_N.dtype.kind not in "iuf" or not len(score_N):
        raise ValueError(f"scores are {score_N.dtype} of shape {score_N.shape}: expected (N,) real")
    if not np.isfinite(score_N).all():
        raise ValueError("scores hold NaN or infinity")
    target_U = as_indices("targets", targets)
    users, count = len(target_U), len(score_N)
    check_targets(target_U, users, count)
    score_U = score_N[target_U]
    kept = count - np.searchsorted(np.sort(score_N), score_U, side="left")
    filtered = kept.copy()
    if exclude is not None:
        exclude.check(users, count)
        step = 65536  # users whose seen items are sorted at once
        for start in range(0, users, step):
            row, item = exclude.pairs(start, min(start + step, users), count)
            user = row + start
            above = (score_N[item] >= score_U[user]) & (item != target_U[user])
            part = slice(start, start + step)
            filtered[part] -= np.bincount(row[above], minlength=len(filtered[part]))
    return Ranks(kept=kept, filtered=filtered)
