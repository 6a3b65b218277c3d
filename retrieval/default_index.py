"""The index `faiss`, the default: flat search of FAISS or matrix products of torch, by measurement.

Both give the same bits. Which one is faster depends on the machine, the libraries and the vectors.

Shape suffixes: U users, B users of one block, N items, D dimensions.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from retrieval.blocks import strict_fp32
from retrieval.flat_index import FEW_QUERIES, FaissIndex
from retrieval.indexes import TopItems, TorchIndex
from retrieval.seen_items import SeenItems
from retrieval.sparse_scores import SparseScores

if TYPE_CHECKING:
    import torch

    from retrieval.exact_scores import Matrix
    from retrieval.pairs import Pairs

MEASURED_QUERIES, MEASURED_ITEMS = 64, 2**15
"""Queries and items of a measurement."""
WORTH_MEASURING = 12 * 10**7
"""Least number of scores for which a measurement costs less than it can save. Measurements take up
to 6% of the time of so many scores."""
_MEASURED_LENGTH = 32  # items of a list
_measured: dict[tuple[str, int, int], float] = {}


def measured_ratio(
    kind: str,
    dim: int,
    flat: Callable[[], object],
    other: Callable[[], object],
    *,
    rounds: int = 2,
) -> float:
    """Return the CPU time of flat search over that of another way, measured once in a process.

    Args:
        kind: Name of the comparison.
        dim: Dimensions of the vectors.
        flat: A flat search.
        other: The same work in the other way.
        rounds: How often each way runs; the fastest counts.
    """
    import torch

    key = (kind, dim, torch.get_num_threads())
    if key not in _measured:
        seconds = [min(_cpu_seconds(way) for _ in range(rounds)) for way in (flat, other)]
        _measured[key] = seconds[0] / max(seconds[1], 1e-9)
    return _measured[key]


def _cpu_seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


class DefaultIndex(FaissIndex):
    """Exact index that searches as `FaissIndex` or as `TorchIndex`, whichever is faster.

    A few queries are always searched by FAISS, which then reads the items once for each query. For
    more queries, both ways are measured on a part of the items. `TorchIndex` is taken if there are
    too few scores for a measurement, and on a GPU.

    Args:
        items: (N, D) fp32, torch or numpy; not copied if they are on the CPU.

    Raises:
        ValueError: As `TorchIndex`.
    """

    def __init__(self, items: Matrix) -> None:
        super().__init__(items)
        self._is_flat = False
        self.choice = ""
        """The way of the last search, and the reason."""

    def search(
        self,
        queries: Matrix,
        k: int,
        exclude: SeenItems | None = None,
        correction: SparseScores | None = None,
    ) -> TopItems:
        """Return the k items with the highest scores of each query; see `Index.search`."""
        self._choose(queries)
        return super().search(queries, k, exclude, correction)

    def candidates(
        self, query_BD: torch.Tensor, fetch: int, left_out: Pairs, may_lead: Pairs
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the items with the highest inner products; see `TorchIndex.candidates`."""
        if self._is_flat:
            return super().candidates(query_BD, fetch, left_out, may_lead)
        return TorchIndex.candidates(self, query_BD, fetch, left_out, may_lead)

    def _choose(self, queries: Matrix) -> None:
        """Choose the way of a search."""
        users, count = len(queries), len(self.item_ND)
        if self.item_ND.device.type != "cpu":
            self._is_flat, self.choice = False, "lists by torch (the items are on a GPU)"
        elif users < FEW_QUERIES:
            self._is_flat, self.choice = True, "lists by flat search (few queries)"
        elif users * count < WORTH_MEASURING:
            self._is_flat, self.choice = False, "lists by torch (few scores)"
        else:
            ratio = self._measure(queries)
            self._is_flat = ratio < 1
            self.choice = (
                f"lists by flat search ({ratio:.2f} of torch's time)"
                if self._is_flat
                else f"lists by torch (flat search takes {ratio:.2f} of its time)"
            )

    def _measure(self, queries: Matrix) -> float:
        import torch

        part = FaissIndex(self.item_ND[:MEASURED_ITEMS])
        query_BD = torch.as_tensor(queries[:MEASURED_QUERIES]).detach().cpu()
        none = torch.zeros(0, dtype=torch.int64)
        pairs = (none, none)
        length = min(_MEASURED_LENGTH, len(part.item_ND))
        with strict_fp32(self.item_ND.device):
            return measured_ratio(
                "lists",
                query_BD.shape[1],
                lambda: part.fetch(query_BD, length),
                lambda: TorchIndex.candidates(part, query_BD, length, pairs, pairs),
            )
