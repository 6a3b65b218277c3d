"""Compute exact ranks with an index.

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

_CUTOFF = 50  # the largest default cut-off of the metrics


def rank_with(
    index: str,
    queries: Matrix,
    items: Matrix,
    targets: Indices,
    exclude: SeenItems | None = None,
    correction: SparseScores | None = None,
) -> Ranks:
    """Return the ranks that `retrieval.ranking.rank` returns, computed with an index.

    With `torch`, `rank` counts the items. With `faiss`, the index fetches the top of each user's
    list: 50 items, the largest of the default cut-offs, plus as many as one user has seen or a
    correction lowers (at most 2,048 in all). Corrected items are compared with the target directly.
    If the last fetched item scores below the target by more than the error bound, the list decides
    the target's rank, and canonical scores decide close pairs as in `rank`. The targets of all
    other users are ranked by `rank`. FAISS saves time only for users whose target is near the top.

    Args:
        index: Name in `retrieval.indexes.INDEXES`.
        queries: (U, D) fp32.
        items: (N, D) fp32, on the same device.
        targets: (U,) the item that each user interacted with.
        exclude: Items that the filtered rank leaves out; none when None.
        correction: Scores that are added to the inner products; none when None.

    Raises:
        ValueError: The index is unknown, or as `rank`.
    """
    if find_index(index) is not FaissIndex:
        return rank(queries, items, targets, exclude, correction=correction)
    target_scores = TargetScores(queries, items, targets, correction)
    target_U = as_indices("targets", targets)
    users, count = len(target_scores.query_UD), len(target_scores.item_ND)
    if exclude is not None:
        exclude.check(users, count)
    faiss_index = FaissIndex(target_scores.item_ND)
    kept, filtered = np.zeros(users, np.int64), np.zeros(users, np.int64)

    def rank_block(part: slice) -> None:
        seen = seen_pairs(exclude, part, count, target_scores.device)
        corrected = corrected_pairs(correction, part, seen, count, target_scores.target_U)
        kept[part], filtered[part] = _ranks_from_lists(
            target_scores, faiss_index, part, seen, corrected
        )

    with strict_fp32(target_scores.device):
        for_each_block(rank_block, users, 1024, target_scores.device)
    unranked = np.flatnonzero(kept == 0)
    if len(unranked):
        counted = rank(
            target_scores.query_UD[unranked],
            target_scores.item_ND,
            target_U[unranked],
            exclude.take(unranked) if exclude is not None else None,
            correction=correction.take(unranked) if correction is not None else None,
        )
        kept[unranked], filtered[unranked] = counted.kept, counted.filtered
    return Ranks.of(kept, filtered, target_U, exclude)


def _ranks_from_lists(
    target_scores: TargetScores,
    faiss_index: FaissIndex,
    users: slice,
    seen: Pairs,
    corrected: CorrectedPairs | None,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return (B,) kept and (B,) filtered ranks; 0 where the list does not decide the rank."""
    import torch

    count = len(target_scores.item_ND)
    may_lead = seen if corrected is None else corrected.with_seen(seen, corrected.value < 0)
    fetch = min(count, LONGEST_LIST, _CUTOFF + most_pairs(may_lead[0]))
    score_BF, item_BF = faiss_index.fetch(target_scores.query_UD[users], fetch)
    ahead_BF = score_BF.double() - target_scores.score_U[users, None]
    margin_B = target_scores.margin(users, target_scores.item_length_N.max(), FP32_ROUNDOFF)[
        :, None
    ]
    is_decided_B = (ahead_BF[:, -1:] < -margin_B)[:, 0]
    if fetch == count:
        is_decided_B = torch.ones_like(is_decided_B)
    is_rival_BF = (item_BF != target_scores.target_U[users, None]) & is_decided_B[:, None]
    if corrected is not None:
        is_rival_BF &= ~contains((corrected.row, corrected.item), item_BF, count)
    above_BF = (ahead_BF > margin_B) & is_rival_BF
    row_P, column_P = ((ahead_BF.abs() <= margin_B) & is_rival_BF).nonzero(as_tuple=True)
    above_BF[row_P, column_P] = target_scores.at_least(
        row_P + users.start, item_BF[row_P, column_P]
    )
    above_B = above_BF.sum(1)
    seen_above_B = (above_BF & contains(seen, item_BF, count)).sum(1)
    if corrected is not None:
        pairs = corrected.where(is_decided_B[corrected.row])
        above_P = target_scores.at_least(pairs.row + users.start, pairs.item, pairs.value)
        above_B += pairs.row[above_P].bincount(minlength=len(above_B))
        seen_above_B += pairs.row[above_P & pairs.is_seen].bincount(minlength=len(above_B))
    kept_B = (1 + above_B) * is_decided_B
    return kept_B.cpu().numpy(), (kept_B - seen_above_B).cpu().numpy()
