"""Importer of RecBole's atomic files: tab-separated, with the type of each column in the header.

``.inter`` has ``user_id:token``, ``item_id:token`` and, optionally, ``timestamp:float``. ``.item``
is optional and has ``item_id:token`` and columns of the types token, token_seq, float and
float_seq. The text of an item is its column ``text``, else its title and other columns of text.
Other columns are attributes: sequences are lists, floats are numbers.
"""

from collections.abc import Sequence
from pathlib import Path

import duckdb

from features.errors import UserError
from features.sql_text import quote_identifier, quoted
from pipeline.datasets.importers.base import (
    IMAGE_PATTERNS,
    VIDEO_PATTERNS,
    Files,
    Importer,
    ImportResult,
)
from pipeline.datasets.importers.interactions import Times, create_interactions
from pipeline.datasets.importers.items import (
    TEXT_COLUMNS,
    choose_text_columns,
    create_described_from_ids,
    refuse_text_columns,
)
from pipeline.datasets.importers.media_files import create_raw_items
from pipeline.datasets.importers.raw_sql import (
    create_table,
    delimited_sql,
    find_column,
    find_columns,
    find_optional_column,
    read_first_row,
)
from pipeline.datasets.importers.text_sql import sentence_sql

_TYPES = ("token", "token_seq", "float", "float_seq")
_TEXTS = ("title", "movie_title", *TEXT_COLUMNS[1:], "genre", "class")
_SENTENCES = ("text", "title", "movie_title", "name", "description")
"""Columns whose tokens are the words of a text."""


def read(
    db: duckdb.DuckDBPyConnection, root: Path, files: Files, text_columns: Sequence[str] = ()
) -> ImportResult:
    """Read the interactions and, if the file is present, the items.

    Args:
        db: The connection that gets the tables.
        root: The raw folder.
        files: The paths of each role.
        text_columns: Columns that form the text of items; empty: the usual ones.

    Raises:
        UserError: A file is damaged, a column is missing, or the type of a column is unknown.
    """
    path = files["interactions"][0]
    types = _read_header(path)
    if types:
        source = delimited_sql(path, list(types), delimiter="\t", header=True)
        user, item = (
            quote_identifier(column)
            for column in find_columns(path, list(types), ["user_id"], ["item_id"])
        )
        time = find_optional_column(list(types), "timestamp")
        times = create_interactions(
            db, path, source, user=user, item=item, time=time and quote_identifier(time)
        )
    else:
        time, times = None, Times()
        db.execute(
            "CREATE TABLE raw_interactions (user_id VARCHAR, item_id VARCHAR, timestamp BIGINT,"
            " ordinal BIGINT)"
        )
    texts = None
    if files.get("items"):
        texts = _create_described(db, files["items"][0], text_columns)
    else:
        refuse_text_columns(text_columns)
        create_described_from_ids(db)
    return ImportResult(
        timestamps=time is not None,
        time_unit=times.unit,
        notes=times.notes + create_raw_items(db, root, files),
        text_columns=texts,
    )


def _read_header(path: Path) -> dict[str, str]:
    """Return name to type of the columns; nothing for an empty file.

    Raises:
        UserError: A column has no type, or an unknown one.
    """
    entries = [entry.strip() for entry in read_first_row(path, "\t", "")]
    pairs = {entry: entry.rpartition(":") for entry in entries}
    wrong = [entry for entry, (name, _, kind) in pairs.items() if not name or kind not in _TYPES]
    if wrong:
        raise UserError(
            f"{path}, line 1: {', '.join(repr(entry[:80]) for entry in wrong[:3])}"
            f"{f' and {len(wrong) - 3} more' if len(wrong) > 3 else ''}: not NAME:TYPE with one of"
            f" the types {', '.join(_TYPES)}; correct the header"
        )
    return {name: kind for name, _, kind in pairs.values()}


def _create_described(
    db: duckdb.DuckDBPyConnection, path: Path, text_columns: Sequence[str]
) -> tuple[str, ...]:
    """Create ``described``; return the columns that form the text."""
    types = _read_header(path)
    names = list(types)
    item = find_column(path, names, "item_id")
    own = find_optional_column(names, "text")
    usual = _TEXTS if own is None else (own,)
    texts = choose_text_columns(path, names, usual, text_columns)
    text = sentence_sql(*map(quote_identifier, texts)) if texts else "NULL::VARCHAR"
    pairs = ", ".join(
        f"{quoted(name)}, {_value_sql(name, types[name])}"
        for name in names
        if name not in (item, "text", "image", "video")
    )
    image, video = (
        f"nullif({name}, '')" if name in names else "NULL::VARCHAR" for name in ("image", "video")
    )
    media = f"{image} AS image, {video} AS video"
    create_table(
        db,
        "described",
        f"SELECT {quote_identifier(item)} AS item_id,"
        f" {text} AS text, {media},"
        f" json_merge_patch('{{}}', json_object({pairs}))::VARCHAR AS attributes"
        f" FROM {delimited_sql(path, names, delimiter=chr(9), header=True)}",
        path,
    )
    return texts


def _value_sql(name: str, kind: str) -> str:
    """Return SQL of a column as a value of JSON."""
    value = f"nullif({quote_identifier(name)}, '')"
    number = "CASE WHEN isfinite(TRY_CAST({0} AS DOUBLE)) THEN TRY_CAST({0} AS DOUBLE) END"
    if kind == "float":
        return number.format(value)
    if kind == "token" or name.lower() in _SENTENCES:
        return value
    values = f"list_filter(string_split({value}, ' '), lambda part: part <> '')"
    if kind == "float_seq":
        return f"list_transform({values}, lambda part: {number.format('part')})"
    return values


IMPORTER = Importer(
    summary="RecBole's atomic files .inter and .item",
    files={
        "interactions": ("*.inter",),
        "items": ("*.item",),
        "images": IMAGE_PATTERNS,
        "videos": VIDEO_PATTERNS,
    },
    required=("interactions",),
    read=read,
    options=("text_columns",),
    example={
        "shop.inter": "user_id:token\titem_id:token\ttimestamp:float\n"
        "ann\tshoe\t100.0\nann\that\t200.0\nbob\that\t150.0\n",
        "shop.item": "item_id:token\ttitle:token_seq\tgenre:token_seq\tprice:float\n"
        "shoe\tRed shoe\twinter wool\t3.5\nhat\tHat\tsummer\t\n",
    },
)
