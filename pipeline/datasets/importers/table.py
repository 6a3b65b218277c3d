"""Importer of one's own tables: ``interactions`` and ``items`` as CSV, TSV or Parquet.

``interactions`` has the columns ``user_id``, ``item_id`` and, optionally, ``timestamp``: a whole
number of any unit, an ISO date or time, or a date or time of a Parquet file. Without timestamps the
rows are in the order of time.

``items`` has the column ``item_id`` and, optionally, columns of text (see
:data:`pipeline.datasets.importers.items.TEXT_COLUMNS`), ``image`` and ``video``. These two hold
references (:mod:`pipeline.media.references`); in a Parquet file images may also be bytes. Every
other column becomes an attribute. ``items`` may be JSONL as well.

Without a file of items, the items are those of the interactions.

Images and videos may also be files in the folders ``images`` and ``videos``, named by item id.
Images may also be in ``images.tar`` or ``images.lmdb``.
"""

from pathlib import Path

import duckdb

from features.errors import UserError
from pipeline.datasets.importers.base import (
    IMAGE_PATTERNS,
    VIDEO_PATTERNS,
    Files,
    ImageColumn,
    Importer,
    ImportResult,
    plural,
)
from pipeline.datasets.importers.column_types import (
    check_ids,
    check_times,
    column_types,
    id_sql,
    time_sql,
)
from pipeline.datasets.importers.interactions import Times, create_interactions
from pipeline.datasets.importers.items import create_described, create_described_from_ids
from pipeline.datasets.importers.media_files import create_raw_items
from pipeline.datasets.importers.raw_sql import (
    fetch_row,
    find_column,
    find_optional_column,
    table_sql,
)


def read(db: duckdb.DuckDBPyConnection, root: Path, files: Files) -> ImportResult:
    """Read the two tables.

    Raises:
        UserError: A file is damaged, a column is missing, a time is neither a whole number
            nor ISO, or every value in the columns of text is empty.
    """
    times = _create_interactions(db, files["interactions"][0])
    if not files.get("items"):
        create_described_from_ids(db)
        notes = ("no file of items: models on item ids alone can be trained",)
        return _result(db, times, notes + create_raw_items(db, root, files))
    listing = files["items"][0]
    items = create_described(db, listing)
    n_items, n_texts = fetch_row(db, "SELECT count(*), count(text) FROM described")
    if items.has_text and n_items and not n_texts:
        raise UserError(
            f"{listing}: the column of text is empty in all of {plural(n_items, 'item')};"
            " fill the column, or leave it out for a catalogue without text"
        )
    return _result(db, times, create_raw_items(db, root, files), items.images)


def _result(
    db: duckdb.DuckDBPyConnection,
    times: Times,
    notes: tuple[str, ...],
    images: ImageColumn | None = None,
) -> ImportResult:
    (timestamps,) = fetch_row(db, "SELECT count(timestamp) FROM raw_interactions")
    return ImportResult(
        timestamps=timestamps > 0,
        time_unit=times.unit,
        notes=times.notes + notes,
        images=images,
    )


def _create_interactions(db: duckdb.DuckDBPyConnection, path: Path) -> Times:
    """Create ``raw_interactions``."""
    source, names = table_sql(db, path)
    types = column_types(db, source)
    user, item = (find_column(path, names, name) for name in ("user_id", "item_id"))
    for name in (user, item):
        check_ids(db, path, source, name, types[name])
    user, item = id_sql(user, types[user]), id_sql(item, types[item])
    column = find_optional_column(names, "timestamp")
    time, unit = time_sql(path, column, types[column]) if column else (None, None)
    if column:
        check_times(db, path, source, column, types[column])
    return create_interactions(db, path, source, user=user, item=item, time=time, unit=unit)


IMPORTER = Importer(
    summary="interactions (user_id, item_id, timestamp) and items (item_id, title, ...)",
    files={
        "interactions": ("interactions.parquet", "interactions.csv", "interactions.tsv"),
        "items": ("items.parquet", "items.csv", "items.tsv", "items.jsonl"),
        "images": IMAGE_PATTERNS,
        "videos": VIDEO_PATTERNS,
    },
    required=("interactions",),
    read=read,
    example={
        "interactions.csv": "user_id,item_id,timestamp\nann,shoe,100\nann,hat,200\nbob,hat,150\n",
        "items.csv": "item_id,title\nshoe,Red shoe\nhat,Hat\n",
    },
)
