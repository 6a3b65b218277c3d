"""Images that are bytes in a Parquet file, copied into one tar in the folder of the dataset.

Reading one row of a Parquet file means reading the rows before it in its row group. Encoding items
in their own order from the raw file would read the file many times. The name of a member of the
tar is the hash of its bytes: equal images have equal references.
"""

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
from features.errors import UserError
from features.sql_text import quote_identifier, quoted
from pipeline.datasets.importers.base import ImageColumn
from pipeline.datasets.importers.column_types import column_types, id_sql
from pipeline.datasets.importers.reference_columns import ReferenceResolver
from pipeline.media.references import PREPARED, member_name

MEDIA = "media"
"""Folder in a dataset that holds copied media."""
_NAME = "images.tar"
_ROWS = 16  # images in memory at once
_REFERENCES = 4096  # references in memory at once


def copy_image_column(
    db: duckdb.DuckDBPyConnection,
    images: ImageColumn,
    root: Path,
    folder: Path,
    *,
    all_items: bool,
    keep_last: bool = False,
) -> list[str]:
    """Copy the images of the remaining items and set their references in ``raw_items``.

    Args:
        db: A connection with the tables ``raw_items``, ``item_ids`` and ``core``.
        images: The column of images.
        root: The raw root, for rows that have a path instead of bytes.
        folder: The folder that gets the tar.
        all_items: Whether items without an interaction remain.
        keep_last: Whether the last of several rows of an item is used, else the first.

    Returns:
        Messages for the user about paths without a file, one line each.

    Raises:
        UserError: The file is damaged.
    """
    source = f"read_parquet({quoted(str(images.path))}, file_row_number = true)"
    item = id_sql(images.item, column_types(db, source)[images.item])
    core_only = "" if all_items else " SEMI JOIN core USING (i)"
    rows = db.sql(
        f"SELECT {'max' if keep_last else 'min'}(file_row_number) AS row FROM {source}"
        f" WHERE {item} IN (SELECT item_id FROM item_ids{core_only}) GROUP BY {item} ORDER BY row"
    ).fetchnumpy()["row"]
    paths = ReferenceResolver(root, "image")
    db.execute("CREATE TABLE _images (row BIGINT, image VARCHAR)")
    with atomic_write(folder / _NAME) as temporary, temporary.open("wb") as stream:
        for chunk in _tables(_copy_rows(images, paths, np.asarray(rows), stream)):
            db.register("_chunk", chunk)
            db.execute("INSERT INTO _images SELECT * FROM _chunk")
            db.unregister("_chunk")
        stream.write(bytes(2 * tarfile.BLOCKSIZE))
    db.execute(
        "UPDATE raw_items SET image = copied.image FROM"
        f" (SELECT {item} AS item_id, image"
        f" FROM (SELECT {quote_identifier(images.item)}, file_row_number FROM {source})"
        " JOIN _images ON row = file_row_number) copied"
        " WHERE raw_items.item_id = copied.item_id"
    )
    db.execute("DROP TABLE _images")
    return list(paths.notes())


def _tables(pairs: Iterator[tuple[int, str]]) -> Iterator[pa.Table]:
    """Collect (row, reference) pairs into tables of at most ``_REFERENCES`` rows."""
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


def _copy_rows(
    images: ImageColumn, paths: ReferenceResolver, rows: npt.NDArray[np.int64], stream: BinaryIO
) -> Iterator[tuple[int, str]]:
    """Copy the images of ``rows`` to the stream; yield (row, reference) of each image."""
    for row, value in _values(images, rows):
        data, path = (value["bytes"], value["path"]) if isinstance(value, dict) else (value, None)
        if data is not None:
            name = member_name(data)
            member = tarfile.TarInfo(name)
            member.size = len(data)
            stream.write(member.tobuf(tarfile.GNU_FORMAT))
            stream.write(data)
            stream.write(bytes(-len(data) % tarfile.BLOCKSIZE))
            yield row, f"{PREPARED}{MEDIA}/{_NAME}#{name}"
        elif path:
            reference = paths.resolve(path)
            if reference is not None:
                yield row, reference


def _values(images: ImageColumn, rows: npt.NDArray[np.int64]) -> Iterator[tuple[int, Any]]:
    """Yield (row, value) of ``rows``; a few rows are in memory at once."""
    start = 0
    try:
        # With pre_buffer whole row groups would be in memory.
        with pq.ParquetFile(images.path, buffer_size=1 << 20, pre_buffer=False) as file:
            batches = file.iter_batches(_ROWS, columns=[images.column], use_threads=False)
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
        raise UserError(f"{images.path}: {reason}; copy the file again") from None
