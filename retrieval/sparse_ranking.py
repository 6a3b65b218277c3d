"""Compute exact ranks and lists by sparse scores: most scores are 0 and have no entry.

Shape suffixes: U users, B users of one block, N items, P entries, Q pairs of a user and a seen
item, K items of a list.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from retrieval.compressed_rows import Ints
from retrieval.exact_scores import as_indices, check_targets
from retrieval.ranking import Ranks
from retrieval.seen_items import SeenItems
from retrieval.sparse_scores import SparseScores, Values

if TYPE_CHECKING:
    from retrieval.exact_scores import Indices

    ScoreRows: TypeAlias = Callable[[slice], SparseScores]

_BLOCK = 2048  # users whose entries are in memory


def rank_sparse(
    score: ScoreRows,
    targets: Indices,
    items: int,
    exclude: SeenItems | None = None,
    *,
    block: int = _BLOCK,
) -> Ranks:
    """Rank each user's target among all items by sparse scores, in time linear in the entries.

    rank = 1 + the number of other items that score at least as much as the target. An item without
    an entry scores 0. The scores are compared in float64.

    Args:
        score: Callback that returns the scores of a slice of users.
        targets: (U,) the item that each user interacted with.
        items: Number of items N.
        exclude: Items that the filtered rank leaves out; none when None.
        block: Number of users that the callback is asked for.

    Raises:
        ValueError: Targets, excluded items or scores do not fit users x items.

    Examples:
        >>> scores = SparseScores.from_dense(np.array([[0.5, 0.0, 0.25]]))
        >>> rank_sparse(lambda rows: scores, np.array([2]), 3).kept
        array([2])
    """
    target_U = as_indices("targets", targets)
    users = len(target_U)
    check_targets(target_U, users, items)
    if exclude is not None:
        exclude.check(users, items)
    kept, seen_above = np.empty(users, np.int64), np.zeros(users, np.int64)
    for start in range(0, users, block):
        rows = slice(start, min(start + block, users))
        scores, target_B = score(rows), target_U[rows]
        scores.check(len(target_B), items)
        row_P, item_P, value_P = scores.entries(0, len(target_B))
        target_value_B = scores.values_at(0, target_B)
        above_P = value_P >= target_value_B[row_P]
        without_entry_B = items - np.bincount(row_P, minlength=len(target_B))
        # The target is among the counted items, with an entry or without one.
        kept[rows] = np.bincount(row_P[above_P], minlength=len(target_B))
        kept[rows] += np.where(target_value_B <= 0, without_entry_B, 0)
        if exclude is not None:
            row_Q, item_Q = exclude.pairs(rows.start, rows.stop, items)
            value_Q = _values_of(row_P * items + item_P, value_P, row_Q * items + item_Q)
            above_Q = (value_Q >= target_value_B[row_Q]) & (item_Q != target_B[row_Q])
            seen_above[rows] = np.bincount(row_Q[above_Q], minlength=len(target_B))
    return Ranks.of(kept, kept - seen_above, target_U, exclude)


def top_sparse(
    score: ScoreRows,
    users: int,
    items: int,
    k: int,
    exclude: SeenItems | None = None,
    *,
    block: int = _BLOCK,
) -> Ints:
    """Return the k items with the highest sparse scores of each user.

    Items are in descending order of the score; items with equal scores are in ascending order of
    the item, as in `retrieval.indexes.Index.search`.

    Args:
        score: Callback that returns the scores of a slice of users.
        users: Number of users U.
        items: Number of items N.
        k: Items of a list.
        exclude: Items to leave out for each user; none when None.
        block: Number of users that the callback is asked for.

    Returns:
        (U, K) items; -1 after the last item of a list that is too short.

    Raises:
        ValueError: k is below 1, or excluded items or scores do not fit users x items.
    """
    if k < 1:
        raise ValueError(f"k is {k}: it must be at least 1")
    if exclude is not None:
        exclude.check(users, items)
    top_UK = np.full((users, k), -1, np.int64)
    for start in range(0, users, block):
        rows = slice(start, min(start + block, users))
        size = rows.stop - start
        scores = score(rows)
        scores.check(size, items)
        row_P, item_P, value_P = scores.entries(0, size)
        most_B = np.full(size, k)
        key_Q = np.zeros(0, np.int64)
        if exclude is not None:
            row_Q, item_Q = exclude.pairs(rows.start, rows.stop, items)
            key_Q = row_Q * items + item_Q
            most_B += np.bincount(row_Q, minlength=size)
        is_listed_P = _are_highest(scores, most_B) & (value_P > 0)
        row_P, item_P, value_P = row_P[is_listed_P], item_P[is_listed_P], value_P[is_listed_P]
        is_left_P = ~np.isin(row_P * items + item_P, key_Q)
        row_P, item_P = row_P[is_left_P], item_P[is_left_P]
        order_P = np.lexsort((item_P, -value_P[is_left_P], row_P))
        lengths_B = np.bincount(row_P, minlength=size)
        place_P = np.arange(len(row_P)) - np.repeat(np.cumsum(lengths_B) - lengths_B, lengths_B)
        is_top_P = place_P < k
        top_UK[start + row_P[is_top_P], place_P[is_top_P]] = item_P[order_P][is_top_P]
        for row in np.flatnonzero(lengths_B < k).tolist():
            own = None if exclude is None else exclude.take(np.array([start + row])).items
            left_out = np.zeros(0, np.int64) if own is None else own
            rest = _without_positive(scores.rows(row, row + 1), items, left_out, k - lengths_B[row])
            top_UK[start + row, lengths_B[row] : lengths_B[row] + len(rest)] = rest
    return top_UK


def _are_highest(scores: SparseScores, most_B: Ints) -> npt.NDArray[np.bool_]:
    """Return (P,) bool, True for the ``most_B`` highest entries of each row and for ties with them.

    A sort of these few entries is several times faster than a sort of all.
    """
    is_highest_P = np.ones(len(scores.values), bool)
    for row in np.flatnonzero(np.diff(scores.offsets) > most_B).tolist():
        entries = slice(scores.offsets[row], scores.offsets[row + 1])
        values = scores.values[entries]
        place = len(values) - most_B[row]
        is_highest_P[entries] = values >= np.partition(values, place)[place]
    return is_highest_P


def _without_positive(scores: SparseScores, items: int, left_out: Ints, most: int) -> Ints:
    """Return the first ``most`` items of one user whose score is 0 or below, in order."""
    other = np.concatenate([scores.items[scores.values != 0], left_out])
    zero = np.setdiff1d(np.arange(min(items, most + len(other))), other)
    is_negative = (scores.values < 0) & ~np.isin(scores.items, left_out)
    order = np.argsort(-scores.values[is_negative], kind="stable")  # the items ascend
    return np.concatenate([zero, scores.items[is_negative][order]])[:most]


def _values_of(key_P: Ints, value_P: Values, key_Q: Ints) -> Values:
    """Return the value of each of the keys Q, 0 without an entry; the keys P ascend."""
    if not len(key_P):
        return np.zeros(len(key_Q))
    place_Q = np.minimum(np.searchsorted(key_P, key_Q), len(key_P) - 1)
    return np.where(key_P[place_Q] == key_Q, value_P[place_Q], 0.0)
