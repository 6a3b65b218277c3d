"""Approximate indexes of FAISS: inverted lists, product codes and a graph of neighbours.

An approximate index can miss some of the best items; the scores that it returns are exact. Its
training takes from seconds to minutes, so a trained index can be saved and read again.

Shape suffixes: U users, B users of one block, N items, D dimensions, F fetched candidates,
K items of a list, P pairs of a user and an item.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from retrieval.exact_scores import as_matrix, exact_scores
from retrieval.flat_index import FaissIndex, set_up_faiss
from retrieval.index_options import IndexOptions

if TYPE_CHECKING:
    import torch

    from retrieval.exact_scores import Matrix
    from retrieval.indexes import Index

_TRAINED_ON = 64  # most items for each list that the centroids of the lists are trained on


class IndexStore(Protocol):
    """A place where trained indexes are kept."""

    def load(self, name: str, fingerprint: str) -> Any | None:
        """Return the FAISS index that was saved under this name for this fingerprint, if any."""
        ...

    def save(self, name: str, fingerprint: str, index: Any) -> None:
        """Keep a FAISS index."""
        ...


class ApproximateIndex(FaissIndex):
    """Index that finds candidates with an approximate index of FAISS.

    Seen items are fetched and left out afterwards, so that they do not shorten a list. Users who
    need more than `retrieval.flat_index.LONGEST_LIST` candidates are searched exactly.

    Args:
        items: (N, D) fp32, torch or numpy.
        options: Kind and parameters.
        store: Where the trained index is read and saved; None keeps it in memory alone.

    Raises:
        IndexNameError: A parameter does not fit the catalogue.
        ValueError: As `retrieval.indexes.TorchIndex`.
    """

    is_exact = False

    def __init__(
        self, items: Matrix, options: IndexOptions, store: IndexStore | None = None
    ) -> None:
        super().__init__(items)
        count, dim = self._on_cpu_ND.shape
        self.values = options.values(count, dim)
        """All parameters, by name."""
        name, fingerprint = _names(options, self._on_cpu_ND)
        set_up_faiss(count)
        trained = None if store is None else store.load(name, fingerprint)
        self.is_reused = trained is not None
        """True if the index was read from the store."""
        if trained is None:
            trained = _BUILD[options.kind](self._on_cpu_ND, self.values)
            if store is not None:
                store.save(name, fingerprint, trained)
        self._trained = trained
        self._set_search(options.kind)

    def _set_search(self, kind: str) -> None:
        """Set the parameters of the search, which are not those of the saved index."""
        if kind == "faiss:hnsw":
            self._trained.hnsw.efSearch = self.values["efSearch"]
        else:
            self._trained.nprobe = self.values["nprobe"]

    def fetch(self, query_BD: torch.Tensor, fetch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the (B, fetch) highest scores among the items that FAISS finds, and their items.

        If FAISS finds fewer items, the tail holds score -inf and item 0.
        """
        import torch

        set_up_faiss(len(query_BD))
        length = min(len(self.item_ND), fetch * self.values.get("k_factor", 1))
        _, items = self._trained.search(query_BD.cpu().contiguous().numpy(), length)
        item_BF = torch.from_numpy(items).to(query_BD.device)
        row_P, column_P = (item_BF >= 0).nonzero(as_tuple=True)
        score_BF = torch.full_like(item_BF, -torch.inf, dtype=torch.float32)
        score_BF[row_P, column_P] = exact_scores(
            query_BD, self.item_ND, row_P, item_BF[row_P, column_P]
        ).float()
        score_BF, order = score_BF.sort(1, descending=True)
        item_BF = item_BF.clamp(min=0).gather(1, order)
        return score_BF[:, :fetch], item_BF[:, :fetch]


def recall(approximate: Index, exact: Index, queries: Matrix, k: int) -> float:
    """Return recall@k: the share of the k best items of each query that an index finds.

    Args:
        approximate: The index.
        exact: An exact index over the same items.
        queries: (U, D) fp32, at least one.
        k: Length of the lists.
    """
    query_UD = as_matrix("queries", queries)
    best_UK, items_UK = (index.search(query_UD, k)[1] for index in (exact, approximate))
    number_of_best = (best_UK >= 0).sum()
    rows = np.arange(len(best_UK))[:, None] * (int(best_UK.max()) + 2)
    is_found_UK = np.isin(np.where(best_UK < 0, -1, rows + best_UK), rows + items_UK)
    return float((is_found_UK & (best_UK >= 0)).sum() / number_of_best)


def _names(options: IndexOptions, item_ND: Any) -> tuple[str, str]:
    """Return the name of a saved index, and the fingerprint of all on which it depends."""
    import faiss

    values = options.build_values(*item_ND.shape)
    parameters = "-".join(f"{key}{value}" for key, value in values.items())
    name = f"{options.kind.partition(':')[2]}-{parameters}"
    header = json.dumps([options.kind, values, faiss.__version__, list(item_ND.shape)])
    digest = hashlib.blake2b(header.encode(), digest_size=16)
    digest.update(memoryview(item_ND).cast("B"))
    return name, digest.hexdigest()


def _train_lists(index: Any, item_ND: Any) -> Any:
    """Train an index of inverted lists and add the items."""
    index.cp.min_points_per_centroid = 1  # FAISS prints a warning below 39
    index.cp.max_points_per_centroid = _TRAINED_ON
    index.train(item_ND)
    index.add(item_ND)
    return index


def _build_ivf(item_ND: Any, values: Mapping[str, int]) -> Any:
    import faiss

    dim = item_ND.shape[1]
    quantizer = faiss.IndexFlatIP(dim)
    index = faiss.IndexIVFFlat(quantizer, dim, values["nlist"], faiss.METRIC_INNER_PRODUCT)
    return _train_lists(index, item_ND)


def _build_ivfpq(item_ND: Any, values: Mapping[str, int]) -> Any:
    import faiss

    dim = item_ND.shape[1]
    parameters = values["nlist"], values["M"], values["nbits"], faiss.METRIC_INNER_PRODUCT
    index = faiss.IndexIVFPQ(faiss.IndexFlatIP(dim), dim, *parameters)
    index.pq.cp.min_points_per_centroid = 1
    return _train_lists(index, item_ND)


def _build_hnsw(item_ND: Any, values: Mapping[str, int]) -> Any:
    import faiss

    index = faiss.IndexHNSWFlat(item_ND.shape[1], values["M"], faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = values["efConstruction"]
    index.add(item_ND)
    return index


_BUILD = {"faiss:ivf": _build_ivf, "faiss:ivfpq": _build_ivfpq, "faiss:hnsw": _build_hnsw}
