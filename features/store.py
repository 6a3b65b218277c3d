"""The feature store: every feature table of a warehouse, checked against the prepared dataset.

A table is the folder ``<dataset>/features/<backbone>/<modality>/<level>``.
"""

import hashlib
import json
import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from features.arrow_columns import items_of
from features.atomic_files import atomic_write
from features.dataset import load_items
from features.errors import UserError
from features.matrices import FeatureMatrix, TokenMatrix, map_tokens, map_vectors, read_vectors
from features.permutation import permuted_items
from features.provenance import EXTRACT_AGAIN, IMPORTED, Provenance
from features.table_parts import TableParts
from features.warehouse import DatasetInfo, Warehouse, slug


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureTable(TableParts):
    """One feature table of one dataset, which may exist or not."""

    dataset: str
    backbone: str
    """Slug of the backbone's name, as in the folder's name."""
    modality: str
    """``image``, ``text``, ``video`` or ``joint``."""
    level: str
    """``pooled`` for one vector an item, else the level of the tokens."""

    @property
    def label(self) -> str:
        """Name in messages and options: ``modality=backbone`` or ``modality=backbone:level``."""
        level = "" if self.level == "pooled" else f":{self.level}"
        return f"{self.modality}={self.backbone}{level}"

    def check(self, fingerprint: str, inputs: str = "") -> dict[str, Any]:
        """Return the manifest, and check that the table is complete for a preparation.

        Args:
            fingerprint: Fingerprint of the order of the items (``DatasetInfo.fingerprint``).
            inputs: Fingerprint of the items' inputs of this modality (``DatasetInfo.inputs``).

        Raises:
            UserError: The table does not exist, is unfinished, or is of another preparation.
        """
        manifest = self.manifest()
        if manifest is None:
            state = "is unfinished" if self.parts() else "does not exist"
            raise UserError(
                f"the feature table {self.label} of {self.dataset} {state}; {self._command()}"
            )
        if manifest["items"] != fingerprint:
            raise UserError(
                f"the feature table {self.label} belongs to an earlier preparation of"
                f" {self.dataset}; {self._command()} (what is already encoded is reused)"
            )
        if manifest.get("inputs", "") != inputs:
            raise UserError(
                f"the feature table {self.label} was made before {self.dataset} was prepared with"
                f" other {self.modality} inputs; {self._command()} (what is the same is reused)"
            )
        return manifest

    def _command(self) -> str:
        """Return the command that makes the table, with the backbone's name as it was given."""
        level = "" if self.level == "pooled" else f" --level {self.level}"
        try:
            made = self.provenance()
        except UserError:
            made = None
        name = shlex.quote(made.backbone if made else self.backbone)
        if made is not None and made.compute == IMPORTED:
            return (
                f"run: mmrec import-features --dataset {self.dataset} --{self.modality} FILE"
                f" --name {name}"
            )
        return f"run: mmrec extract --dataset {self.dataset} --{self.modality} {name}{level}"

    def digest(self) -> str:
        """Return a hash of the items and their content, whatever part holds them."""
        rows = self.small_columns(["item", "content_hash"]).sort_by("item")
        digest = hashlib.sha256(rows["item"].to_numpy().tobytes())
        for buffer in rows["content_hash"].combine_chunks().buffers():
            digest.update(buffer or b"")
        return digest.hexdigest()[:16]

    def identity(self, info: DatasetInfo) -> dict[str, object]:
        """Return the provenance of the table with a digest of its content.

        Raises:
            UserError: There is no table, it is unfinished, or of another preparation.
        """
        manifest = self.check(info.fingerprint, info.inputs_of(self.modality))
        self.verify(manifest)
        provenance = self.provenance()
        return {**(provenance.identity() if provenance else {}), "content": self.digest()}

    def read(
        self,
        n_items: int,
        fingerprint: str,
        inputs: str = "",
        *,
        most_bytes: float = math.inf,
        permutation_seed: int | None = None,
    ) -> FeatureMatrix:
        """Read a pooled table into one matrix.

        A larger matrix than ``most_bytes`` is mapped from a file next to the table's folder. The
        first call writes this file. A permuted matrix has a file of its own.

        Args:
            n_items: N, the number of the dataset's items.
            fingerprint: As for :meth:`check`.
            inputs: As for :meth:`check`.
            most_bytes: Largest size of a matrix in memory.
            permutation_seed: Permute the rows among the items that have one, see
                :func:`features.permutation.permuted_items`; ``None``: do not.

        Raises:
            UserError: The table does not exist, is unfinished, mixed, damaged, or of another
                preparation.
        """
        assert self.level == "pooled"
        manifest, provenance = self._complete(fingerprint, inputs)
        is_mapped = n_items * provenance.dim * np.dtype(provenance.dtype).itemsize > most_bytes
        place_N = None
        if is_mapped or permutation_seed is not None:
            present = np.zeros(n_items, dtype=np.bool_)
            present[items_of(self.small_columns(["item"]), n_items, self.path)] = True
        if permutation_seed is not None:
            place_N = permuted_items(present, permutation_seed, self.label)
        if is_mapped:
            path = self._mapped_file(provenance, permutation_seed)
            vectors = map_vectors(path, self.parts(), n_items, provenance, place_N)
            matrix = FeatureMatrix(vectors=vectors, present=present, provenance=provenance)
        else:
            matrix = read_vectors(self.parts(), n_items, provenance, place_N)
        self._check_rows(int(matrix.present.sum()), manifest)
        return matrix

    def _mapped_file(self, provenance: Provenance, permutation_seed: int | None = None) -> Path:
        """Return the file of the mapped matrix, named after the level and the content."""
        content: list[object] = [self.digest(), provenance.identity()]
        name = self.level
        if permutation_seed is not None:
            content, name = [*content, permutation_seed], f"{name}.permuted"
        identity = json.dumps(content, sort_keys=True)
        digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
        return self.path.with_name(f"{name}-{digest}.npy")

    def read_tokens(self, n_items: int, fingerprint: str, inputs: str = "") -> TokenMatrix:
        """Map a table of tokens into memory.

        The first call writes the mapped file next to the table's folder. Its name is the level and
        a hash of the table's content.

        Args:
            n_items: N, the number of the dataset's items.
            fingerprint: As for :meth:`check`.
            inputs: As for :meth:`check`.

        Raises:
            UserError: The table does not exist, is unfinished, mixed, damaged, or of another
                preparation.
        """
        assert self.level != "pooled"
        manifest, provenance = self._complete(fingerprint, inputs)
        rows = self.small_columns(["item", "n_tokens"])
        item = items_of(rows, n_items, self.path)
        lengths = np.zeros(n_items, np.int64)
        lengths[item] = pc.fill_null(rows["n_tokens"], 0).to_numpy()
        self._check_rows(len(np.unique(item)), manifest)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        for earlier in self.path.glob("tokens-*.npy"):  # of earlier versions
            earlier.unlink()
        return map_tokens(self._mapped_file(provenance), self.parts(), offsets, provenance)

    def _complete(self, fingerprint: str, inputs: str) -> tuple[dict[str, Any], Provenance]:
        """Return the manifest and the provenance of a table that can be read."""
        manifest = self.check(fingerprint, inputs)
        self.verify(manifest)
        provenance = self.provenance()
        if provenance is None:
            raise UserError(
                f"the feature table {self.label} of {self.dataset} holds no vector: no input could"
                " be used; see the view failures, mend the files, and extract again"
            )
        return manifest, provenance

    def _check_rows(self, rows: int, manifest: dict[str, Any]) -> None:
        """Raise UserError unless the number of items with a vector is the manifest's."""
        if rows != manifest["rows"]:
            raise UserError(
                f"the feature table {self.label} of {self.dataset} has vectors of {rows} items, but"
                f" its manifest has {manifest['rows']}; {EXTRACT_AGAIN}"
            )


