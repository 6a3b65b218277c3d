"""Compute exact ranks, and the lists of the best items, with an index.

Shape suffixes: U users, B users of one block, F fetched candidates, P pairs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from retrieval.blocks import for_each_block, strict_fp32
from retrieval.exact_scores import FP32_ROUNDOFF, TargetScores, as_indices
from retrieval.indexes import LONGEST_LIST, SPARE, FaissIndex, TopLists, find_index
from retrieval.pairs import CorrectedPairs, contains, corrected_pairs, most_pairs, seen_pairs
from retrieval.ranking import Ranks, rank
from retrieval.seen_items import SeenItems
from retrieval.sparse_scores import SparseScores

if TYPE_CHECKING:
    import torch

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
    return _rank_by_lists(queries, items, targets, 0, exclude, correction)[0]


def rank_and_list(
    index: str,
    queries: Matrix,
    items: Matrix,
    targets: Indices,
    k: int,
    exclude: SeenItems | None = None,
    correction: SparseScores | None = None,
) -> tuple[Ranks, TopLists]:
    """Return the ranks of `rank_with`, and the k best items of each user.

    With `faiss`, both come from the same fetched items. Other indexes search for the lists after
    the ranks. The lists are those of `retrieval.indexes.Index.search`, for every index.

    Args:
        index: Name in `retrieval.indexes.INDEXES`.
        queries: (U, D) fp32.
        items: (N, D) fp32, on the same device.
        targets: (U,) the item that each user interacted with. Lists do not depend on it.
        k: Length of a list, at least 1.
        exclude: Items that the filtered rank and list leave out; none when None.
        correction: Scores that are added to the inner products; none when None.

    Raises:
        ValueError: As `rank_with`.
    """
    if find_index(index) is FaissIndex:
        return _rank_by_lists(queries, items, targets, k, exclude, correction)
    ranks = rank(queries, items, targets, exclude, correction=correction)
    made = find_index(index)(items)
    kept = made.search(queries, k, None, correction)[1]
    filtered = kept if exclude is None else made.search(queries, k, exclude, correction)[1]
    return ranks, TopLists(kept=kept, filtered=filtered)


def _rank_by_lists(
    queries: Matrix,
    items: Matrix,
    targets: Indices,
    k: int,
    exclude: SeenItems | None,
    correction: SparseScores | None,
) -> tuple[Ranks, TopLists]:
    """Return ranks and lists of k items from the top of each user's list that FAISS fetches."""
    target_scores = TargetScores(queries, items, targets, correction)
    target_U = as_indices("targets", targets)
    users, count = len(target_scores.query_UD), len(target_scores.item_ND)
    if exclude is not None:
        exclude.check(users, count)
    faiss_index = FaissIndex(target_scores.item_ND)
    lists = TopLists.empty(users, k)
    kept, seen_above = np.zeros(users, np.int64), np.zeros(users, np.int64)

    def rank_block(part: slice) -> None:
        seen = seen_pairs(exclude, part, count, target_scores.device)
        corrected = corrected_pairs(correction, part, seen, count)
        fetched = _fetch(faiss_index, target_scores.query_UD[part], k, seen, corrected)
        if k:
            _write_lists(target_scores, faiss_index, part, fetched, (seen, corrected), lists)
        if corrected is not None:
            target_B = target_scores.target_U[part]
            corrected = corrected.where(corrected.item != target_B[corrected.row])
        kept[part], seen_above[part] = _ranks_from_lists(
            target_scores, fetched, part, seen, corrected
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
        kept[unranked], seen_above[unranked] = counted.kept, counted.kept - counted.filtered
    return Ranks.of(kept, seen_above, target_U, exclude), lists


def _fetch(
    faiss_index: FaissIndex,
    query_BD: torch.Tensor,
    k: int,
    seen: Pairs,
    corrected: CorrectedPairs | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fetch the top of the list of each user of a block: (B, F) scores and (B, F) items."""
    may_lead = seen if corrected is None else corrected.with_seen(seen, corrected.value < 0)
    length = max(_CUTOFF, k + SPARE) + most_pairs(may_lead[0])
    return faiss_index.fetch(query_BD, min(len(faiss_index.item_ND), LONGEST_LIST, length))


def _write_lists(
    target_scores: TargetScores,
    faiss_index: FaissIndex,
    users: slice,
    fetched: tuple[torch.Tensor, torch.Tensor],
    pairs: tuple[Pairs, CorrectedPairs | None],
    lists: TopLists,
) -> None:
    """Write the best items of a block of users into both lists."""
    import torch

    seen, corrected = pairs
    query_BD, length_B = target_scores.query_UD[users], target_scores.query_length_U[users]
    none = (seen[0][:0], seen[1][:0])
    unseen = corrected
    if corrected is not None:
        unseen = replace(corrected, is_seen=torch.zeros_like(corrected.is_seen))
    for left_out, rivals, items in (
        (none, unseen, lists.kept), (seen, corrected, lists.filtered)
    ):  # fmt: skip
        if rivals is not None:
            left_out = rivals.with_seen(left_out)
        candidates = faiss_index.select(*fetched, left_out)
        scores = np.empty_like(items[users], np.float32)
        faiss_index.write_best(
            query_BD, length_B, candidates, left_out, rivals, (scores, items[users])
        )


def _ranks_from_lists(
    target_scores: TargetScores,
    fetched: tuple[torch.Tensor, torch.Tensor],
    users: slice,
    seen: Pairs,
    corrected: CorrectedPairs | None,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return (B,) kept ranks and (B,) seen items above; 0 where the list does not decide them."""
    import torch

    count = len(target_scores.item_ND)
    score_BF, item_BF = fetched
    ahead_BF = score_BF.double() - target_scores.score_U[users, None]
    margin_B = target_scores.margin(users, target_scores.item_length_N.max(), FP32_ROUNDOFF)[
        :, None
    ]
    is_decided_B = (ahead_BF[:, -1:] < -margin_B)[:, 0]
    if score_BF.shape[1] == count:
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
    return kept_B.cpu().numpy(), seen_above_B.cpu().numpy()
