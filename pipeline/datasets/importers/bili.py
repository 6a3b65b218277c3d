"""Importer of the layout in which PMMRec, MMSR and NineRec release Bili, Kwai, HM and Amazon.

Users: a TSV of ``user<TAB>item item ...``, oldest first. Items: a TSV or CSV whose first column is
the id and whose second column is the title, with or without a header. Covers: a folder of files
named by item id, or an LMDB of pickled images under the item ids.
"""

from collections.abc import Sequence
from pathlib import Path

import duckdb

from features.errors import UserError
from pipeline.datasets.importers.base import (
    VIDEO_PATTERNS,
    Files,
    Importer,
    ImportResult,
)
from pipeline.datasets.importers.items import (
    ID_COLUMNS,
    ItemsFile,
    create_described,
    create_described_from,
)
from pipeline.datasets.importers.media_files import create_raw_items
from pipeline.datasets.importers.raw_sql import delimited_sql, read_first_row
from pipeline.datasets.importers.sequences import create_from_sequences

_DELIMITER_AND_QUOTE = {".tsv": ("\t", ""), ".csv": (",", '"')}


def read(
    db: duckdb.DuckDBPyConnection, root: Path, files: Files, text_columns: Sequence[str] = ()
) -> ImportResult:
    """Read users, items and covers.

    Args:
        db: The connection that gets the tables.
        root: The raw folder.
        files: The paths of each role.
        text_columns: Columns that form the text of items; empty: the usual ones.

    Raises:
        UserError: A file is damaged, or a user has two lines.
    """
    create_from_sequences(db, files["interactions"][0])
    items = _create_described(db, files["items"][0], text_columns)
    return ImportResult(
        timestamps=False,
        notes=create_raw_items(db, root, files),
        text_columns=items.text_columns,
        images=items.images,
    )


def _create_described(
    db: duckdb.DuckDBPyConnection, path: Path, text_columns: Sequence[str]
) -> ItemsFile:
    suffix = path.suffix.lower()
    if suffix not in _DELIMITER_AND_QUOTE:
        known = ", ".join(_DELIMITER_AND_QUOTE)
        raise UserError(f"{path} is none of {known}; convert it to one of them")
    delimiter, quote = _DELIMITER_AND_QUOTE[suffix]
    first_row = read_first_row(path, delimiter, quote)
    if len(first_row) < 2:
        raise UserError(
            f"{path}, line 1: one column where an id and a title are expected; correct the file"
        )
    if first_row[0].strip().lower() in {name.lower() for name in ID_COLUMNS}:
        return create_described(db, path, text_columns=text_columns)
    names = ["item_id", "title", *(f"column_{index}" for index in range(3, len(first_row) + 1))]
    source = delimited_sql(path, names, delimiter=delimiter, quote=quote)
    return create_described_from(db, path, source, names, text_columns=text_columns)


IMPORTER = Importer(
    summary="users, items and covers as PMMRec, MMSR and NineRec release them",
    files={
        "interactions": ("*users*.tsv", "*behaviour*.tsv", "*behavior*.tsv"),
        "items": ("*items*.tsv", "*items*.csv", "*item*.tsv", "*item*.csv"),
        "images": ("*.lmdb", "*cover*", "images"),
        "videos": VIDEO_PATTERNS,
    },
    read=read,
    options=("text_columns",),
    example={
        "bili_users.tsv": "ann\tv1 v2\nbob\tv2\n",
        "bili_items.tsv": "v1\tA red shoe\nv2\tA hat\n",
    },
)
