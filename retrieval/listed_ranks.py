"""Ranks of targets in the lists of an approximate index.

Shape suffixes: U users, D dimensions, K items of a list.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from retrieval.exact_scores import as_matrix, check_targets
from retrieval.ranking import Ranks
from retrieval.seen_items import SeenItems
from retrieval.sparse_scores import SparseScores

if TYPE_CHECKING:
    from retrieval.exact_scores import Matrix
    from retrieval.indexes import Index, TopItems

LIST_LENGTH = 50
"""Items of a list: the largest default cut-off of the metrics."""


def rank_listed(
    index: Index,
    queries: Matrix,
    targets: npt.NDArray[np.int64],
    exclude: SeenItems | None = None,
    correction: SparseScores | None = None,
) -> Ranks:
    """Rank each user's target in the first 50 items that an index finds.

    rank = 1 + the number of other listed items that score at least as much as the target. A target
    that is not listed has the last place: its rank is the number of items, so that it counts as a
    miss at every cut-off up to 50. A target that the user has seen is not in the filtered ranking.

    Args:
        index: The index over N items.
        queries: (U, D) fp32.
        targets: (U,) the item that each user interacted with.
        exclude: Items that the filtered rank leaves out; none when None.
        correction: Scores that are added to the inner products; none when None.

    Raises:
        ValueError: As `retrieval.indexes.Index.search`, or a target is not an item.
    """
    check_targets(targets, len(as_matrix("queries", queries)), index.item_count)
    kept = _places(index.search(queries, LIST_LENGTH, None, correction), targets)
    filtered = kept
    if exclude is not None:
        filtered = _places(index.search(queries, LIST_LENGTH, exclude, correction), targets)
    last = index.item_count
    kept, filtered = (np.where(places == 0, last, places) for places in (kept, filtered))
    return Ranks.of(kept, filtered, targets, exclude)


def _places(top: TopItems, targets: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the place of each target in its list, after equal scores; 0 if it is not listed."""
    scores_UK, items_UK = top
    is_target_UK = items_UK == targets[:, None]
    target_score_U = np.where(is_target_UK, scores_UK, -np.inf).max(axis=1, initial=-np.inf)
    is_above_UK = (scores_UK >= target_score_U[:, None]) & (items_UK >= 0)
    return np.where(is_target_UK.any(axis=1), is_above_UK.sum(axis=1), 0)
