"""Importer of one line for each user: ``user item item ...``, oldest first.

SASRec, S3-Rec and MicroLens are released in this layout. Spaces or tabs separate the ids. A
JSONL, CSV, TSV or Parquet file may describe the items. Images and videos are files named by item
id.
"""

from collections.abc import Sequence
from pathlib import Path

import duckdb

from features.errors import UserError
from pipeline.datasets.importers.base import (
    IMAGE_PATTERNS,
    VIDEO_PATTERNS,
    Files,
    Importer,
    ImportResult,
)
from pipeline.datasets.importers.items import (
    create_described,
    create_described_from_ids,
    refuse_text_columns,
)
from pipeline.datasets.importers.media_files import create_raw_items
from pipeline.datasets.importers.messages import plural, quote_all
from pipeline.datasets.importers.raw_sql import create_table, fetch_row, lines_sql


def read(
    db: duckdb.DuckDBPyConnection, root: Path, files: Files, text_columns: Sequence[str] = ()
) -> ImportResult:
    """Read the sequences; without a file of items, the items are those of the sequences.

    Args:
        db: The connection that gets the tables.
        root: The raw folder.
        files: The paths of each role.
        text_columns: Columns that form the text of items; empty: the usual ones.

    Raises:
        UserError: A file is damaged, or a user has two lines.
    """
    create_from_sequences(db, files["interactions"][0])
    items = None
    if files.get("items"):
        items = create_described(db, files["items"][0], text_columns=text_columns)
    else:
        refuse_text_columns(text_columns)
        create_described_from_ids(db)
    return ImportResult(
        timestamps=False,
        notes=create_raw_items(db, root, files),
        text_columns=None if items is None else items.text_columns,
        images=None if items is None else items.images,
    )


def create_from_sequences(db: duckdb.DuckDBPyConnection, path: Path) -> None:
    """Create ``raw_interactions`` from one line for each user.

    Raises:
        UserError: The file is damaged, or a user has two lines.
    """
    create_table(
        db,
        "_lines",
        "SELECT row_number() OVER () - 1 AS row, list_filter(string_split("
        "replace(line, chr(9), ' '), ' '), lambda id: id <> '') AS ids"
        f" FROM {lines_sql(path)}",
        path,
    )
    repeated, examples, row = fetch_row(
        db,
        "SELECT count(*), list(user_id ORDER BY second)[:3], min(second) FROM"
        " (SELECT ids[1] AS user_id, max(row) AS second FROM _lines"
        " WHERE len(ids) > 0 GROUP BY 1 HAVING count(*) > 1)",
    )
    if repeated:
        raise UserError(
            f"{path}, line {row + 1}: {plural(repeated, 'user')} with more than one line"
            f" (such as {quote_all(examples)}); join the lines of each user"
        )
    # The ordinal grows with the line, and within a line with the step.
    db.execute(
        "CREATE TABLE raw_interactions AS SELECT user_id, item_id, NULL::BIGINT AS timestamp,"
        " row * 4294967296 + step AS ordinal FROM (SELECT ids[1] AS user_id, row,"
        " unnest(ids[2:]) AS item_id, generate_subscripts(ids[2:], 1) AS step FROM _lines)"
    )
    db.execute("DROP TABLE _lines")


IMPORTER = Importer(
    summary="a line 'user item item ...' for each user, oldest first (SASRec, S3-Rec, MicroLens)",
    files={
        "interactions": ("sequences.txt", "sequences.tsv", "*_pairs.tsv"),
        "items": ("items.jsonl", "items.csv", "items.tsv", "items.parquet"),
        "images": IMAGE_PATTERNS,
        "videos": VIDEO_PATTERNS,
    },
    required=("interactions",),
    read=read,
    options=("text_columns",),
    example={
        "sequences.txt": "ann shoe hat\nbob hat\n",
        "items.jsonl": '{"id": "shoe", "title": "Red shoe"}\n{"id": "hat", "title": "Hat"}\n',
    },
)
