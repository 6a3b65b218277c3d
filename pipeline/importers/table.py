"""One's own tables: ``interactions.(csv|tsv|parquet)`` and ``items.(csv|tsv|parquet|jsonl)``.

``interactions`` has the columns ``user_id``, ``item_id`` and, optionally, ``timestamp`` (a whole
number of any unit); without it the order of the rows is the order of time. ``items`` has
``item_id`` and, optionally, words (see :data:`pipeline.importers.items.WORDS`), ``image`` and
``video`` (paths relative to the raw folder); every other column is kept as an attribute. Pictures
and clips may also lie in folders ``images`` and ``videos``, named by item id.
"""

from pathlib import Path

import duckdb

from features.errors import UserError
from pipeline.importers.contract import Files, Raw, many
from pipeline.importers.items import create_described
from pipeline.importers.media import list_media, with_media_sql
from pipeline.importers.reading import column, create_interactions, ident, one, optional, table_sql
from pipeline.importers.text import install


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
    create_interactions(db, path, source, user, item, ident(time) if time else None)
    items = files["items"][0]
    words = create_described(db, items)
    (described, texts) = one(db, "SELECT count(*), count(text) FROM described")
    if words and described and not texts:
        raise UserError(
            f"{items}: the column of text is empty in all of {many(described, 'item')};"
            " fill the column, or leave it out for a catalogue without text"
        )
    list_media(db, root, files.get("images", ()), files.get("videos", ()))
    db.execute(f"CREATE TABLE raw_items AS {with_media_sql('described')}")
    return Raw(timestamps=time is not None)
