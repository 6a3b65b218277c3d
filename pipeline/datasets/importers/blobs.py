"""Pictures that stand as bytes in a Parquet file, copied into one tar of the dataset's own.

A row of a Parquet file can only be had by reading all rows before it of its row group, so encoding
the items in their own order from the raw file would read it many times over. The tar is named by
content: the same picture has the same reference, another one another.
"""

import hashlib
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from features.atomic_files import atomic_write
from features.dataset import quoted
from features.errors import UserError
from pipeline.datasets.importers.base import Blobs
from pipeline.datasets.importers.raw_sql import ident
from pipeline.media.references import PREPARED, relative_reference

MEDIA = "media"
"""The folder of a dataset that holds what preparing copied."""
_NAME = "images.tar"
_ROWS = 16  # pictures in memory at once
_REFERENCES = 4096  # references in memory at once


def store_blobs(
    db: duckdb.DuckDBPyConnection, blobs: Blobs, root: Path, folder: Path, *, all_items: bool
) -> None:
    """Copy the pictures of the items that stay, and put their references into ``raw_items``.

    Args:
        db: With the tables ``raw_items``, ``item_ids`` and ``core``.
        blobs: Where the pictures are.
        root: The raw root, for rows that have a path in place of bytes.
        folder: Where the tar goes.
        all_items: Whether items without an interaction stay.

    Raises:
        UserError: The file is damaged, or a path in it leads outside the root.
    """
    source = f"read_parquet({quoted(str(blobs.path))}, file_row_number = true)"
    item = f"{ident(blobs.item)}::VARCHAR"
    only = "" if all_items else " SEMI JOIN core USING (i)"
    rows = db.sql(
        f"SELECT file_row_number AS row FROM {source}"
        f" WHERE {item} IN (SELECT item_id FROM item_ids{only}) ORDER BY row"
    ).fetchnumpy()["row"]
    db.execute("CREATE TABLE _blobs (row BIGINT, image VARCHAR)")
    with atomic_write(folder / _NAME) as beside, beside.open("wb") as stream:
        for chunk in _references(_copied(blobs, root, np.asarray(rows), stream)):
            db.register("_chunk", chunk)
            db.execute("INSERT INTO _blobs SELECT * FROM _chunk")
            db.unregister("_chunk")
        stream.write(bytes(2 * tarfile.BLOCKSIZE))
    db.execute(
        "UPDATE raw_items SET image = found.image FROM"
        f" (SELECT {item} AS item_id, image FROM (SELECT {ident(blobs.item)}, file_row_number"
        f" FROM {source}) JOIN _blobs ON row = file_row_number) found"
        " WHERE raw_items.item_id = found.item_id"
    )
    db.execute("DROP TABLE _blobs")


def _references(pairs: Iterator[tuple[int, str]]) -> Iterator[pa.Table]:
    rows: list[int] = []
    images: list[str] = []
    for row, image in pairs:
        rows.append(row)
        images.append(image)
        if len(rows) == _REFERENCES:
            yield pa.table({"row": rows, "image": images})
            rows, images = [], []
    if rows:
        yield pa.table({"row": rows, "image": images})


def _copied(
    blobs: Blobs, root: Path, rows: npt.NDArray[np.int64], stream: BinaryIO
) -> Iterator[tuple[int, str]]:
    """Give (row, reference) of the chosen rows that have a picture, copying as they come."""
    for row, value in _values(blobs, rows):
        data, path = (value["bytes"], value["path"]) if isinstance(value, dict) else (value, None)
        if data is not None:
            name = hashlib.sha256(data).hexdigest()[:32]
            header = tarfile.TarInfo(name)
            header.size = len(data)
            stream.write(header.tobuf(tarfile.GNU_FORMAT))
            stream.write(data)
            stream.write(bytes(-len(data) % tarfile.BLOCKSIZE))
            yield row, f"{PREPARED}{MEDIA}/{_NAME}#{name}"
        elif path:
            reference = relative_reference(root, path)
            if reference is None:
                raise UserError(
                    f"{blobs.path}, row {row + 1}: {blobs.column} {path[:120]!r} leads outside"
                    f" {root}; put it below that folder, or its bytes into the table"
                )
            yield row, reference


def _values(blobs: Blobs, rows: npt.NDArray[np.int64]) -> Iterator[tuple[int, Any]]:
    """Stream the column, some rows at a time; what is not chosen is not made an object."""
    start = 0
    try:
        # Not buffered ahead, which would hold whole row groups.
        with pq.ParquetFile(blobs.path, buffer_size=1 << 20, pre_buffer=False) as file:
            batches = file.iter_batches(_ROWS, columns=[blobs.column], use_threads=False)
            for batch in batches:
                low, high = np.searchsorted(rows, (start, start + len(batch)))
                column = batch.column(0)
                for row in rows[low:high].tolist():
                    value = column[row - start].as_py()
                    if value is not None:
                        yield row, value
                start += len(batch)
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{blobs.path}: {reason}; copy the file again") from None
