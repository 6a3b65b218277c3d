"""One feature table while it is being extracted: what it holds, what is new, what is stale.

Rows are matched with the dataset by ``item_id`` and with the input by its content hash, so a row
survives a kill, another preparation of the dataset, and a second item with the same content. The
order of steps makes every kill harmless: new rows are appended before old ones are dropped, a
later part is the newer one, and the manifest is away for as long as anything changes.

Legend: N items of the dataset, R rows of the table, T tokens of an item, D width.
"""

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from features.arrow_columns import embedding_array, positions, token_array
from features.provenance import Provenance
from features.schema import feature_schema
from features.store import BYTES_PER_PART, ROWS_PER_PART, FeatureTable
from pipeline.extraction.digests import DTYPE, digest, digests, place

SECONDS_PER_PART = 30.0
"""A part is written after this much work even when it is small: what a kill can cost."""


@dataclass(kw_only=True, slots=True)
class _Buffer:
    """Rows that wait for their part."""

    items: list[int] = field(default_factory=list)
    hashes: list[str] = field(default_factory=list)
    frames: list[int | None] = field(default_factory=list)
    tokens: list[int | None] = field(default_factory=list)
    partial: list[bool | None] = field(default_factory=list)
    vectors: list[npt.NDArray[Any]] = field(default_factory=list)
    bytes: int = 0
    since: float = field(default_factory=time.monotonic)


