"""Rank and search by scores that are not inner products.

A callback returns the scores, block by block: `score(rows, item_begin, item_end)` returns the
(B, C) scores of the users of the slice `rows` for the items item_begin..item_end-1. It is called
for all items of a slice of users, in the order of the items, before the next slice of users. The
callback can therefore cache what it computes for a slice of users. Scores are compared in the dtype
that the callback returns.

Shape suffixes: U users, B users of one block, N items, C items of one block, F fetched items,
K items returned, P pairs of a user and a seen item.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from retrieval.exact_scores import as_indices, check_targets
from retrieval.indexes import TopItems
from retrieval.pairs import seen_pairs
from retrieval.ranking import Ranks
from retrieval.seen_items import SeenItems

if TYPE_CHECKING:
    import torch

    from retrieval.exact_scores import Indices

    Scores: TypeAlias = torch.Tensor | npt.NDArray[np.floating] | npt.NDArray[np.integer]
    ScoreBlock: TypeAlias = Callable[[slice, int, int], Scores]

_SCORES_AT_ONCE = 2**25  # elements of the (B, N) scores of one block of users
_SPARE = 16  # items fetched beyond k, so that items with the k-th score are among them


def rank_scores(
    score: ScoreBlock,
    targets: Indices,
    items: int,
    exclude: SeenItems | None = None,
    *,
    block: tuple[int, int] | None = None,
) -> Ranks:
    """Rank each user's target among all items by the scores of a callback.

    rank = 1 + the number of other items that score at least as much as the target. Each score is
    computed once. The scores of one block of users are in memory: about 2^25 scores by default.

    Args:
        score: The callback; see the documentation of this module.
        targets: (U,) the item that each user interacted with.
        items: Number of items.
        exclude: Items that the filtered rank leaves out; none when None.
        block: Number of users that are ranked together, and of items per call of `score`.

    Raises:
        ValueError: Targets, excluded items or blocks are out of range, or scores are not a finite
            (B, C) matrix of real numbers.

    Examples:
        >>> scores = np.array([[0.1, 0.7, 0.7]])
        >>> rank_scores(lambda rows, begin, end: scores[rows, begin:end], np.array([1]), 3).kept
        array([2])
    """
    import torch

    target_U = as_indices("targets", targets)
    users = len(target_U)
    check_targets(target_U, users, items)
    if exclude is not None:
        exclude.check(users, items)
    kept, filtered = np.empty(users, np.int64), np.empty(users, np.int64)
    for rows, score_BN in _rows_of_scores(score, users, items, block):
        target_B = torch.from_numpy(target_U[rows].copy()).to(score_BN.device)
        target_score_B = score_BN.gather(1, target_B[:, None])
        above_B = (score_BN >= target_score_B).sum(1)  # the target itself is one of them
        row_P, item_P = seen_pairs(exclude, rows, items, score_BN.device)
        seen_P = (score_BN[row_P, item_P] >= target_score_B[row_P, 0]) & (item_P != target_B[row_P])
        seen_above_B = torch.bincount(row_P[seen_P], minlength=len(above_B))
        kept[rows] = above_B.cpu().numpy()
        filtered[rows] = (above_B - seen_above_B).cpu().numpy()
    return Ranks.of(kept, filtered, target_U, exclude)


def top_scores(
    score: ScoreBlock,
    users: int,
    items: int,
    k: int,
    exclude: SeenItems | None = None,
    *,
    block: tuple[int, int] | None = None,
) -> TopItems:
    """Return the k items with the highest scores of a callback for each user.

    Order: score descending, then item ascending. Memory is that of `rank_scores`.

    Args:
        score: The callback; see the documentation of this module.
        users: Number of users.
        items: Number of items.
        k: Items per user, at least 1.
        exclude: Items to leave out for each user; none when None.
        block: Number of users that are searched together, and of items per call of `score`.

    Returns:
        (U, k) fp32 scores and (U, k) int64 items. If fewer than k items are left for a user, the
        tail holds score -inf and item -1.

    Raises:
        ValueError: k, excluded items or blocks are out of range, or scores are not a finite (B, C)
            matrix of real numbers in the range of float32.

    Examples:
        >>> scores = np.array([[0.25, 0.75, 0.75]])
        >>> top_scores(lambda rows, begin, end: scores[rows, begin:end], 1, 3, 2)[1]
        array([[1, 2]])
    """
    import torch

    if k < 1:
        raise ValueError(f"k is {k}: it must be at least 1")
    if exclude is not None:
        exclude.check(users, items)
    top_scores_UK = np.full((users, k), -np.inf, np.float32)
    top_items_UK = np.full((users, k), -1, np.int64)
    width = min(k, items)
    for rows, score_BN in _rows_of_scores(score, users, items, block):
        if not (score_BN.abs() < 2.0**126).all():
            raise ValueError("scores are larger than float32 holds: scale down")
        score_BN[seen_pairs(exclude, rows, items, score_BN.device)] = -torch.inf
        score_BF, item_BF = score_BN.topk(min(k + _SPARE, items), dim=1)
        item_BF, by_item = item_BF.sort(1)
        score_BF, by_score = score_BF.gather(1, by_item).sort(dim=1, descending=True, stable=True)
        item_BF = item_BF.gather(1, by_score)
        # If the last fetched item has the k-th score, further items with that score may be missing.
        if score_BF.shape[1] < items:
            for row in (score_BF[:, -1] == score_BF[:, width - 1]).nonzero()[:, 0].tolist():
                order_N = score_BN[row].argsort(descending=True, stable=True)
                item_BF[row] = order_N[: item_BF.shape[1]]
        score_BK, item_BK = score_BF[:, :width], item_BF[:, :width]
        top_scores_UK[rows, :width] = score_BK.float().cpu().numpy()
        top_items_UK[rows, :width] = item_BK.masked_fill(score_BK == -torch.inf, -1).cpu().numpy()
    return top_scores_UK, top_items_UK


def _rows_of_scores(
    score: ScoreBlock, users: int, items: int, block: tuple[int, int] | None
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield each block of users and its (B, N) floating-point scores, which may be modified."""
    import torch

    if items < 1:
        raise ValueError("items are empty: there is nothing to rank")
    if block is None:
        block = (max(1, min(512, _SCORES_AT_ONCE // items)), 4096)
    if min(block) < 1:
        raise ValueError(f"block is {block}: both sides must be at least 1")
    for start in range(0, users, block[0]):
        rows = slice(start, min(start + block[0], users))
        score_BN: torch.Tensor | None = None
        for begin in range(0, items, block[1]):
            end = min(begin + block[1], items)
            score_BC = torch.as_tensor(score(rows, begin, end)).detach()
            if score_BC.shape != (rows.stop - start, end - begin) or score_BC.is_complex():
                raise ValueError(
                    f"scores of users {start}..{rows.stop - 1} and items {begin}..{end - 1} are "
                    f"{score_BC.dtype} of shape {tuple(score_BC.shape)}: expected real (B, C)"
                )
            if not torch.isfinite(score_BC).all():
                raise ValueError(
                    f"scores of users {start}..{rows.stop - 1} and items {begin}..{end - 1} hold "
                    "NaN or infinity"
                )
            if not score_BC.is_floating_point():
                score_BC = score_BC.double()
            if score_BN is None:
                score_BN = score_BC.new_empty((len(score_BC), items))
            score_BN[:, begin:end] = score_BC
        assert score_BN is not None
        yield rows, score_BN
