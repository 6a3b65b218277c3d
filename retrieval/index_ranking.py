"""Exact ranks with the help of an index.

Shape suffixes: U users, B users of one block, F fetched candidates, P pairs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from retrieval.blocks import for_each_block, strict_fp32
from retrieval.exact_scores import FP32_ROUNDOFF, TargetScores, as_indices
from retrieval.indexes import LONGEST_LIST, FaissIndex, find_index
from retrieval.pairs import CorrectedPairs, contains, corrected_pairs, most_pairs, seen_pairs
from retrieval.ranking import Ranks, rank
from retrieval.seen_items import SeenItems
from retrieval.sparse_scores import SparseScores

if TYPE_CHECKING:
    from retrieval.exact_scores import Indices, Matrix
    from retrieval.pairs import Pairs

_CUTOFF = 50  # the deepest cut-off among the metrics' defaults


def rank_with(
    index: str,
    queries: Matrix,
    items: Matrix,
    targets: Indices,
    exclude: SeenItems | None = None,
    correction: SparseScores | None = None,
) -> Ranks:
    """Return the ranks of `retrieval.ranking.rank`, with the help of an index: always the same.

    `torch` counts, as `rank` does. `faiss` fetches the top of each user's list: 50 items, the
    deepest of the default cut-offs, plus those that the user may have seen or that a correction
    lowers (at most 2,048 in all). Corrected items are compared with the target directly. When the
    last item fetched scores below the target by more than the error bound, the target's rank can be
    read off the list, with close pairs decided by canonical scores as in `rank`. Every other user's
    target is ranked by `rank` itself: FAISS saves no work for those, it only adds some, so the
    better the model, the more it helps.

    Raises:
        ValueError: An unknown index, and the errors of `rank`.
    """
    if find_index(index) is not FaissIndex:
        return rank(queries, items, targets, exclude, correction=correction)
    target_scores = TargetScores(queries, items, targets, correction)
    users, count = len(target_scores.query_UD), len(target_scores.item_ND)
    if exclude is not None:
        exclude.check(users, count)
    flat = FaissIndex(target_scores.item_ND)
    kept, filtered = np.zeros(users, np.int64), np.zeros(users, np.int64)

    def read_block(part: slice) -> None:
        seen = seen_pairs(exclude, part, count, target_scores.device)
        corrected = corrected_pairs(correction, part, seen, count, target_scores.target_U)
        kept[part], filtered[part] = _read_off(target_scores, flat, part, seen, corrected)

    with strict_fp32(target_scores.device):
        for_each_block(read_block, users, 1024, target_scores.device)
    left = np.flatnonzero(kept == 0)
    if len(left):
        counted = rank(
            target_scores.query_UD[left],
            target_scores.item_ND,
            as_indices("targets", targets)[left],
            exclude.take(left) if exclude is not None else None,
            correction=correction.take(left) if correction is not None else None,
        )
        kept[left], filtered[left] = counted.kept, counted.filtered
    return Ranks(kept=kept, filtered=filtered)


def _read_off(
    target_scores: TargetScores,
    flat: FaissIndex,
    users: slice,
    seen: Pairs,
    corrected: CorrectedPairs | None,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return (B,) kept and (B,) filtered ranks; 0 where the list ends before the target's place."""
    import torch

    count = len(target_scores.item_ND)
    may_lead = seen if corrected is None else corrected.with_seen(seen, corrected.value < 0)
    fetch = min(count, LONGEST_LIST, _CUTOFF + most_pairs(may_lead[0]))
    score_BF, item_BF = flat.fetch(target_scores.query_UD[users], fetch)
    ahead_BF = score_BF.double() - target_scores.score_U[users, None]
    margin_B = target_scores.margin(users, target_scores.item_length_N.max(), FP32_ROUNDOFF)[
        :, None
    ]
    closed_B = (ahead_BF[:, -1:] < -margin_B)[:, 0]
    if fetch == count:
        closed_B = torch.ones_like(closed_B)
    rival_BF = (item_BF != target_scores.target_U[users, None]) & closed_B[:, None]
    if corrected is not None:
        rival_BF &= ~contains((corrected.row, corrected.item), item_BF, count)
    above_BF = (ahead_BF > margin_B) & rival_BF
    row_P, column_P = ((ahead_BF.abs() <= margin_B) & rival_BF).nonzero(as_tuple=True)
    above_BF[row_P, column_P] = target_scores.at_least(
        row_P + users.start, item_BF[row_P, column_P]
    )
    above_B = above_BF.sum(1)
    seen_above_B = (above_BF & contains(seen, item_BF, count)).sum(1)
    if corrected is not None:
        pairs = corrected.where(closed_B[corrected.row])
        above_P = target_scores.at_least(pairs.row + users.start, pairs.item, pairs.value)
        above_B += pairs.row[above_P].bincount(minlength=len(above_B))
        seen_above_B += pairs.row[above_P & pairs.is_seen].bincount(minlength=len(above_B))
    kept_B = (1 + above_B) * closed_B
    return kept_B.cpu().numpy(), (kept_B - seen_above_B).cpu().numpy()
