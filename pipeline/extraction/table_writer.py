"""Write one feature table: add new rows, reuse the rows of earlier runs, drop stale ones.

A row is matched with an item by ``item_id``, and with the item's input by the content hash. A row
can therefore be reused after a kill, after another preparation of the dataset, and for another item
with the same content. The order of the steps makes a kill harmless at any time: new rows are
appended before stale rows are dropped, the later of two rows of an item is valid, and the manifest
is removed before the first change.

Legend: N items of the dataset, R rows of the table, T tokens of an item, D width.
"""

import time
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from features.arrow_columns import embedding_array, positions, token_array
from features.atomic_files import remove_leftovers, require_path
from features.errors import UserError
from features.provenance import Provenance
from features.schema import feature_schema
from features.store import FeatureTable
from features.table_parts import BYTES_PER_PART, ROWS_PER_PART
from pipeline.extraction.deduplication import EncodedRow, RowStore

SECONDS_PER_PART = 30.0
"""Seconds after which a part is written even if it is small. A kill loses at most this work."""


class FeatureTableWriter(RowStore):
    """The rows of one feature table, by item and by content.

    Args:
        table: The table. The caller holds its lock.
        provenance: Provenance of new rows; the rows of the table have the same identity.
        item_ids: (N,) the dataset's item ids, in the order of ``item``.
    """

    def __init__(
        self, table: FeatureTable, provenance: Provenance, item_ids: pa.ChunkedArray
    ) -> None:
        self.table = table
        self.provenance = provenance
        self._item_ids = item_ids
        self._waiting: list[EncodedRow] = []
        self._waiting_bytes = 0
        self._waiting_since = 0.0
        remove_leftovers(table.path)
        self._match_items()
        # The content of each item's stored row.
        self._content: list[str | None] = [None] * len(item_ids)
        self._stored: set[str] = set()  # the contents of all stored rows
        self._is_stale = np.zeros(len(item_ids), np.bool_)  # until the content is seen again
        self._has_row = np.zeros(len(item_ids), np.bool_)  # in a part, valid or stale
        for batch in table.small_columns(["item", "content_hash"]).to_batches():
            items, contents = batch["item"].to_pylist(), batch["content_hash"].to_pylist()
            for item, content in zip(items, contents, strict=True):
                self._content[item] = content
            self._stored.update(contents)
            self._is_stale[items] = True
            self._has_row[items] = True

    def _match_items(self) -> None:
        """Renumber the stored rows by the current dataset; drop rows of items that are gone."""
        columns = self.table.small_columns(["item", "item_id"])
        if not len(columns):
            return
        item = positions(columns.column("item_id"), self._item_ids)
        row = np.arange(len(item))
        last = np.full(len(self._item_ids) + 1, -1)
        last[item] = row  # of several rows of an item, the last assignment counts: the later part
        keep = (item >= 0) & (last[item] == row)
        has_moved = item != columns.column("item").to_numpy()
        part_of = columns.column("part").to_numpy()
        for number, part in enumerate(self.table.parts()):
            in_part = part_of == number
            if (has_moved | ~keep)[in_part].any():
                self.table.unfinish()
                self.table.rewrite(part, keep[in_part], item[in_part])

    # -- stored rows ------------------------------------------------------------------------

    def has(self, item: int, content: str) -> bool:
        """Return True if the item's stored row was made from this content."""
        return self._content[item] == content

    def has_content(self, content: str) -> bool:
        """Return True if an earlier run has stored a row made from this content."""
        return content in self._stored

    def keep(self, item: int) -> None:
        """Keep the item's stored row, if there is one."""
        self._is_stale[item] = False

    # -- new rows ---------------------------------------------------------------------------

    def add(self, row: EncodedRow) -> None:
        """Add one new row, its vector already in the dtype of the table.

        A part is written when it is full, and after :data:`SECONDS_PER_PART`.
        """
        if not self._waiting:
            self._waiting_since = time.monotonic()
        self._waiting.append(row)
        self._waiting_bytes += row.vector.nbytes
        is_full = len(self._waiting) == ROWS_PER_PART or self._waiting_bytes >= BYTES_PER_PART
        if is_full or time.monotonic() - self._waiting_since >= SECONDS_PER_PART:
            self.flush()

    def flush(self) -> None:
        """Write the waiting rows as one part, in the order of items."""
        rows = sorted(self._waiting, key=lambda row: row.item)
        if not rows:
            return
        item = pa.array([row.item for row in rows], pa.int32())
        vectors = [row.vector for row in rows]
        is_pooled = self.provenance.level == "pooled"
        columns = [
            item,
            self._item_ids.take(item).combine_chunks(),
            pa.array([row.content for row in rows], pa.string()),
            pa.array([row.frames for row in rows], pa.int32()),
            pa.array([row.tokens for row in rows], pa.int32()),
            pa.array([row.partial for row in rows], pa.bool_()),
            embedding_array(np.stack(vectors)) if is_pooled else token_array(vectors),
        ]
        provenance = self.provenance
        schema = feature_schema(provenance.dim, provenance.dtype, provenance.level)
        self._append(pa.Table.from_arrays(columns, schema=schema))
        # Cleared after writing, so that a failed flush can be repeated.
        self._waiting, self._waiting_bytes = [], 0
        self._is_stale[item.to_numpy()] = False
        self._has_row[item.to_numpy()] = True
        pa.default_memory_pool().release_unused()  # else Arrow keeps about 30 MB per part

    def _append(self, rows: pa.Table) -> None:
        require_path(self.table.path)
        self.table.unfinish()
        self.table.append(rows, self.provenance)

    def copy(self, contents: dict[int, str]) -> None:
        """Give each item (key) a copy of the stored row of its content (value)."""
        self.flush()
        items = np.fromiter(contents.keys(), np.int32, len(contents))
        hashes = pa.array(contents.values(), pa.string())
        is_missing = np.ones(len(items), np.bool_)
        for part in self.table.parts():
            stored = self.table.rows(part, ["content_hash"])["content_hash"].combine_chunks()
            source = pc.index_in(hashes, value_set=stored)  # row of the part, or null
            indices = np.flatnonzero(is_missing & source.is_valid().to_numpy(zero_copy_only=False))
            if not len(indices):
                continue
            is_missing[indices] = False
            self._append_copies(self.table.rows(part), source, items, indices)
        if is_missing.any():
            raise self._lost_rows()
        self._is_stale[items] = False
        self._has_row[items] = True

    def _append_copies(self, rows: pa.Table, source: pa.Array, items: Any, indices: Any) -> None:
        """Append ``rows[source[i]]`` as the row of ``items[i]`` for each i of ``indices``."""
        step = max(1, min(ROWS_PER_PART, BYTES_PER_PART * len(rows) // rows.nbytes))
        for start in range(0, len(indices), step):
            chosen = indices[start : start + step]
            chosen = chosen[np.argsort(items[chosen])]
            item = pa.array(items[chosen])
            ids = self._item_ids.take(item).combine_chunks()
            copies = rows.take(source.take(pa.array(chosen)))
            copies = copies.set_column(0, copies.schema.field(0), item)
            self._append(copies.set_column(1, copies.schema.field(1), ids))

    # -- completing the table ---------------------------------------------------------------

    def finish(self, fingerprint: str, inputs: str, **entries: Any) -> None:
        """Drop stale rows, join small parts, and write the manifest of the complete table.

        Args:
            fingerprint: Fingerprint of the dataset's preparation.
            inputs: Fingerprint of the inputs of this modality.
            entries: Further entries of the manifest: ``source``, the origin of the backbone's
                weights, from which ``--tune-blocks`` loads the upper blocks; ``request`` and
                ``weights``, see :mod:`pipeline.extraction.unchanged`.

        Raises:
            UserError: The folder or parts of the table were removed meanwhile.
        """
        self.flush()
        self._drop_stale()
        self._join_parts()
        self._check_rows()
        self.table.finish(fingerprint, self.provenance, inputs=inputs, **entries)

    def _drop_stale(self) -> None:
        """Remove the rows whose content is gone, or whose item has a row in a later part."""
        columns = self.table.small_columns(["item"])
        item = columns["item"].to_numpy()
        last = np.full(len(self._item_ids), -1)
        last[item] = np.arange(len(item))
        drop = self._is_stale[item] | (last[item] != np.arange(len(item)))
        part_of = columns["part"].to_numpy()
        for number, part in enumerate(self.table.parts()):
            in_part = part_of == number
            if drop[in_part].any():
                self.table.unfinish()
                self.table.rewrite(part, ~drop[in_part], item[in_part])
        self._has_row &= ~self._is_stale
        self._is_stale[:] = False

    def _join_parts(self) -> None:
        """Join neighbouring small parts. A kill in between leaves duplicate rows and loses none."""
        parts = self.table.parts()
        is_pooled = self.provenance.level == "pooled"
        groups: list[list[int]] = []
        rows_left = bytes_left = 0
        for number, part in enumerate(parts):
            n_rows = pq.read_metadata(part).num_rows
            n_bytes = 0 if is_pooled else part.stat().st_size
            if n_rows > rows_left or n_bytes > bytes_left:
                groups.append([])
                rows_left, bytes_left = ROWS_PER_PART, BYTES_PER_PART
            groups[-1].append(number)
            rows_left, bytes_left = rows_left - n_rows, bytes_left - n_bytes
        for group in groups:
            if len(group) < 2:
                continue
            joined = pa.concat_tables([self.table.rows(parts[number]) for number in group])
            self._append(joined.replace_schema_metadata(None).sort_by("item").combine_chunks())
            for number in group:
                parts[number].unlink()

    def _check_rows(self) -> None:
        """Refuse to complete a table whose parts were removed while it was written."""
        items = self.table.small_columns(["item"])["item"].to_numpy()
        if not np.array_equal(np.sort(items), np.flatnonzero(self._has_row)):
            raise self._lost_rows()

    def _lost_rows(self) -> UserError:
        return UserError(
            f"{self.table.path} lost some of its parts while it was written: another program"
            " removed or replaced them; run mmrec extract again, which encodes what is missing"
        )
