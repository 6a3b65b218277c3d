"""Find the nearest items of an item in feature tables and among the item vectors of runs.

Legend: N items, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from features.dataset import Dataset
from features.store import FeatureStore
from features.warehouse import Warehouse
from trainer.evaluation.search import CatalogueSearch
from trainer.runs.run import Run


@dataclass(frozen=True, kw_only=True, slots=True)
class ItemNeighbours:
    """One item with its nearest neighbours in each space."""

    item: int
    spaces: dict[str, list[int]]
    """Name of a feature table or of a run to the nearest items, nearest first; an item without a
    vector in a space has no neighbours there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Space:
    """Vectors of items, of length 1."""

    vectors_ND: npt.NDArray[np.float32]
    present_N: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, vectors_ND: npt.NDArray[np.float32], present_N: npt.NDArray[np.bool_]) -> "Space":
        """Scale vectors to length 1."""
        lengths_N1 = np.linalg.norm(vectors_ND, axis=1, keepdims=True)
        return cls(vectors_ND=vectors_ND / np.maximum(lengths_N1, 1e-12), present_N=present_N)

    def nearest(self, item: int, count: int) -> list[int]:
        """Return the items with the largest cosines; equal cosines by number of the item."""
        if not self.present_N[item]:
            return []
        cosine_N = np.where(self.present_N, self.vectors_ND @ self.vectors_ND[item], -np.inf)
        cosine_N[item] = -np.inf
        order = np.argsort(-cosine_N, kind="stable")[:count]
        return [int(other) for other in order if np.isfinite(cosine_N[other])]


def read_spaces(
    warehouse: Warehouse,
    runs: Sequence[Run],
    searches: Sequence[CatalogueSearch],
    labels: Sequence[str],
) -> dict[str, Space]:
    """Return the pooled tables that the runs read, or those of the dataset, and the runs' vectors.

    Tables of tokens have several vectors an item and are left out.

    Args:
        warehouse: Warehouse with the tables.
        runs: Runs of one dataset.
        searches: Their catalogues, encoded.
        labels: Their labels.
    """
    dataset = runs[0].spec.dataset
    info = warehouse.info(dataset)
    read = {name for run in runs for name in run.spec.features}
    tables = [table for table in FeatureStore(warehouse).tables(dataset) if table.level == "pooled"]
    tables = [table for table in tables if table.label in read or not read]
    spaces = {}
    for table in tables:
        matrix = table.read(info.items, info.fingerprint, info.inputs_of(table.modality))
        spaces[table.label] = Space.of(matrix.vectors.astype(np.float32), matrix.present)
    for run, search, label in zip(runs, searches, labels, strict=True):
        if has_vectors(run, search):
            vectors_ND = search.items_ND.float().cpu().numpy()
            spaces[f"vectors of {label}"] = Space.of(vectors_ND, np.ones(len(vectors_ND), bool))
    return spaces


def has_vectors(run: Run, search: CatalogueSearch) -> bool:
    """Return whether a run has item vectors that can be compared."""
    return run.model.has_vectors and search.items_ND.shape[1] > 1


def find_neighbours(
    dataset: Dataset, spaces: dict[str, Space], *, items: int, count: int, seed: int
) -> list[ItemNeighbours]:
    """Return the neighbours of some items with a vector in every space.

    Half of the items are random ones of those that training has seen often, and the other half are
    those that it has seen least.

    Args:
        dataset: The dataset.
        spaces: The spaces of :func:`read_spaces`.
        items: Number of items.
        count: Number of neighbours of an item.
        seed: Seed of the random choice.
    """
    if not spaces:
        return []
    rng = np.random.default_rng(seed)
    has_all_N = np.all([space.present_N for space in spaces.values()], axis=0)
    shuffled = rng.permutation(np.flatnonzero(has_all_N))
    ascending = shuffled[np.argsort(dataset.train_counts[shuffled], kind="stable")]
    rare, others = ascending[: items // 2], ascending[items // 2 :]
    often = rng.permutation(others[len(others) // 2 :])[: items - len(rare)]
    return [
        ItemNeighbours(
            item=int(item),
            spaces={name: space.nearest(int(item), count) for name, space in spaces.items()},
        )
        for item in [*often, *rare]
    ]
