"""Feature tables: parts written whole, read into one contiguous matrix, never mixed.

A table is the folder ``<dataset>/features/<backbone>/<modality>/<level>``. Its parts hold at most
8,192 rows each. Every part's footer carries the table's provenance; ``manifest.json`` is written
last and says that the table is complete for one preparation of the dataset.

Legend: N items of the dataset, R rows of the table, K tokens of all of them, D width.
"""

import hashlib
import json
import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from features.arrow_columns import copy_tokens, items_of, vectors_of
from features.atomic_files import (
    atomic_write,
    open_table,
    read_errors,
    read_table,
    remove_leftovers,
    write_json,
    write_table,
)
from features.errors import UserError
from features.provenance import (
    AGAIN,
    KEY,
    LATER,
    LIGHT,
    WITHOUT,
    Provenance,
    read_provenance,
)
from features.schema import feature_schema
from features.warehouse import Warehouse, read_json, slug

ROWS_PER_PART = 8192
BYTES_PER_PART = 64 << 20
"""Of token tables, whose rows are long."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureMatrix:
    """One table, aligned with the dataset's items."""

    vectors: npt.NDArray[Any]
    """(N, D) C-contiguous, float16 or float32 as stored; absent items are zero."""
    present: npt.NDArray[np.bool_]
    """(N,) which items have a vector."""
    provenance: Provenance


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenMatrix:
    """The tokens of one table, aligned with the dataset's items, on disk until they are read."""

    values: npt.NDArray[Any]
    """(K, D) memory-mapped, float16 or float32 as stored."""
    offsets: npt.NDArray[np.int64]
    """(N + 1,) item i owns ``values[offsets[i]:offsets[i + 1]]``; absent items own nothing."""
    provenance: Provenance


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureTable:
    """One feature table of one dataset, there or not."""

    dataset: str
    backbone: str
    """The folder's name: the slug of the backbone's name."""
    modality: str
    level: str
    path: Path

    @property
    def label(self) -> str:
        """The short form in messages and options: ``modality=backbone``, ``:level`` behind it."""
        level = "" if self.level == "pooled" else f":{self.level}"
        return f"{self.modality}={self.backbone}{level}"

    def parts(self) -> list[Path]:
        """The parts that are whole, in order."""
        return sorted(self.path.glob("part-*.parquet"))

    def manifest(self) -> dict[str, Any] | None:
        """What was written last, or nothing while the extraction is unfinished."""
        path = self.path / "manifest.json"
        if not path.exists():
            return None
        document = read_json(path, AGAIN)
        if not isinstance(document, dict) or not {"items", "rows"} <= document.keys():
            raise UserError(f"{path} is damaged (items or rows is missing); {AGAIN}")
        return document

    def provenance(self) -> Provenance | None:
        """The provenance that all parts share, or nothing when there is no part.

        Raises:
            UserError: Two parts differ, or a part bears no provenance.
        """
        found: Provenance | None = None
        for part in self.parts():
            here = read_provenance(part)
            if found is None:
                found = here
            elif here.identity() != found.identity():
                raise UserError(
                    f"{self.path} mixes two extractions ({found.difference(here)} in {part.name});"
                    " remove the folder and run mmrec extract again"
                )
        return found

    def light(self, columns: Sequence[str] = LIGHT) -> pa.Table:
        """Every row without its embedding, and ``part``, the index of its part in ``parts()``.

        Args:
            columns: Only these; each has up to 40 bytes a row.
        """
        columns = list(columns)
        tables = []
        for index, part in enumerate(self.parts()):
            rows = self.rows(part, columns).select(columns)
            tables.append(rows.append_column("part", pa.array(np.full(len(rows), index, np.int32))))
        if tables:
            return pa.concat_tables(tables)
        empty = pa.schema([feature_schema(1, "float16").field(name) for name in columns])
        return empty.append(pa.field("part", pa.int32())).empty_table()

    def rows(self, part: Path, columns: Sequence[str] | None = None) -> pa.Table:
        """Read one of ``parts()``, or some of its columns.

        Raises:
            UserError: It cannot be read, or its bytes are not those that were written.
        """
        with read_errors(part, WITHOUT):
            return read_table(part, columns)

    def check(self, fingerprint: str, inputs: str = "") -> dict[str, Any]:
        """Give the manifest of a table that is complete for one preparation of the dataset.

        Args:
            fingerprint: Of the order of items, from the dataset's description.
            inputs: Of what the items have of this modality, from there too.

        Raises:
            UserError: There is no table, it is unfinished, or of another preparation.
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
        """What makes the table, with the backbone's name as it was given; a remedy."""
        level = "" if self.level == "pooled" else f" --level {self.level}"
        try:
            made = self.provenance()
        except UserError:
            made = None
        name = shlex.quote(made.backbone if made else self.backbone)
        return f"run: mmrec extract --dataset {self.dataset} --{self.modality} {name}{level}"

    def digest(self) -> str:
        """Hash of which content stands behind each item's vector, whatever part holds it."""
        rows = self.light(["item", "content_hash"]).sort_by("item")
        found = hashlib.sha256(rows["item"].to_numpy().tobytes())
        for chunk in rows["content_hash"].combine_chunks().buffers():
            found.update(chunk or b"")
        return found.hexdigest()[:16]

    def read(self, n_items: int, fingerprint: str, inputs: str = "") -> FeatureMatrix:
        """Read the table into one matrix, part by part, without an object per row.

        Args:
            n_items: N, the dataset's items.
            fingerprint: Fingerprint of their order, from the dataset's description.
            inputs: Fingerprint of what they have of this modality, from there too.

        Raises:
            UserError: There is no table, it is unfinished, mixed, or of another preparation.
        """
        assert self.level == "pooled"
        manifest, provenance = self._complete(fingerprint, inputs)
        vectors = np.zeros((n_items, provenance.dim), dtype=provenance.dtype)
        present = np.zeros(n_items, dtype=np.bool_)
        for part in self.parts():
            for rows in _row_groups(part):
                item = items_of(rows, n_items, part)
                vectors[item] = vectors_of(rows, provenance.dim)
                present[item] = True
        self._check_rows(int(present.sum()), manifest)
        return FeatureMatrix(vectors=vectors, present=present, provenance=provenance)

    def read_tokens(self, n_items: int, fingerprint: str, inputs: str = "") -> TokenMatrix:
        """Map a table of tokens into memory; the first reader writes the file that is mapped.

        That file stands beside the parts and is named by their content. Memory stays flat: one
        part at a time is copied into it, and what is mapped is read when it is looked at.

        Args:
            n_items: N, the dataset's items.
            fingerprint: Fingerprint of their order, from the dataset's description.
            inputs: Fingerprint of what they have of this modality, from there too.

        Raises:
            UserError: There is no table, it is unfinished, mixed, or of another preparation.
        """
        assert self.level != "pooled"
        manifest, provenance = self._complete(fingerprint, inputs)
        light = self.light(["item", "n_tokens"])
        item = items_of(light, n_items, self.path)
        lengths = np.zeros(n_items, np.int64)
        lengths[item] = pc.fill_null(light["n_tokens"], 0).to_numpy()
        self._check_rows(len(np.unique(item)), manifest)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        shape = (int(offsets[-1]), provenance.dim)
        identity = json.dumps([self.digest(), provenance.identity()], sort_keys=True)
        path = self.path / f"tokens-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.npy"
        if not path.exists():
            with atomic_write(path) as beside:
                values = np.lib.format.open_memmap(beside, "w+", provenance.dtype, shape)
                with beside.open(
                    "rb+"
                ) as stream:  # a full disk is an error now, not a signal later
                    os.posix_fallocate(stream.fileno(), 0, beside.stat().st_size)
                for part in self.parts():
                    for rows in _row_groups(part):
                        copy_tokens(rows, offsets, values, part)
                values.flush()
                del values
            for older in self.path.glob("tokens-*.npy"):
                if older != path:
                    older.unlink()
        with read_errors(path, "remove it; it is made again"):
            mapped = np.load(path, mmap_mode="r")
            if mapped.shape != shape or mapped.dtype != provenance.dtype:
                raise UserError(f"{path} is damaged; remove it; it is made again")
        return TokenMatrix(values=mapped, offsets=offsets, provenance=provenance)

    def _complete(self, fingerprint: str, inputs: str) -> tuple[dict[str, Any], Provenance]:
        manifest = self.check(fingerprint, inputs)
        provenance = self.provenance()
        if provenance is None:
            raise UserError(
                f"the feature table {self.label} of {self.dataset} holds no vector: no input could"
                " be used; see the view failures, mend the files, and extract again"
            )
        return manifest, provenance

    def _check_rows(self, found: int, manifest: dict[str, Any]) -> None:
        if found != manifest["rows"]:
            raise UserError(
                f"the feature table {self.label} of {self.dataset} has vectors of"
                f" {found} items, its manifest says {manifest['rows']}; {AGAIN}"
            )

    # -- writing (one writer at a time; the caller holds the lock) ---------------------------

    def append(self, rows: pa.Table, provenance: Provenance) -> Path:
        """Write ``rows`` (of :func:`features.schema.feature_schema`) as one new part.

        Raises:
            UserError: The table holds vectors of another provenance.
        """
        assert 0 < len(rows) <= ROWS_PER_PART
        held = self.parts()
        if held:
            there = read_provenance(held[-1])
            if there.identity() != provenance.identity():
                raise UserError(
                    f"{self.path} holds other vectors ({there.difference(provenance)});"
                    " remove the folder or give another backbone"
                )
            if LATER in rows.column_names and LATER not in pq.read_schema(held[-1]).names:
                rows = rows.drop_columns([LATER])  # all parts of a table have the same columns
        number = int(held[-1].stem.removeprefix("part-")) + 1 if held else 0
        path = self.path / f"part-{number:05d}.parquet"
        self._write(path, rows, provenance)
        return path

    def rewrite(self, part: Path, keep: npt.NDArray[np.bool_], item: npt.NDArray[np.int32]) -> None:
        """Keep some rows of a part under new item indices, or remove the part when none stays.

        Args:
            part: One of ``parts()``.
            keep: (R,) which of its rows stay.
            item: (R,) the item index of every row; those of dropped rows are ignored.
        """
        self.unfinish()
        if not keep.any():
            part.unlink()
            return
        rows = self.rows(part)
        rows = rows.set_column(0, rows.schema.field("item"), pa.array(item, pa.int32()))
        self._write(part, rows.filter(pa.array(keep)), read_provenance(part))

    def unfinish(self) -> None:
        """Take the manifest away: what follows changes the table."""
        (self.path / "manifest.json").unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove every part, when none of them can be used any more."""
        self.unfinish()
        for part in self.parts():
            part.unlink()

    def finish(self, fingerprint: str, provenance: Provenance, **more: Any) -> None:
        """Say that the table is complete for the preparation with this fingerprint."""
        remove_leftovers(self.path)
        rows = sum(pq.read_metadata(part).num_rows for part in self.parts())
        document = {"items": fingerprint, "rows": rows, "provenance": asdict(provenance), **more}
        write_json(self.path / "manifest.json", document)

    def _write(self, path: Path, rows: pa.Table, provenance: Provenance) -> None:
        schema = feature_schema(provenance.dim, provenance.dtype, provenance.level)
        if LATER not in rows.column_names:
            schema = schema.remove(schema.get_field_index(LATER))
        assert rows.schema.equals(schema), (rows.schema, schema)
        metadata = {KEY: json.dumps(asdict(provenance), sort_keys=True).encode()}
        # Plain, uncompressed, no dictionary, no statistics on the embedding: nine times faster
        # to read than the writer's defaults, for 7% more disk.
        write_table(
            path,
            rows.replace_schema_metadata(metadata),
            row_group_size=ROWS_PER_PART,
            compression="none",
            use_dictionary=False,
            write_statistics=["item", "item_id"],
        )


class FeatureStore:
    """All feature tables of a warehouse."""

    def __init__(self, warehouse: Warehouse) -> None:
        self.warehouse = warehouse

    def table(
        self, dataset: str, backbone: str, modality: str, level: str = "pooled"
    ) -> FeatureTable:
        """The table of a backbone (its name or slug), there or not."""
        name = slug(backbone)
        path = self.warehouse.dataset_dir(dataset) / "features" / name / modality / level
        return FeatureTable(
            dataset=dataset, backbone=name, modality=modality, level=level, path=path
        )

    def tables(self, dataset: str) -> list[FeatureTable]:
        """Every table of a dataset that has at least one part, ordered by modality and name."""
        root = self.warehouse.dataset_dir(dataset) / "features"
        found = {part.parent for part in root.glob("*/*/*/part-*.parquet")}
        tables = [
            FeatureTable(
                dataset=dataset,
                backbone=path.parts[-3],
                modality=path.parts[-2],
                level=path.parts[-1],
                path=path,
            )
            for path in found
        ]
        return sorted(tables, key=lambda t: (t.modality, t.backbone, t.level))


def _row_groups(part: Path) -> Iterator[pa.Table]:
    with read_errors(part, WITHOUT), open_table(part) as file:
        for group in range(file.num_row_groups):
            yield file.read_row_group(group, columns=["item", "embedding"])
