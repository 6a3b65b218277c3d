"""A file that describes items, of any of the kinds we read, as the table ``described``.

``described(item_id, text, image, video, attributes)``: the text is made of the columns in
``WORDS`` that are there; everything but the id and the paths also stands in the attributes.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import duckdb

from features.dataset import quoted
from features.errors import UserError
from pipeline.datasets.importers.base import Blobs
from pipeline.datasets.importers.raw_sql import (
    TABLES,
    column,
    create,
    ident,
    lines_sql,
    one,
    optional,
    table_sql,
)
from pipeline.datasets.importers.text_sql import sentence_sql

IDS = ("item_id", "item", "id", "itemId", "movieId", "asin")
WORDS = ("title", "text", "name", "brand", "categories", "category", "genres", "description")
"""Columns that become the text of an item, in this order."""
_STRUCTS = ("STRUCT(bytes BLOB, path VARCHAR)", "STRUCT(path VARCHAR, bytes BLOB)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Described:
    """What a file of items turned out to have."""

    words: bool
    """Whether there is a column of words."""
    blobs: Blobs | None = None
    """Its pictures, if it has them as bytes; ``described.image`` is NULL then."""


def create_described(db: duckdb.DuckDBPyConnection, path: Path) -> Described:
    """Make ``described`` from a JSONL, CSV, TSV or Parquet file with named columns.

    Raises:
        UserError: The file is damaged, has no column of ids, or has pictures in a column of a type
            that we cannot read.
    """
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        return _from_jsonl(db, path)
    if path.suffix.lower() not in TABLES:
        raise UserError(f"{path} is none of .jsonl, {', '.join(TABLES)}; convert it to one")
    source, names = table_sql(db, path)
    return create_from(db, path, source, names)


def create_from(
    db: duckdb.DuckDBPyConnection, path: Path, source: str, names: Sequence[str]
) -> Described:
    """Make ``described`` from SQL that reads the columns ``names`` of ``path``."""
    item = column(path, names, *IDS)
    types = {name: str(kind) for name, kind, *_ in db.sql(f"DESCRIBE FROM {source}").fetchall()}
    blobs = _blobs(path, item, types)
    binary = {name for name, kind in types.items() if "BLOB" in kind}
    plain = [name for name in names if name not in binary]  # bytes are no words and no attributes
    words, select = _select(plain, lambda name: f"{ident(name)}::VARCHAR")
    paths = {name.lower() for name in ("image", "video")}
    pairs = ", ".join(
        f"{quoted(name)}, {ident(name)}"
        for name in plain
        if name != item and name.lower() not in paths
    )
    create(
        db,
        "described",
        f"SELECT {ident(item)}::VARCHAR AS item_id, {select},"
        f" json_merge_patch('{{}}', json_object({pairs}))::VARCHAR AS attributes FROM {source}",
        path,
    )
    return Described(words=words, blobs=blobs)


def _blobs(path: Path, item: str, types: Mapping[str, str]) -> Blobs | None:
    """Say where the pictures are, if they are bytes.

    Raises:
        UserError: A column that should hold references or bytes holds something else.
    """
    image, video = (optional(list(types), name) for name in ("image", "video"))
    if image is not None and types[image] in ("BLOB", *_STRUCTS):
        return Blobs(path=path, item=item, column=image)
    for name in (image, video):
        if name is not None and re.search(r"BLOB|STRUCT|MAP|\[", types[name]):
            raise UserError(
                f"{path}: the column {name!r} is of type {types[name][:80]}; give paths"
                + (", bytes, or structs of bytes and path" if name == image else "")
            )
    return None


def _from_jsonl(db: duckdb.DuckDBPyConnection, path: Path) -> Described:
    create(
        db,
        "_lines",
        "SELECT place, line FROM (SELECT row_number() OVER () AS place, line"
        f" FROM {lines_sql(path)}) WHERE trim(line) <> ''",
        path,
    )
    (place,) = one(
        db,
        "SELECT min(place) FROM _lines"
        " WHERE NOT json_valid(line) OR json_type(TRY_CAST(line AS JSON)) <> 'OBJECT'",
    )
    if place is not None:
        raise UserError(f"{path}, line {place}: not a JSON object; correct the line")
    keys = db.sql("SELECT DISTINCT unnest(json_keys(line)) AS name FROM _lines ORDER BY name")
    names = [name for (name,) in keys.fetchall()]
    item = column(path, names, *IDS)
    words, select = _select(names, _json_words_sql)
    apart = [item, *(found for key in ("image", "video") if (found := optional(names, key)))]
    without = ", ".join(f"{quoted(name)}, NULL" for name in apart)
    db.execute(
        f"CREATE TABLE described AS SELECT json_extract_string(line, {_path(item)}) AS item_id,"
        f" {select}, json_merge_patch(line, json_object({without}))::VARCHAR AS attributes"
        " FROM _lines ORDER BY place"
    )
    db.execute("DROP TABLE _lines")
    return Described(words=words)


def _select(names: Sequence[str], value: Callable[[str], str]) -> tuple[bool, str]:
    """SQL of text, image and video from those columns that are there."""
    words = [found for name in WORDS if (found := optional(names, name))]
    text = sentence_sql(*map(value, words)) if words else "NULL::VARCHAR"
    paths = {
        name: f"nullif({value(found)}, '')" if (found := optional(names, name)) else "NULL::VARCHAR"
        for name in ("image", "video")
    }
    return bool(words), f"{text} AS text, {paths['image']} AS image, {paths['video']} AS video"


def _path(name: str, tail: str = "") -> str:
    """The JSON path of one key, as an SQL string."""
    escaped = name.replace('"', '\\"')
    return quoted(f'$."{escaped}"{tail}')


def _json_words_sql(name: str) -> str:
    """SQL of a JSON value as words: a string, or a list (of lists) of strings without repetition.

    Amazon gives each item a list of paths through its categories, which share their beginning.
    """
    flat = f"json_extract_string(line, {_path(name, '[*]')})"
    nested = f"json_extract_string(line, {_path(name, '[*][*]')})"
    words = (
        f"CASE WHEN json_type(line, {_path(name, '[0]')}) = 'ARRAY' THEN {nested} ELSE {flat} END"
    )
    distinct = f"list_filter({words}, lambda word, place: list_position({words}, word) = place)"
    return (
        f"CASE WHEN json_type(line, {_path(name)}) = 'ARRAY'"
        f" THEN array_to_string({distinct}, ', ')"
        f" ELSE json_extract_string(line, {_path(name)}) END"
    )
