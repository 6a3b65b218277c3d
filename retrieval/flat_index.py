"""Flat search with FAISS: all items are compared with each query, on the CPU or on a GPU.

Shape suffixes: U users, B users of one block, G users of one group, N items, D dimensions,
F fetched candidates.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from retrieval.index_options import IndexNameError
from retrieval.indexes import TorchIndex
from retrieval.pairs import contains, most_pairs

if TYPE_CHECKING:
    import torch

    from retrieval.exact_scores import Matrix
    from retrieval.pairs import Pairs

FEW_QUERIES = 4
"""From this number of queries on, a matrix product is faster than one pass for each query."""
LONGEST_LIST = 2048
"""Most candidates per query that FAISS fetches; for more, a matrix product and a top-k are faster,
and FAISS on a GPU has no longer lists."""
_GROUP_LENGTHS = (128, 512, LONGEST_LIST)
"""Longest list of each group of users; users of the last group need longer ones."""


def set_up_faiss(queries: int) -> None:
    """Set the threads of FAISS and the way in which it computes inner products.

    FAISS has a separate OpenMP runtime: it gets the number of threads that torch uses. FAISS 1.15
    computes products of matrices only if queries x dimensions is at least 128,000, and is up to 16
    times slower below; earlier versions do so from 20 queries on.

    Args:
        queries: Number of queries of the next search.
    """
    import faiss
    import torch

    faiss.omp_set_num_threads(torch.get_num_threads())
    default = _default_threshold()
    faiss.cvar.distance_compute_blas_threshold = 1 if queries >= FEW_QUERIES else default


@cache
def _default_threshold() -> int:
    import faiss

    return int(faiss.cvar.distance_compute_blas_threshold)


class FaissIndex(TorchIndex):
    """Index that finds candidates with FAISS's flat search of inner products, on the CPU.

    The search fetches k items and a few more, plus as many as a user has seen or a correction
    lowers. Users are divided into groups by the length of these lists, so that a user with many
    seen items does not lengthen the lists of others. The candidates of users who need more than
    `LONGEST_LIST` come from `TorchIndex`.

    Args:
        items: (N, D) fp32, torch or numpy; not copied if they are on the CPU.

    Raises:
        ValueError: As `TorchIndex`.
    """

    def __init__(self, items: Matrix) -> None:
        super().__init__(items)
        self._on_cpu_ND = self.item_ND.cpu().contiguous().numpy()

    def fetch(self, query_BD: torch.Tensor, fetch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the (B, fetch) highest scores, descending, and their items; fetch <= N."""
        import faiss
        import torch

        set_up_faiss(len(query_BD))
        score_BF, item_BF = faiss.knn(
            query_BD.cpu().contiguous().numpy(),
            self._on_cpu_ND,
            fetch,
            metric=faiss.METRIC_INNER_PRODUCT,
        )
        device = query_BD.device
        return torch.from_numpy(score_BF).to(device), torch.from_numpy(item_BF).to(device)

    def candidates(
        self, query_BD: torch.Tensor, fetch: int, left_out: Pairs, may_lead: Pairs
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the items with the highest inner products; see `TorchIndex.candidates`."""
        import torch

        count, users = len(self.item_ND), len(query_BD)
        length_B = (may_lead[0].bincount(minlength=users) + fetch).clamp(max=count)
        group_B = torch.bucketize(length_B, length_B.new_tensor(_GROUP_LENGTHS))
        groups = group_B.unique().tolist()
        if len(groups) == 1:
            return self._of_group(groups[0], query_BD, fetch, left_out, may_lead)
        rows, parts = [], []
        for group in groups:
            row_G = (group_B == group).nonzero()[:, 0]
            number_B = torch.full_like(group_B, -1)
            number_B[row_G] = torch.arange(len(row_G), device=row_G.device)
            pairs = (_renumbered(pairs, number_B) for pairs in (left_out, may_lead))
            rows.append(row_G)
            parts.append(self._of_group(group, query_BD[row_G], fetch, *pairs))
        width = max(part[0].shape[1] for part in parts)
        score_BF = query_BD.new_full((users, width), -torch.inf)
        item_BF = torch.zeros_like(score_BF, dtype=torch.int64)
        bound_B = query_BD.new_empty(users)
        for row_G, (score_GF, item_GF, bound_G) in zip(rows, parts, strict=True):
            score_BF[row_G, : score_GF.shape[1]] = score_GF
            item_BF[row_G, : item_GF.shape[1]] = item_GF
            bound_B[row_G] = bound_G
        return score_BF, item_BF, bound_B

    def _of_group(
        self, group: int, query_GD: torch.Tensor, fetch: int, left_out: Pairs, may_lead: Pairs
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the candidates of the users of one group."""
        import torch

        if group == len(_GROUP_LENGTHS):
            return super().candidates(query_GD, fetch, left_out, may_lead)
        count = len(self.item_ND)
        enough = min(fetch + most_pairs(may_lead[0]), count)
        score_GF, item_GF = self.fetch(query_GD, enough)
        is_complete = enough == count or not self.is_exact
        bound_G = score_GF[:, -1] - (torch.inf if is_complete else 0.0)
        score_GF = score_GF.masked_fill(contains(left_out, item_GF, count), -torch.inf)
        score_GF, order = score_GF.sort(1, descending=True)
        return score_GF, item_GF.gather(1, order), bound_G


def _renumbered(pairs: Pairs, number_B: torch.Tensor) -> Pairs:
    """Return the pairs of the rows that have a number, with these numbers as rows."""
    row_P = number_B[pairs[0]]
    is_kept_P = row_P >= 0
    return row_P[is_kept_P], pairs[1][is_kept_P]


class FaissGpuIndex(FaissIndex):
    """Index that finds candidates with FAISS's flat search on a GPU, in fp32.

    Args:
        items: (N, D) fp32, torch or numpy; copied to the GPU.

    Raises:
        IndexNameError: FAISS sees no GPU.
        ValueError: As `TorchIndex`.
    """

    def __init__(self, items: Matrix) -> None:
        import faiss

        check_gpu()
        super().__init__(items)
        self._resources = faiss.StandardGpuResources()
        self._flat: Any = faiss.GpuIndexFlatIP(self._resources, self.item_ND.shape[1])
        self._flat.add(self._on_cpu_ND)

    def fetch(self, query_BD: torch.Tensor, fetch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the (B, fetch) highest scores, descending, and their items; fetch <= N."""
        import torch

        score_BF, item_BF = self._flat.search(query_BD.cpu().contiguous().numpy(), fetch)
        device = query_BD.device
        return torch.from_numpy(score_BF).to(device), torch.from_numpy(item_BF).to(device)


def check_gpu() -> None:
    """Check that FAISS can search on a GPU.

    Raises:
        IndexNameError: FAISS was built for the CPU, or sees no GPU.
    """
    import faiss

    if not hasattr(faiss, "StandardGpuResources"):
        raise IndexNameError(
            "index 'faiss:gpu' needs the package faiss-gpu, and faiss-cpu is installed; replace it,"
            " or give --index faiss"
        )
    if not faiss.get_num_gpus():
        raise IndexNameError(
            "index 'faiss:gpu' needs a GPU, and FAISS sees none on this machine; give --index faiss"
        )
