"""All indexes by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from retrieval.approximate_indexes import ApproximateIndex, IndexStore
from retrieval.default_index import DefaultIndex
from retrieval.flat_index import FaissGpuIndex, FaissIndex, check_gpu
from retrieval.index_options import IndexOptions
from retrieval.indexes import Index, TorchIndex

if TYPE_CHECKING:
    from retrieval.exact_scores import Matrix

INDEXES: dict[str, Callable[[Matrix], Index]] = {
    "torch": TorchIndex,
    "faiss": DefaultIndex,
    "faiss:flat": FaissIndex,
    "faiss:gpu": FaissGpuIndex,
}
"""Kind to class of each exact index. `retrieval.index_options.PARAMETERS` has the others."""


def parse_index(name: str) -> IndexOptions:
    """Return kind and parameters of an index; see `retrieval.index_options.IndexOptions.parse`.

    Raises:
        IndexNameError: The name is unknown, a parameter is wrong, or the index needs a GPU that
            FAISS does not see.

    Examples:
        >>> parse_index("faiss:hnsw,efSearch=128").kind
        'faiss:hnsw'
    """
    options = IndexOptions.parse(name, INDEXES)
    if options.kind == "faiss:gpu":
        check_gpu()
    return options


def exact_index(options: IndexOptions) -> Callable[[Matrix], Index]:
    """Return the class of an exact index."""
    return INDEXES[options.kind]


def make_index(name: str, items: Matrix, store: IndexStore | None = None) -> Index:
    """Return the index of this name over (N, D) fp32 items.

    Args:
        name: Kind and parameters.
        items: (N, D) fp32.
        store: Where trained approximate indexes are read and saved.

    Raises:
        IndexNameError: The name is unknown, or a parameter does not fit the catalogue.
        ValueError: The items are not a finite fp32 matrix.
    """
    options = parse_index(name)
    if options.is_exact:
        return exact_index(options)(items)
    return ApproximateIndex(items, options, store)
