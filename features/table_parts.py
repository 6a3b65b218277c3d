"""Folders of Parquet parts with one provenance and a manifest.

The parts hold at most 8,192 rows each. The footer of every part carries the provenance of the
table. The manifest, ``<level>.json``, is written last: with it, the table is complete for one
preparation of the dataset.

Shape suffixes in descriptions: R rows of one part.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from features.atomic_files import (
    read_errors,
    read_table,
    remove_leftovers,
    require_path,
    write_table,
)
from features.checksums import read_checksums, verify_files
from features.documents import read_json, write_json
from features.errors import DamagedError, UserError
from features.provenance import (
    EXTRACT_AGAIN,
    METADATA_KEY,
    OPTIONAL_COLUMN,
    REMOVE_FILE,
    SMALL_COLUMNS,
    Provenance,
    read_provenance,
)
from features.schema import feature_schema

ROWS_PER_PART = 8192
"""Most rows of one part. A part is also the unit of resuming an extraction."""
BYTES_PER_PART = 64 << 20
"""Bytes at which a part of a token table ends, because rows of tokens are long."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TableParts:
    """The files of one feature table, which may exist or not.

    Writing is for one process at a time: the caller holds the lock of the extraction.
    """

    path: Path
    """Folder of the table."""

    def parts(self) -> list[Path]:
        """Return the complete parts, in order."""
        return sorted(self.path.glob("part-*.parquet"))

    def manifest(self) -> dict[str, Any] | None:
        """Return the manifest, or None while the extraction is unfinished.

        Raises:
            UserError: The manifest is damaged.
        """
        path = self.manifest_path if self.manifest_path.exists() else self._earlier_manifest
        if not path.exists():
            return None
        document = read_json(path, EXTRACT_AGAIN)
        if not isinstance(document, dict) or not {"items", "rows"} <= document.keys():
            raise DamagedError(f"{path} is damaged (items or rows is missing); {EXTRACT_AGAIN}")
        was_removed = document["rows"] != 0 and not self.parts()
        return None if was_removed else document

    @property
    def manifest_path(self) -> Path:
        """File of the manifest, next to the folder, so that the folder holds nothing but Parquet.

        polars refuses a folder with other files.
        """
        return self.path.with_name(f"{self.path.name}.json")

    @property
    def _earlier_manifest(self) -> Path:
        """File of the manifest of tables of earlier versions."""
        return self.path / "manifest.json"

    def verify(self, manifest: dict[str, Any]) -> None:
        """Check the bytes of every part, and that the parts are those of the manifest.

        Args:
            manifest: The manifest of the table. Those of earlier versions do not name the parts.

        Raises:
            UserError: The bytes of a part have changed since it was written, or the part is one of
                another table.
        """
        for part in self.parts():
            with read_errors(part, REMOVE_FILE):
                verify_files([part], manifest.get("parts", {}))

    def provenance(self) -> Provenance | None:
        """Return the provenance that all parts share, or None if there is no part.

        Raises:
            UserError: Two parts differ, or a part has no provenance.
        """
        first: Provenance | None = None
        for part in self.parts():
            provenance = read_provenance(part)
            if first is None:
                first = provenance
            elif provenance.identity() != first.identity():
                raise UserError(
                    f"{self.path} mixes two extractions ({first.difference(provenance)} in"
                    f" {part.name}); remove the folder and run mmrec extract again"
                )
        return first

    def small_columns(self, columns: Sequence[str] = SMALL_COLUMNS) -> pa.Table:
        """Read the columns other than the embedding, of all parts.

        Args:
            columns: Columns to read; each has up to 40 bytes a row.

        Returns:
            The columns, and ``part``: the index of the row's part in ``parts()``.
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
            UserError: The part cannot be read, or its bytes have changed since it was written.
        """
        with read_errors(part, REMOVE_FILE):
            return read_table(part, columns)

    def append(self, rows: pa.Table, provenance: Provenance) -> Path:
        """Write rows as one new part.

        Args:
            rows: Table with :func:`features.schema.feature_schema`, 1 to 8,192 rows.
            provenance: Provenance of the rows.

        Returns:
            Path of the part.

        Raises:
            UserError: The table holds vectors of another provenance.
        """
        assert 0 < len(rows) <= ROWS_PER_PART
        parts = self.parts()
        if parts:
            last = read_provenance(parts[-1])
            if last.identity() != provenance.identity():
                raise UserError(
                    f"{self.path} holds other vectors ({last.difference(provenance)});"
                    " remove the folder or give another backbone"
                )
            if (
                OPTIONAL_COLUMN in rows.column_names
                and OPTIONAL_COLUMN not in pq.read_schema(parts[-1]).names
            ):
                rows = rows.drop_columns(
                    [OPTIONAL_COLUMN]
                )  # all parts of a table have the same columns
        number = int(parts[-1].stem.removeprefix("part-")) + 1 if parts else 0
        path = self.path / f"part-{number:05d}.parquet"
        self._write(path, rows, provenance)
        return path

    def rewrite(self, part: Path, keep: npt.NDArray[np.bool_], item: npt.NDArray[np.int32]) -> None:
        """Keep some rows of a part under new item indices, or remove the part when none stays.

        Args:
            part: One of ``parts()``.
            keep: (R,) which of its rows stay.
            item: (R,) new item index of every row; those of dropped rows are ignored.
        """
        self.unfinish()
        if not keep.any():
            part.unlink()
            return
        rows = self.rows(part)
        rows = rows.set_column(0, rows.schema.field("item"), pa.array(item, pa.int32()))
        self._write(part, rows.filter(pa.array(keep)), read_provenance(part))

    def unfinish(self) -> None:
        """Remove the manifest, before the table is changed."""
        self.manifest_path.unlink(missing_ok=True)
        self._earlier_manifest.unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove the manifest and every part."""
        self.unfinish()
        for part in self.parts():
            part.unlink()

    def finish(self, fingerprint: str, provenance: Provenance, **entries: Any) -> None:
        """Write the manifest: the table is complete for the preparation with this fingerprint.

        Args:
            fingerprint: Fingerprint of the order of the items.
            provenance: Provenance of the table.
            entries: Further entries of the manifest.
        """
        require_path(self.path)
        for folder in (self.path, self.path.parent):
            remove_leftovers(folder)
        rows = sum(pq.read_metadata(part).num_rows for part in self.parts())
        document = {
            "items": fingerprint, "rows": rows, "parts": read_checksums(self.parts()),
            "provenance": asdict(provenance), **entries,
        }  # fmt: skip
        write_json(self.manifest_path, document)
        self._earlier_manifest.unlink(missing_ok=True)

    def _write(self, path: Path, rows: pa.Table, provenance: Provenance) -> None:
        schema = feature_schema(provenance.dim, provenance.dtype, provenance.level)
        if OPTIONAL_COLUMN not in rows.column_names:
            schema = schema.remove(schema.get_field_index(OPTIONAL_COLUMN))
        assert rows.schema.equals(schema), (rows.schema, schema)
        metadata = {METADATA_KEY: json.dumps(asdict(provenance), sort_keys=True).encode()}
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
