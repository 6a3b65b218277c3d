"""Indexes over a catalogue: the best items of each query, and ranks with their help.

Every index here is exact, and all of them agree to the last bit: an index only proposes candidates,
by fp32 scores of its own; a proven error bound says which candidates can matter, and canonical
float64 scores (`retrieval.exact_scores.exact_scores`) put those in order.

Shape suffixes: U users, B users of one block, N items, D dimensions, F fetched candidates, K kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from retrieval.blocks import each_block, plain_fp32
from retrieval.exact_scores import (
    FP32_ROUNDOFF,
    TargetScores,
    as_indices,
    as_matrix,
    error_bound,
    exact_scores,
    refuse_overflow,
    row_norms,
)
from retrieval.ranking import Ranks, SeenItems, rank, seen_pairs

if TYPE_CHECKING:
    import torch

    from retrieval.exact_scores import Indices, Matrix

Found = tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]

_CUTOFF = 50  # the deepest cut-off among the metrics' defaults
_SPARE = 16  # candidates beyond those asked for, so that the last one's rivals are among them
_DEEP = 2048  # candidates a query; past it FAISS's heaps cost more than a product and a top-k


class Index(Protocol):
    """A catalogue that can be asked for the best items."""

    def search(self, queries: Matrix, k: int, exclude: SeenItems | None = None) -> Found:
        """The k items of largest inner product with each query, exactly.

        Order: score descending, item ascending among equals, where scores are float64 inner
        products of the fp32 vectors, summed in a fixed order. It depends neither on the index, nor
        on the block, the threads or the device.

        Args:
            queries: (U, D) fp32.
            k: Items to a query, at least 1.
            exclude: Items to leave out, user by user; none when None.

        Returns:
            (U, k) fp32 scores, the canonical ones rounded once, and (U, k) int64 items. Where a
            user has fewer than k items left, the tail holds score -inf and item -1.

        Raises:
            ValueError: Shapes, dtypes or excluded items that do not fit, vectors with NaN or
                infinity, or scores beyond fp32.
        """
        ...


class TorchIndex:
    """Candidates from matrix products, tile by tile, on the items' own device."""

    def __init__(self, items: Matrix) -> None:
        """Keep the (N, D) fp32 items, without a copy."""
        self.item_ND = as_matrix("items", items)
        if not len(self.item_ND):
            raise ValueError("items are empty: there is nothing to search")
        self._length_N = row_norms("items", self.item_ND)

    def search(self, queries: Matrix, k: int, exclude: SeenItems | None = None) -> Found:
        """See `Index.search`."""
        query_UD = as_matrix("queries", queries).to(self.item_ND.device)
        (users, dim), (count, item_dim) = query_UD.shape, self.item_ND.shape
        if dim != item_dim:
            raise ValueError(f"queries have {dim} dimensions but items have {item_dim}")
        if k < 1:
            raise ValueError(f"k is {k}: it must be at least 1")
        if exclude is not None:
            exclude.check(users, count)
        scores = np.full((users, k), -np.inf, np.float32)
        items = np.full((users, k), -1, np.int64)
        step = max(1, min(512, 2**22 // (k + _SPARE)))

        def search_block(part: slice) -> None:
            seen = seen_pairs(exclude, part, count, query_UD.device)
            self._search_block(query_UD[part], seen, scores[part], items[part])

        with plain_fp32(query_UD.device):
            each_block(search_block, users, step, query_UD.device)
        return scores, items

    def _search_block(
        self,
        query_BD: torch.Tensor,
        seen: tuple[torch.Tensor, torch.Tensor],
        scores_BK: npt.NDArray[np.float32],
        items_BK: npt.NDArray[np.int64],
    ) -> None:
        """Fill in the results of one block of users."""
        import torch

        k = items_BK.shape[1]
        length_B = row_norms("queries", query_BD)
        refuse_overflow(length_B, self._length_N)
        score_BF, item_BF, bound_B = self._candidates(query_BD, k + _SPARE, seen)
        # The k-th candidate and an item below it can both be off, towards each other.
        longest = self._length_N.max()
        margin_B = 2 * error_bound(query_BD.shape[1], length_B, longest, FP32_ROUNDOFF)
        floor_B = torch.full_like(margin_B, -torch.inf)
        if score_BF.shape[1] >= k:
            floor_B = score_BF[:, k - 1].double() - margin_B
        kept_BF = (score_BF >= floor_B[:, None]) & (score_BF > -torch.inf)
        row_P, column_P = kept_BF.nonzero(as_tuple=True)
        exact_BF = torch.full_like(score_BF, -torch.inf, dtype=torch.float64)
        exact_BF[kept_BF] = exact_scores(query_BD, self.item_ND, row_P, item_BF[row_P, column_P])
        item_BF, by_item = item_BF.sort(1)
        exact_BF, by_score = exact_BF.gather(1, by_item).sort(dim=1, descending=True, stable=True)
        item_BF = item_BF.gather(1, by_score).masked_fill_(exact_BF == -torch.inf, -1)
        width = min(k, item_BF.shape[1])
        scores_BK[:, :width] = exact_BF[:, :width].float().cpu().numpy()
        items_BK[:, :width] = item_BF[:, :width].cpu().numpy()
        # An item that was not fetched could belong to the best: many equals, or very near ones.
        for row in (bound_B >= floor_B).logical_and_(bound_B > -torch.inf).nonzero()[:, 0].tolist():
            score_N = torch.mv(self.item_ND, query_BD[row])
            score_N[seen[1][seen[0] == row]] = -torch.inf
            item_P = (score_N >= floor_B[row]).nonzero()[:, 0]
            user_P = torch.full_like(item_P, row)
            exact_P = exact_scores(query_BD, self.item_ND, user_P, item_P)
            exact_P, order_P = exact_P.sort(descending=True, stable=True)
            scores_BK[row] = exact_P[:k].float().cpu().numpy()
            items_BK[row] = item_P[order_P[:k]].cpu().numpy()

    def _candidates(
        self, query_BD: torch.Tensor, fetch: int, seen: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(B, F) fp32 scores in descending order, -inf for a seen item, (B, F) items, (B,) bound.

        At least `fetch` unseen items, if there are so many; no item outside scores above the bound.
        """
        import torch

        count, tile = len(self.item_ND), 8192 if query_BD.device.type == "cpu" else 65536
        best_BF = query_BD.new_zeros(len(query_BD), 0)
        best_item_BF = torch.zeros_like(best_BF, dtype=torch.int64)
        for low in range(0, count, tile):
            score_BC = torch.mm(query_BD, self.item_ND[low : low + tile].T)
            here = (seen[1] >= low) & (seen[1] < low + tile)
            score_BC[seen[0][here], seen[1][here] - low] = -torch.inf
            score_BC, item_BC = score_BC.topk(min(fetch, score_BC.shape[1]), dim=1)
            merged = torch.cat([best_BF, score_BC], 1)
            best_BF, order = merged.topk(min(fetch, merged.shape[1]), dim=1)
            best_item_BF = torch.cat([best_item_BF, item_BC + low], 1).gather(1, order)
        whole = best_BF.shape[1] == count
        return best_BF, best_item_BF, best_BF[:, -1] - (torch.inf if whole else 0.0)


class FaissIndex(TorchIndex):
    """Candidates from a flat FAISS index (`IndexFlatIP`), on the CPU.

    It fetches k, plus a few, plus as many as the block's keenest user has seen; where that makes
    more than 2,048, the candidates come from torch instead.
    """

    def __init__(self, items: Matrix) -> None:
        """Copy the (N, D) fp32 items into the index."""
        import faiss

        super().__init__(items)
        self._flat = faiss.IndexFlatIP(self.item_ND.shape[1])
        self._flat.add(self.item_ND.cpu().contiguous().numpy())

    def fetch(self, query_BD: torch.Tensor, fetch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, F) scores in descending order and (B, F) items, F = fetch <= N, seen or not."""
        import faiss
        import torch

        # FAISS brings an OpenMP of its own: as many threads as torch may use on this thread.
        faiss.omp_set_num_threads(torch.get_num_threads())
        score_BF, item_BF = self._flat.search(query_BD.cpu().contiguous().numpy(), fetch)
        device = query_BD.device
        return torch.from_numpy(score_BF).to(device), torch.from_numpy(item_BF).to(device)

    def _candidates(
        self, query_BD: torch.Tensor, fetch: int, seen: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        import torch

        count = len(self.item_ND)
        enough = min(fetch + _most_seen(seen[0]), count)
        if enough > _DEEP:
            return super()._candidates(query_BD, fetch, seen)
        score_BF, item_BF = self.fetch(query_BD, enough)
        bound_B = score_BF[:, -1] - (torch.inf if enough == count else 0.0)
        score_BF = score_BF.masked_fill(_is_seen(item_BF, seen, count), -torch.inf)
        score_BF, order = score_BF.sort(1, descending=True)
        return score_BF, item_BF.gather(1, order), bound_B


INDEXES: dict[str, Callable[[Matrix], Index]] = {"faiss": FaissIndex, "torch": TorchIndex}


def make_index(name: str, items: Matrix) -> Index:
    """The index of this name over (N, D) fp32 items.

    Raises:
        ValueError: An unknown name, or items that are not a finite fp32 matrix.
    """
    return _maker(name)(items)


def _maker(name: str) -> Callable[[Matrix], Index]:
    if name not in INDEXES:
        raise ValueError(f"unknown index {name!r}; known: {', '.join(sorted(INDEXES))}")
    return INDEXES[name]


def rank_with(
    index: str, queries: Matrix, items: Matrix, targets: Indices, exclude: SeenItems | None = None
) -> Ranks:
    """The ranks of `retrieval.ranking.rank`, found with the help of an index: always the same.

    `torch` counts, as `rank` does. `faiss` fetches the top of each user's list: 50 items, the
    deepest of the default cut-offs, plus those that the user may have seen (at most 2,048 in all).
    When the last item fetched scores below the target by more than the error bound, the target's
    rank can be read off the list, with close calls settled by canonical scores as in `rank`. Every
    other user's target is ranked by `rank` itself: FAISS saves no work for those, it only adds
    some, so the better the model, the more it helps.

    Raises:
        ValueError: An unknown index, and whatever `rank` refuses.
    """
    maker = _maker(index)
    if maker is not FaissIndex:
        return rank(queries, items, targets, exclude)
    contest = TargetScores(queries, items, targets)
    users, count = len(contest.query_UD), len(contest.item_ND)
    if exclude is not None:
        exclude.check(users, count)
    flat = FaissIndex(contest.item_ND)
    kept, filtered = np.zeros(users, np.int64), np.zeros(users, np.int64)

    def read_block(part: slice) -> None:
        seen = seen_pairs(exclude, part, count, contest.device)
        kept[part], filtered[part] = _read_off(contest, flat, part, seen)

    with plain_fp32(contest.device):
        each_block(read_block, users, 1024, contest.device)
    left = np.flatnonzero(kept == 0)
    if len(left):
        counted = rank(
            contest.query_UD[left],
            contest.item_ND,
            as_indices("targets", targets)[left],
            exclude.take(left) if exclude is not None else None,
        )
        kept[left], filtered[left] = counted.kept, counted.filtered
    return Ranks(kept=kept, filtered=filtered)


def _read_off(
    contest: TargetScores,
    flat: FaissIndex,
    users: slice,
    seen: tuple[torch.Tensor, torch.Tensor],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(B,) kept and (B,) filtered ranks; 0 where the list ends before the target's place."""
    import torch

    count = len(contest.item_ND)
    fetch = min(count, _DEEP, _CUTOFF + _most_seen(seen[0]))
    score_BF, item_BF = flat.fetch(contest.query_UD[users], fetch)
    ahead_BF = score_BF.double() - contest.score_U[users, None]
    margin_B = contest.margin(users, contest.item_length_N.max(), FP32_ROUNDOFF)[:, None]
    closed_B = (ahead_BF[:, -1:] < -margin_B)[:, 0]
    if fetch == count:
        closed_B = torch.ones_like(closed_B)
    rival_BF = (item_BF != contest.target_U[users, None]) & closed_B[:, None]
    above_BF = (ahead_BF > margin_B) & rival_BF
    row_P, column_P = ((ahead_BF.abs() <= margin_B) & rival_BF).nonzero(as_tuple=True)
    above_BF[row_P, column_P] = contest.at_least(row_P + users.start, item_BF[row_P, column_P])
    kept_B = (1 + above_BF.sum(1)) * closed_B
    seen_above_B = (above_BF & _is_seen(item_BF, seen, count)).sum(1)
    return kept_B.cpu().numpy(), (kept_B - seen_above_B).cpu().numpy()


def _most_seen(row_P: torch.Tensor) -> int:
    """The largest number of items that one row has seen."""
    return int(row_P.bincount().max()) if len(row_P) else 0


def _is_seen(
    item_BF: torch.Tensor, seen: tuple[torch.Tensor, torch.Tensor], count: int
) -> torch.Tensor:
    """(B, F) bool: the row has seen the item."""
    import torch

    row_B = torch.arange(len(item_BF), device=item_BF.device)
    return torch.isin(row_B[:, None] * count + item_BF, seen[0] * count + seen[1])
