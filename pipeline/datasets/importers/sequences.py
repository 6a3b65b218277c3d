"""One line for each user, items oldest first: ``user item item ...`` (SASRec, S3-Rec, MicroLens).

Space or tab separates. Items, where they are described, stand in a JSONL, CSV, TSV or Parquet file;
pictures and clips in folders, named by item id.
"""

from pathlib import Path

import duckdb

from features.errors import UserError
from pipeline.datasets.importers.base import Files, Raw, many, some
from pipeline.datasets.importers.items import create_described
from pipeline.datasets.importers.media_files import create_items
from pipeline.datasets.importers.raw_sql import create, lines_sql, one
from pipeline.datasets.importers.text_sql import install


def read(db: duckdb.DuckDBPyConnection, root: Path, files: Files) -> Raw:
    """Read sequences; without a file of items, the items are those that the sequences name.

    Raises:
        UserError: A file is damaged, or a user has two lines.
    """
    install(db)
    create_from_sequences(db, files["interactions"][0])
    items = files.get("items", ())
    blobs = None
    if items:
        blobs = create_described(db, items[0]).blobs
    else:
        db.execute(
            "CREATE TABLE described AS SELECT DISTINCT item_id, NULL::VARCHAR AS text,"
            " NULL::VARCHAR AS image, NULL::VARCHAR AS video, NULL::VARCHAR AS attributes"
            " FROM raw_interactions"
        )
    notes = create_items(db, root, files)
    return Raw(timestamps=False, notes=notes, blobs=blobs)


def create_from_sequences(db: duckdb.DuckDBPyConnection, path: Path) -> None:
    """Make ``raw_interactions`` from one line for each user.

    Raises:
        UserError: The file is damaged, or a user has two lines.
    """
    create(
        db,
        "_lines",
        "SELECT row_number() OVER () - 1 AS place, list_filter(string_split("
        "replace(line, chr(9), ' '), ' '), lambda word: word <> '') AS words"
        f" FROM {lines_sql(path)}",
        path,
    )
    repeated, such, place = one(
        db,
        "SELECT count(*), list(user_id ORDER BY second)[:3], min(second) FROM"
        " (SELECT words[1] AS user_id, max(place) AS second FROM _lines"
        " WHERE len(words) > 0 GROUP BY 1 HAVING count(*) > 1)",
    )
    if repeated:
        raise UserError(
            f"{path}, line {place + 1}: {many(repeated, 'user')} with more than one line"
            f" (such as {some(such)}); join the lines of each user"
        )
    # The place of the line and the place in it, in one number that grows with both.
    db.execute(
        "CREATE TABLE raw_interactions AS SELECT user_id, item_id, NULL::BIGINT AS timestamp,"
        " place * 4294967296 + step AS ordinal FROM (SELECT words[1] AS user_id, place,"
        " unnest(words[2:]) AS item_id, generate_subscripts(words[2:], 1) AS step FROM _lines)"
    )
    db.execute("DROP TABLE _lines")
