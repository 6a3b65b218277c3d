"""Importer of one's own tables: ``interactions`` and ``items`` as CSV, TSV or Parquet.

The columns of a CSV may also be separated by ``;``, tabs or ``|``, and text files may be compressed
by gzip (``.csv.gz``).

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

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import duckdb

from features.errors import UserError
from pipeline.datasets.importers.base import (
    IMAGE_PATTERNS,
    VIDEO_PATTERNS,
    Files,
    Importer,
    ImportResult,
)
from pipeline.datasets.importers.column_types import (
    check_ids,
    check_times,
    column_types,
    id_sql,
    time_sql,
)
from pipeline.datasets.importers.interactions import Times, create_interactions
from pipeline.datasets.importers.items import (
    ID_COLUMNS,
    ItemsFile,
    create_described,
    create_described_from_ids,
    refuse_text_columns,
)
from pipeline.datasets.importers.media_files import create_raw_items
from pipeline.datasets.importers.messages import plural
from pipeline.datasets.importers.raw_sql import (
    fetch_row,
    find_columns,
    find_optional_column,
    table_sql,
)

COLUMNS = {"user": "user_id", "item": "item_id", "time": "timestamp"}
"""Role of a column of interactions to its usual name."""


def read(
    db: duckdb.DuckDBPyConnection,
    root: Path,
    files: Files,
    columns: Mapping[str, str] = MappingProxyType({}),
    text_columns: Sequence[str] = (),
) -> ImportResult:
    """Read the two tables.

    Args:
        db: The connection that gets the tables.
        root: The raw folder.
        files: The paths of each role.
        columns: Roles in ``COLUMNS`` to other names. The name of ``item`` is also tried in the file
            of items.
        text_columns: Columns that form the text of items; empty: the usual ones.

    Raises:
        UserError: A file is damaged, a column is missing, a time is neither a whole number
            nor ISO, or every value in the columns of text is empty.
    """
    times = _create_interactions(db, files["interactions"][0], columns)
    if not files.get("items"):
        refuse_text_columns(text_columns)
        create_described_from_ids(db)
        notes = ("no file of items: models on item ids alone can be trained",)
        return _result(db, times, notes + create_raw_items(db, root, files))
    listing = files["items"][0]
    own_ids = [columns["item"]] if "item" in columns else []
    items = create_described(db, listing, [*own_ids, *ID_COLUMNS], text_columns)
    n_items, n_texts = fetch_row(db, "SELECT count(*), count(text) FROM described")
    if items.text_columns and n_items and not n_texts:
        raise UserError(
            f"{listing}: the column of text ({', '.join(items.text_columns)}) is empty in all of"
            f" {plural(n_items, 'item')}; fill it, choose others by --text-columns, or leave it out"
            " for a catalogue without text"
        )
    return _result(db, times, create_raw_items(db, root, files), items)


def _result(
    db: duckdb.DuckDBPyConnection,
    times: Times,
    notes: tuple[str, ...],
    items: ItemsFile | None = None,
) -> ImportResult:
    (timestamps,) = fetch_row(db, "SELECT count(timestamp) FROM raw_interactions")
    return ImportResult(
        timestamps=timestamps > 0,
        time_unit=times.unit,
        notes=times.notes + notes,
        text_columns=None if items is None else items.text_columns,
        images=None if items is None else items.images,
    )


def _create_interactions(
    db: duckdb.DuckDBPyConnection, path: Path, columns: Mapping[str, str]
) -> Times:
    """Create ``raw_interactions``."""
    source, names = table_sql(db, path)
    types = column_types(db, source)
    usual = {**COLUMNS, **columns}
    roles = ["user", "item", *(["time"] if "time" in columns else [])]
    user, item, *_ = find_columns(
        path,
        names,
        *([usual[role]] for role in roles),
        remedy="rename yours, or give their names by --columns user=NAME,item=NAME,time=NAME",
    )
    check_ids(db, path, source, {name: types[name] for name in (user, item)})
    user, item = id_sql(user, types[user]), id_sql(item, types[item])
    column = find_optional_column(names, usual["time"])
    time, unit = time_sql(path, column, types[column]) if column else (None, None)
    if column:
        check_times(db, path, source, column, types[column])
    return create_interactions(db, path, source, user=user, item=item, time=time, unit=unit)


IMPORTER = Importer(
    summary="interactions (user_id, item_id, timestamp) and items (item_id, title, ...)",
    files={
        "interactions": (
            "interactions.parquet", "interactions.csv", "interactions.tsv", "interactions.csv.gz",
            "interactions.tsv.gz",
        ),
        "items": (
            "items.parquet", "items.csv", "items.tsv", "items.jsonl", "items.csv.gz",
            "items.tsv.gz", "items.jsonl.gz",
        ),
        "images": IMAGE_PATTERNS,
        "videos": VIDEO_PATTERNS,
    },
    required=("interactions",),
    read=read,
    options=("columns", "text_columns"),
    example={
        "interactions.csv": "user_id,item_id,timestamp\nann,shoe,100\nann,hat,200\nbob,hat,150\n",
        "items.csv": "item_id,title\nshoe,Red shoe\nhat,Hat\n",
    },
)  # fmt: skip