class FeatureTableWriter:
    """The rows of one table, by item and by content.

    Args:
        table: The table; the caller holds its lock.
        provenance: What new rows are made with; rows that are there have the same identity.
        item_ids: (N,) the dataset's item ids, in the order of ``item``.
    """

    def __init__(
        self, table: FeatureTable, provenance: Provenance, item_ids: pa.ChunkedArray
    ) -> None:
        self.table = table
        self.provenance = provenance
        self._item_ids = item_ids
        self._changed = False
        self._buffer = _Buffer()
        self._settle()
        light = table.light(["item", "content_hash"])
        item = light["item"].to_numpy()
        hashes = digests(light["content_hash"])
        # 33 bytes for each item, and no object.
        self._own = np.zeros(len(item_ids), DTYPE)  # content of each item's row
        self._own[item] = hashes
        self._stored = np.sort(hashes)
        self._stale = np.zeros(len(item_ids), np.bool_)  # until the item's content is seen again
        self._stale[item] = True

    def _settle(self) -> None:
        """Bring what earlier runs left to the present items: one row an item, new indices."""
        light = self.table.light(["item", "item_id"])
        if not len(light):
            return
        now = positions(light.column("item_id"), self._item_ids)
        order = np.arange(len(now))
        last = np.full(len(self._item_ids) + 1, -1)
        last[now] = order  # the last assignment stays: a later part is the newer one
        keep = (now >= 0) & (last[now] == order)
        moved = now != light.column("item").to_numpy()
        part_of = light.column("part").to_numpy()
        for number, part in enumerate(self.table.parts()):
            mine = part_of == number
            if (moved | ~keep)[mine].any():
                self._change()
                self.table.rewrite(part, keep[mine], now[mine])

    def _change(self) -> None:
        self._changed = True
        self.table.unfinish()

    # -- what is there ----------------------------------------------------------------------

    def has(self, item: int, content: str) -> bool:
        """Whether the item's own row was made from this content."""
        return bool(self._own[item] == digest(content))

    def knows(self, content: str) -> bool:
        """Whether some row was made from this content before this run."""
        return place(digest(content), self._stored) >= 0

    def keep(self, item: int) -> None:
        """Say that the item's row, when it has one, is not stale."""
        self._stale[item] = False

    # -- what is new ------------------------------------------------------------------------

    def add(
        self,
        item: int,
        content: str,
        vector: npt.NDArray[Any],
        *,
        frames: int | None = None,
        tokens: int | None = None,
        partial: bool | None = None,
    ) -> None:
        """Take one new vector (D,), or its tokens (T, D), already in the dtype of the table.

        Parts are written when they are full, and when it is time.
        """
        if not self._buffer.items:
            self._buffer.since = time.monotonic()
        self._buffer.items.append(item)
        self._buffer.hashes.append(content)
        self._buffer.frames.append(frames)
        self._buffer.tokens.append(tokens)
        self._buffer.partial.append(partial)
        self._buffer.vectors.append(vector)
        self._buffer.bytes += vector.nbytes
        waited = time.monotonic() - self._buffer.since
        full = len(self._buffer.items) == ROWS_PER_PART
        if full or self._buffer.bytes >= BYTES_PER_PART or waited >= SECONDS_PER_PART:
            self.flush()

    def flush(self) -> None:
        """Write what waits as one part, its rows in the order of items."""
        waiting = self._buffer
        if not waiting.items:
            return
        item = np.asarray(waiting.items, dtype=np.int32)
        columns = [
            pa.array(item),
            self._item_ids.take(pa.array(item)).combine_chunks(),
            pa.array(waiting.hashes, pa.string()),
            pa.array(waiting.frames, pa.int32()),
            pa.array(waiting.tokens, pa.int32()),
            pa.array(waiting.partial, pa.bool_()),
            embedding_array(np.stack(waiting.vectors))
            if self.provenance.level == "pooled"
            else token_array(waiting.vectors),
        ]
        self._append(pa.Table.from_arrays(columns, schema=self._schema).take(np.argsort(item)))
        self._buffer = _Buffer()  # only now: an interrupted flush can be done again
        self._stale[item] = False
        pa.default_memory_pool().release_unused()  # Arrow keeps some 30 MB of each

    @property
    def _schema(self) -> pa.Schema:
        made = self.provenance
        return feature_schema(made.dim, made.dtype, made.level)

    def _append(self, rows: pa.Table) -> None:
        self._change()
        self.table.append(rows, self.provenance)

    # -- bringing it to an end --------------------------------------------------------------

    def copy(self, wanted: dict[int, str]) -> int:
        """Give items the stored vector of the same content; return how many got one.

        Args:
            wanted: Content hash by item, for contents that stand in the table by now.
        """
        self.flush()
        items = np.fromiter(wanted.keys(), np.int32, len(wanted))
        sought = np.fromiter(map(digest, wanted.values()), DTYPE, len(wanted))
        missing = np.ones(len(wanted), np.bool_)
        for part in self.table.parts():
            there = digests(self.table.rows(part, ["content_hash"])["content_hash"])
            order = np.argsort(there)
            source = np.searchsorted(there, sought, sorter=order).clip(max=len(there) - 1)
            here = np.flatnonzero(missing & (there[order[source]] == sought))
            if not len(here):
                continue
            missing[here] = False
            rows = self.table.rows(part)
            most = max(1, min(ROWS_PER_PART, BYTES_PER_PART * len(rows) // rows.nbytes))
            for start in range(0, len(here), most):
                chosen = here[start : start + most]
                chosen = chosen[np.argsort(items[chosen])]
                made = rows.take(order[source[chosen]])
                item = pa.array(items[chosen])
                made = made.set_column(0, made.schema.field(0), item)
                ids = self._item_ids.take(item).combine_chunks()
                self._append(made.set_column(1, made.schema.field(1), ids))
        assert not missing.any()
        self._stale[items] = False
        return len(wanted)

    def finish(self, fingerprint: str, inputs: str, **more: Any) -> None:
        """Drop what is stale, join small parts, and say that the table is complete."""
        self.flush()
        self._drop_stale()
        self._join()
        self.table.finish(fingerprint, self.provenance, inputs=inputs, **more)

    def _drop_stale(self) -> None:
        """Remove the rows of items whose content is gone or has another row by now."""
        light = self.table.light(["item"])
        item = light["item"].to_numpy()
        last = np.full(len(self._item_ids), -1)
        last[item] = np.arange(len(item))
        drop = self._stale[item] | (last[item] != np.arange(len(item)))
        part_of = light["part"].to_numpy()
        for number, part in enumerate(self.table.parts()):
            mine = part_of == number
            if drop[mine].any():
                self._change()
                self.table.rewrite(part, ~drop[mine], item[mine])
        self._stale[:] = False

    def _join(self) -> None:
        """Write neighbouring small parts as one; a kill between leaves twins, not gaps."""
        parts = self.table.parts()
        pooled = self.provenance.level == "pooled"
        groups: list[list[int]] = []
        rows_left = bytes_left = 0
        for number, part in enumerate(parts):
            rows, size = pq.read_metadata(part).num_rows, 0 if pooled else part.stat().st_size
            if rows > rows_left or size > bytes_left:
                groups.append([])
                rows_left, bytes_left = ROWS_PER_PART, BYTES_PER_PART
            groups[-1].append(number)
            rows_left, bytes_left = rows_left - rows, bytes_left - size
        for group in groups:
            if len(group) < 2:
                continue
            whole = pa.concat_tables([self.table.rows(parts[number]) for number in group])
            self._append(whole.replace_schema_metadata(None).sort_by("item").combine_chunks())
            for number in group:
                parts[number].unlink()
