"""One's own tables: ``interactions.(csv|tsv|parquet)`` and ``items.(csv|tsv|parquet|jsonl)``.

``interactions`` has the columns ``user_id``, ``item_id`` and, optionally, ``timestamp`` (a whole
number of any unit, or a date or time of a Parquet file); without it the order of the rows is the
order of time. ``items`` has ``item_id`` and, optionally, words (see
:data:`pipeline.datasets.importers.items.WORDS`), ``image`` and ``video`` (references as in
:mod:`pipeline.media.references`; in a Parquet file, pictures may also be bytes); every other column
is kept as an attribute. Pictures and clips may also lie in folders ``images`` and ``videos``, named
by item id, pictures in ``images.tar`` or ``images.lmdb`` as well.
"""

from pathlib import Path

import duckdb

from features.errors import UserError
from pipeline.datasets.importers.base import Files, Raw, many
from pipeline.datasets.importers.items import create_described
from pipeline.datasets.importers.media_files import create_items
from pipeline.datasets.importers.raw_sql import (
    column,
    create_interactions,
    ident,
    one,
    optional,
    table_sql,
    whole_time,
)
from pipeline.datasets.importers.text_sql import install


def read(db: duckdb.DuckDBPyConnection, root: Path, files: Files) -> Raw:
    """Read the two tables.

    Raises:
        UserError: A file is damaged, a column is missing, a time is not a whole number, or a
            column of words is empty throughout.
    """
    install(db)
    path = files["interactions"][0]
    source, names = table_sql(db, path)
    user, item = (ident(column(path, names, name)) for name in ("user_id", "item_id"))
    time = optional(names, "timestamp")
    whole, unit = whole_time(db, source, time) if time else (None, None)
    create_interactions(db, path, source, user, item, whole)
    items = files["items"][0]
    found = create_described(db, items)
    (described, texts) = one(db, "SELECT count(*), count(text) FROM described")
    if found.words and described and not texts:
        raise UserError(
            f"{items}: the column of text is empty in all of {many(described, 'item')};"
            " fill the column, or leave it out for a catalogue without text"
        )
    notes = create_items(db, root, files)
    if unit:
        notes = (f"times are kept as {unit} since 1970", *notes)
    return Raw(timestamps=time is not None, notes=notes, blobs=found.blobs)