class FeatureStore:
    """All feature tables of a warehouse."""

    def __init__(self, warehouse: Warehouse) -> None:
        self.warehouse = warehouse

    def table(
        self, dataset: str, backbone: str, modality: str, level: str = "pooled"
    ) -> FeatureTable:
        """Return the table of a backbone, given by name or slug; the table may not exist."""
        name = slug(backbone)
        path = self.warehouse.dataset_dir(dataset) / "features" / name / modality / level
        return FeatureTable(
            dataset=dataset, backbone=name, modality=modality, level=level, path=path
        )

    def read(self, dataset: str, modality: str, backbone: str | None = None) -> FeatureMatrix:
        """Read a pooled table into one matrix, whose row n is item n of the dataset.

        Args:
            dataset: Name of a prepared dataset.
            modality: ``image``, ``text``, ``video`` or ``joint``.
            backbone: Name of the backbone; it can be left out if one pooled table has the modality.

        Raises:
            UserError: There is no such table, there are several, or the table cannot be read.

        Examples:
            >>> store = FeatureStore(Warehouse("warehouse"))
            >>> vectors = store.read("demo", "image").vectors  # doctest: +SKIP
            >>> torch.from_numpy(vectors)  # shares the memory  # doctest: +SKIP
        """
        info = self.warehouse.info(dataset)
        pooled = [
            table
            for table in self.tables(dataset)
            if (table.modality, table.level) == (modality, "pooled")
        ]
        if backbone is not None:
            pooled = [self.table(dataset, backbone, modality)]
        if len(pooled) != 1:
            names = ", ".join(table.label for table in pooled) or "none"
            raise UserError(
                f"dataset {dataset!r} has not one pooled table of {modality!r} but: {names}; name a"
                " backbone, or run mmrec extract"
            )
        return pooled[0].read(info.items, info.fingerprint, info.inputs_of(modality))

    def tables(self, dataset: str) -> list[FeatureTable]:
        """Return the tables of a dataset with at least one part, by modality, backbone, level."""
        root = self.warehouse.dataset_dir(dataset) / "features"
        folders = {part.parent for part in root.glob("*/*/*/part-*.parquet")}
        tables = [
            FeatureTable(
                dataset=dataset,
                backbone=path.parts[-3],
                modality=path.parts[-2],
                level=path.parts[-1],
                path=path,
            )
            for path in folders
        ]
        return sorted(tables, key=lambda t: (t.modality, t.backbone, t.level))


def export_vectors(
    store: FeatureStore, dataset: str, modality: str, backbone: str | None, *, npy: Path, ids: Path
) -> tuple[int, int]:
    """Write the vectors of a pooled table as a NumPy array, and the id of each row's item.

    Items without a vector have no row. Both files are complete or absent.

    Returns:
        The shape of the array: rows and width.

    Raises:
        UserError: There is no such table, or a path is a folder.
    """
    matrix = store.read(dataset, modality, backbone)
    item_ids = load_items(store.warehouse, dataset, ["item_id"])["item_id"].to_pylist()
    rows = matrix.present.nonzero()[0]
    with atomic_write(ids) as temporary:
        temporary.write_text("".join(f"{item_ids[row]}\n" for row in rows.tolist()))
    with atomic_write(npy) as temporary, temporary.open("wb") as stream:
        np.save(stream, matrix.vectors[rows])
    return len(rows), matrix.vectors.shape[1]
