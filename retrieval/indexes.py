"""The index of torch, and what all indexes over a catalogue share: the best items of each query.

All exact indexes return the same bits. An index selects candidates by fp32 scores. An error bound
keeps the candidates that can be among the best, and canonical float64 scores
(`retrieval.exact_scores.exact_scores`) give their order.

Shape suffixes: U users, B users of one block, N items, D dimensions, F fetched candidates,
K items returned, P pairs of a user and an item, W corrected items per user.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from retrieval.blocks import for_each_block, strict_fp32
from retrieval.exact_scores import (
    FP32_ROUNDOFF,
    as_matrix,
    check_overflow,
    error_bound,
    exact_scores,
    row_norms,
)
from retrieval.pairs import CorrectedPairs, corrected_pairs, seen_pairs
from retrieval.seen_items import SeenItems
from retrieval.sparse_scores import SparseScores

if TYPE_CHECKING:
    import torch

    from retrieval.exact_scores import Matrix
    from retrieval.pairs import Pairs

TopItems = tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]
"""(U, k) scores, descending, and (U, k) items."""

_SPARE = 16  # candidates beyond k, so that items with nearly the k-th score are among them


class Index(Protocol):
    """A catalogue that returns the best items of a query."""

    @property
    def is_exact(self) -> bool:
        """False if the index can miss items."""
        ...

    @property
    def item_count(self) -> int:
        """Number of items N."""
        ...

    def search(
        self,
        queries: Matrix,
        k: int,
        exclude: SeenItems | None = None,
        correction: SparseScores | None = None,
    ) -> TopItems:
        """Return the k items with the highest scores of each query.

        An approximate index can miss some of them; the scores that it returns are exact.

        A score is the float64 inner product of the fp32 vectors, summed in a fixed order, plus the
        float64 correction. Items are in descending order of the score; items with equal scores are
        in ascending order of the item. The order does not depend on the index, the block, the
        threads or the device.

        Args:
            queries: (U, D) fp32.
            k: Items per query, at least 1.
            exclude: Items to leave out for each user; none when None.
            correction: Scores that are added to the inner products; none when None.

        Returns:
            (U, k) scores, rounded once to fp32, and (U, k) int64 items. If fewer than k items are
            left for a user, the tail holds score -inf and item -1.

        Raises:
            ValueError: Shapes, dtypes, excluded or corrected items do not match, a vector has NaN
                or infinity, or scores can exceed the range of fp32.
        """
        ...


class TorchIndex:
    """Index that finds candidates by matrix products, tile by tile, on the device of the items.

    A subclass that overrides `candidates` is exact if the bounds that it returns are correct.

    Args:
        items: (N, D) fp32, torch or numpy; not copied.

    Raises:
        ValueError: The items are empty, not a (N, D) fp32 matrix, or not finite.
    """

    is_exact = True

    def __init__(self, items: Matrix) -> None:
        self.item_ND = as_matrix("items", items)
        if not len(self.item_ND):
            raise ValueError("items are empty: there is nothing to search")
        self._longest_1 = row_norms("items", self.item_ND).max().reshape(1)

    @property
    def item_count(self) -> int:
        """Number of items N."""
        return len(self.item_ND)

    def search(
        self,
        queries: Matrix,
        k: int,
        exclude: SeenItems | None = None,
        correction: SparseScores | None = None,
    ) -> TopItems:
        """Return the k items with the highest scores of each query; see `Index.search`."""
        query_UD = as_matrix("queries", queries).to(self.item_ND.device)
        (users, dim), (count, item_dim) = query_UD.shape, self.item_ND.shape
        if dim != item_dim:
            raise ValueError(f"queries have {dim} dimensions but items have {item_dim}")
        if k < 1:
            raise ValueError(f"k is {k}: it must be at least 1")
        if exclude is not None:
            exclude.check(users, count)
        if correction is not None:
            correction.check(users, count)
        scores = np.full((users, k), -np.inf, np.float32)
        items = np.full((users, k), -1, np.int64)
        step = max(1, min(512, 2**22 // (k + _SPARE)))

        def search_block(part: slice) -> None:
            query_BD = query_UD[part]
            length_B = row_norms("queries", query_BD)
            rows = None if correction is None else correction.rows(part.start, part.stop)
            check_overflow(length_B, self._longest_1, rows)
            seen = seen_pairs(exclude, part, count, query_UD.device)
            corrected = corrected_pairs(correction, part, seen, count)
            self._search_block(query_BD, length_B, seen, corrected, (scores[part], items[part]))

        with strict_fp32(query_UD.device):
            for_each_block(search_block, users, step, query_UD.device)
        return scores, items

    def _search_block(
        self,
        query_BD: torch.Tensor,
        length_B: torch.Tensor,
        seen: Pairs,
        corrected: CorrectedPairs | None,
        out: TopItems,
    ) -> None:
        """Write the (B, K) scores and items of one block of users into `out`."""
        import torch

        k = out[1].shape[1]
        left_out = may_lead = seen
        best = None
        if corrected is not None:
            left_out = corrected.with_seen(seen)
            may_lead = corrected.with_seen(seen, corrected.value < 0)
            best = self._best_corrected(query_BD, corrected, k)
        score_BF, item_BF, bound_B = self.candidates(query_BD, k + _SPARE, left_out, may_lead)
        # The errors of the k-th candidate's score and of another score can add up: twice the bound.
        margin_B = 2 * error_bound(query_BD.shape[1], length_B, self._longest_1, FP32_ROUNDOFF)
        floor_B = _kth_score(score_BF, k, best) - margin_B
        kept_BF = (score_BF >= floor_B[:, None]) & (score_BF > -torch.inf)
        row_P, column_P = kept_BF.nonzero(as_tuple=True)
        exact_BF = torch.full_like(score_BF, -torch.inf, dtype=torch.float64)
        exact_BF[kept_BF] = exact_scores(query_BD, self.item_ND, row_P, item_BF[row_P, column_P])
        if best is not None:
            exact_BF, item_BF = torch.cat([exact_BF, best[0]], 1), torch.cat([item_BF, best[1]], 1)
        _write_best(exact_BF, item_BF, out)
        # Many scores are nearly equal, and an item that was not fetched can be among the best:
        # score the whole catalogue for this user.
        for row in (bound_B >= floor_B).logical_and_(bound_B > -torch.inf).nonzero()[:, 0].tolist():
            score_N = torch.mv(self.item_ND, query_BD[row])
            score_N[left_out[1][left_out[0] == row]] = -torch.inf
            item_P = (score_N >= floor_B[row]).nonzero()[:, 0]
            exact_P = exact_scores(query_BD, self.item_ND, torch.full_like(item_P, row), item_P)
            if best is not None:
                exact_P, item_P = (
                    torch.cat([exact_P, best[0][row]]),
                    torch.cat([item_P, best[1][row]]),
                )
            _write_best(exact_P[None], item_P[None], (out[0][row, None], out[1][row, None]))

    def _best_corrected(
        self, query_BD: torch.Tensor, corrected: CorrectedPairs, k: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the k best corrected items of each user that the user has not seen.

        Returns:
            (B, W) canonical scores, descending, and (B, W) items, W <= k. If a user has fewer than
            W such items, the tail holds score -inf and item -1.
        """
        import torch

        pairs = corrected.where(~corrected.is_seen)
        score_P = exact_scores(query_BD, self.item_ND, pairs.row, pairs.item) + pairs.value
        # The pairs ascend by item; two stable sorts give the order by row, score and item.
        order_P = score_P.argsort(descending=True, stable=True)
        order_P = order_P[pairs.row[order_P].argsort(stable=True)]
        row_P = pairs.row[order_P]
        count_B = row_P.bincount(minlength=len(query_BD))
        place_P = (
            torch.arange(len(row_P), device=row_P.device) - (count_B.cumsum(0) - count_B)[row_P]
        )
        width = min(k, int(count_B.max())) if len(count_B) else 0
        score_BW = query_BD.new_full((len(query_BD), width), -torch.inf, dtype=torch.float64)
        item_BW = torch.full_like(score_BW, -1, dtype=torch.int64)
        first_P = place_P < width
        place = row_P[first_P], place_P[first_P]
        score_BW[place] = score_P[order_P[first_P]]
        item_BW[place] = pairs.item[order_P[first_P]]
        return score_BW, item_BW

    def candidates(
        self, query_BD: torch.Tensor, fetch: int, left_out: Pairs, may_lead: Pairs
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the items with the highest inner products that are not left out.

        Args:
            query_BD: Queries.
            fetch: Number of items to return for each query, at most N. A left-out item with a high
                inner product counts as one of them, unless it is in `may_lead`.
            left_out: Distinct (row, item) to leave out: the seen items and the corrected items.
            may_lead: The pairs of `left_out` that can have a high inner product without a high
                score: the seen items and the items with a negative correction.

        Returns:
            (B, F) fp32 scores in descending order, -inf for a left-out item, (B, F) items, and (B,)
            bounds: an item that is neither returned nor left out scores at most the bound.
        """
        import torch

        count, tile = len(self.item_ND), 8192 if query_BD.device.type == "cpu" else 65536
        best_BF = query_BD.new_zeros(len(query_BD), 0)
        best_item_BF = torch.zeros_like(best_BF, dtype=torch.int64)
        for low in range(0, count, tile):
            score_BC = torch.mm(query_BD, self.item_ND[low : low + tile].T)
            in_tile = (left_out[1] >= low) & (left_out[1] < low + tile)
            score_BC[left_out[0][in_tile], left_out[1][in_tile] - low] = -torch.inf
            score_BC, item_BC = score_BC.topk(min(fetch, score_BC.shape[1]), dim=1)
            merged = torch.cat([best_BF, score_BC], 1)
            best_BF, order = merged.topk(min(fetch, merged.shape[1]), dim=1)
            best_item_BF = torch.cat([best_item_BF, item_BC + low], 1).gather(1, order)
        is_complete = best_BF.shape[1] == count
        return best_BF, best_item_BF, best_BF[:, -1] - (torch.inf if is_complete else 0.0)


def _kth_score(
    score_BF: torch.Tensor, k: int, best: tuple[torch.Tensor, torch.Tensor] | None
) -> torch.Tensor:
    """Return the k-th highest score of candidates and corrected items: (B,); -inf if fewer."""
    import torch

    if best is not None:
        score_BF = torch.cat([score_BF.double(), best[0]], 1).sort(1, descending=True)[0]
    if score_BF.shape[1] < k:
        return score_BF.new_full((len(score_BF),), -torch.inf, dtype=torch.float64)
    return score_BF[:, k - 1].double()


def _write_best(exact_BF: torch.Tensor, item_BF: torch.Tensor, out: TopItems) -> None:
    """Write the best of (B, F) canonical scores and items to `out`, ordered as `Index.search`."""
    import torch

    item_BF, by_item = item_BF.sort(1)
    exact_BF, by_score = exact_BF.gather(1, by_item).sort(dim=1, descending=True, stable=True)
    item_BF = item_BF.gather(1, by_score).masked_fill_(exact_BF == -torch.inf, -1)
    width = min(out[1].shape[1], item_BF.shape[1])
    out[0][:, :width] = exact_BF[:, :width].float().cpu().numpy()
    out[1][:, :width] = item_BF[:, :width].cpu().numpy()
