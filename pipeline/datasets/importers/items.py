"""Files that describe items, read into the table ``described``.

``described(item_id, text, image, video, attributes)``. The text joins the columns in
``TEXT_COLUMNS`` that the file has. The attributes are a JSON object of every column but the id,
the image and the video.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import duckdb
from duckdb.sqltypes import DuckDBPyType

from features.errors import UserError
from features.sql_text import pointer_sql, quote_identifier, quoted
from pipeline.datasets.importers.base import ImageColumn
from pipeline.datasets.importers.column_types import (
    check_ids,
    column_types,
    id_sql,
    json_value_sql,
    text_sql,
    type_error,
    without_blanks_sql,
)
from pipeline.datasets.importers.messages import name_others
from pipeline.datasets.importers.raw_sql import (
    TABLES,
    create_table,
    fetch_row,
    find_column,
    find_optional_column,
    lines_sql,
    table_sql,
    table_suffix,
)
from pipeline.datasets.importers.text_sql import sentence_sql

ID_COLUMNS = ("item_id", "item", "id", "itemId", "movieId", "asin")
TEXT_COLUMNS = ("title", "text", "name", "brand", "categories", "category", "genres", "description")
"""Columns that form the text of an item by default, in this order."""
_STRUCTS = ("STRUCT(bytes BLOB, path VARCHAR)", "STRUCT(path VARCHAR, bytes BLOB)")


@dataclass(frozen=True, kw_only=True, slots=True)
class ItemsFile:
    """Facts about a file of items."""

    text_columns: tuple[str, ...]
    """Columns that form the text, in this order."""
    images: ImageColumn | None = None
    """Column of images that are bytes; ``described.image`` is NULL then."""


def create_described(
    db: duckdb.DuckDBPyConnection,
    path: Path,
    ids: Sequence[str] = ID_COLUMNS,
    text_columns: Sequence[str] = (),
) -> ItemsFile:
    """Create ``described`` from a JSONL, CSV, TSV or Parquet file with named columns.

    Args:
        db: The connection that gets the table.
        path: The file.
        ids: Names that the column of ids may have, the best first.
        text_columns: Columns that form the text, in this order; empty: those in ``TEXT_COLUMNS``
            that the file has.

    Raises:
        UserError: The file is damaged, has no column of ids or of ``text_columns``, or the type of
            its column of images cannot be read.
    """
    if table_suffix(path) in (".jsonl", ".ndjson"):
        return _create_from_jsonl(db, path, ids, text_columns)
    if table_suffix(path) not in TABLES:
        raise UserError(f"{path} is none of .jsonl, {', '.join(TABLES)}; convert it to one")
    source, names = table_sql(db, path)
    return create_described_from(db, path, source, names, ids, text_columns)


def create_described_from_ids(db: duckdb.DuckDBPyConnection) -> None:
    """Create ``described`` with the item ids of ``raw_interactions`` and nothing else."""
    db.execute(
        "CREATE TABLE described AS SELECT DISTINCT item_id, NULL::VARCHAR AS text,"
        " NULL::VARCHAR AS image, NULL::VARCHAR AS video, NULL::VARCHAR AS attributes"
        " FROM raw_interactions"
    )


def create_described_from(
    db: duckdb.DuckDBPyConnection,
    path: Path,
    source: str,
    names: Sequence[str],
    ids: Sequence[str] = ID_COLUMNS,
    text_columns: Sequence[str] = (),
) -> ItemsFile:
    """Create ``described`` from SQL that reads the columns ``names`` of ``path``.

    Raises:
        UserError: As :func:`create_described`.
    """
    item = find_column(path, names, *ids)
    types = column_types(db, source)
    check_ids(db, path, source, {item: types[item]})
    images = _find_image_column(db, path, source, item, types)
    # Images that are bytes are copied later; bytes are no attributes.
    columns = [name for name in names if "BLOB" not in str(types[name])]
    texts = choose_text_columns(path, names, TEXT_COLUMNS, text_columns)
    select = _select_sql(
        [name for name in names if images is None or name != images.column],
        texts,
        lambda name: text_sql(path, name, types[name]),
    )
    pairs = ", ".join(
        f"{quoted(name)}, {json_value_sql(name, types[name])}"
        for name in columns
        if name != item and name.lower() not in ("image", "video")
    )
    create_table(
        db,
        "described",
        f"SELECT {id_sql(item, types[item])} AS item_id, {select},"
        f" json_merge_patch('{{}}', json_object({pairs}))::VARCHAR AS attributes FROM {source}",
        path,
    )
    return ItemsFile(text_columns=texts, images=images)


def choose_text_columns(
    path: Path, names: Sequence[str], usual: Sequence[str], given: Sequence[str]
) -> tuple[str, ...]:
    """Return the columns of a file that form the text of items, in order.

    Args:
        path: The file, for messages.
        names: The columns of the file.
        usual: Names of columns of text, in order; those that the file has are taken.
        given: Names that the user gives instead; empty: none are given.

    Raises:
        UserError: The file lacks a given column.
    """
    columns = {name: find_optional_column(names, name) for name in given or usual}
    absent = [name for name in given if columns[name] is None]
    if absent:
        raise UserError(
            f"--text-columns: {path} has no column {' and no column '.join(map(repr, absent))}; its"
            f" columns are {', '.join(names)}"
        )
    return tuple(dict.fromkeys(column for column in columns.values() if column is not None))


def refuse_text_columns(given: Sequence[str]) -> None:
    """Refuse a choice of columns of text if there is no file of items.

    Raises:
        UserError: Columns are given.
    """
    if given:
        raise UserError(
            f"--text-columns {','.join(given)}: there is no file of items; leave the option out, or"
            " give the file by --file items=PATH"
        )


def _find_image_column(
    db: duckdb.DuckDBPyConnection,
    path: Path,
    source: str,
    item: str,
    types: Mapping[str, DuckDBPyType],
) -> ImageColumn | None:
    """Return the column of images if its values are bytes.

    Raises:
        UserError: The column of images or of videos holds neither references nor bytes.
    """
    image, video = (find_optional_column(list(types), name) for name in ("image", "video"))
    if image is not None and str(types[image]) in ("BLOB", *_STRUCTS):
        return ImageColumn(path=path, item=item, column=image)
    for name in (image, video):
        if name is None or re.match(r"VARCHAR$|ENUM\(", str(types[name])):
            continue
        # pandas writes a column without any value as numbers.
        if types[name].id == "list" or fetch_row(
            db, f"SELECT count({quote_identifier(name)}) FROM {source}"
        ) != (0,):
            bytes_too = ", bytes, or structs of bytes and path" if name == image else ""
            raise type_error(path, {name: types[name]}, f"write paths{bytes_too}")
    return None


def _strict_json(line: str) -> str:
    """Return a line of JSON with null in place of NaN and Infinity, which JSON does not have."""
    try:
        return json.dumps(json.loads(line, parse_constant=lambda name: None), ensure_ascii=False)
    except (ValueError, RecursionError):
        return line  # reported with its number as no JSON object


def _create_from_jsonl(
    db: duckdb.DuckDBPyConnection, path: Path, ids: Sequence[str], text_columns: Sequence[str]
) -> ItemsFile:
    db.create_function("strict_json", _strict_json, ["VARCHAR"], "VARCHAR")
    create_table(
        db,
        "_lines",
        "SELECT number, CASE WHEN regexp_matches(line, 'NaN|Infinity') THEN strict_json(line)"
        " ELSE line END AS line FROM (SELECT row_number() OVER () AS number, line"
        f" FROM {lines_sql(path)}) WHERE trim(line) <> ''",
        path,
    )
    count, numbers = fetch_row(
        db,
        "SELECT count(*), min(number - 1, 3) FROM _lines"
        " WHERE NOT json_valid(line) OR json_type(TRY_CAST(line AS JSON)) <> 'OBJECT'",
    )
    if count:
        raise UserError(
            f"{path}, line {numbers[0] + 1}: not a JSON object"
            f"{name_others(count, numbers, 'line')}; correct the lines"
        )
    keys = db.sql("SELECT DISTINCT unnest(json_keys(line)) AS name FROM _lines ORDER BY name")
    names = [name for (name,) in keys.fetchall()]
    item = find_column(path, names, *ids)
    identifier = _json_id_sql(db, path, item)
    texts = choose_text_columns(path, names, TEXT_COLUMNS, text_columns)
    select = _select_sql(names, texts, _json_text_sql)
    media = (find_optional_column(names, name) for name in ("image", "video"))
    removed = ", ".join(f"{quoted(name)}, NULL" for name in (item, *media) if name is not None)
    db.execute(
        f"CREATE TABLE described AS SELECT {identifier} AS item_id,"
        f" {select}, json_merge_patch(line, json_object({removed}))::VARCHAR AS attributes"
        " FROM _lines ORDER BY number"
    )
    db.execute("DROP TABLE _lines")
    return ItemsFile(text_columns=texts)


def _json_id_sql(db: duckdb.DuckDBPyConnection, path: Path, item: str) -> str:
    """Return SQL of the id of a line as text, as :func:`id_sql` does for a column.

    Raises:
        UserError: An id is neither text nor a whole number.
    """
    text = f"json_extract_string(line, {pointer_sql(item)})"
    kind = f"json_type(line, {pointer_sql(item)})"
    number = f"TRY_CAST({text} AS DOUBLE)"
    is_whole = f"{number} = trunc({number}) AND abs({number}) <= 9007199254740992"
    count, numbers, value = fetch_row(
        db,
        f"SELECT count(*), min(number - 1, 3), arg_min({text}, number) FROM _lines"
        f" WHERE {kind} IN ('BOOLEAN', 'ARRAY', 'OBJECT')"
        f" OR ({kind} = 'DOUBLE' AND NOT ({is_whole}))",
    )
    if count:
        raise UserError(
            f"{path}, line {numbers[0] + 1}: {item} is {value[:80]}"
            f"{name_others(count, numbers, 'line')}; write the ids as text or integers"
        )
    text = without_blanks_sql(text)
    return f"CASE WHEN {kind} = 'DOUBLE' THEN {number}::BIGINT::VARCHAR ELSE {text} END"


def _select_sql(names: Sequence[str], texts: Sequence[str], value: Callable[[str], str]) -> str:
    """Return SQL of text, image and video.

    Args:
        names: The columns of the file that may hold references.
        texts: The columns that form the text.
        value: Return SQL of the value of a column.
    """
    parts = [value(column) for column in texts]
    selected = [f"{sentence_sql(*parts)} AS text" if parts else "NULL::VARCHAR AS text"]
    for name in ("image", "video"):
        column = find_optional_column(names, name)
        reference = "NULL::VARCHAR" if column is None else f"nullif({value(column)}, '')"
        selected.append(f"{reference} AS {name}")
    return ", ".join(selected)


def _json_text_sql(name: str) -> str:
    """Return SQL of a JSON value as text: a string, or the distinct strings of a (nested) list.

    Amazon gives each item a list of paths through its categories; the paths share their first
    categories.
    """
    json_value = f"json_extract(line, {pointer_sql(name)})"
    flat, nested = (f"json_extract_string({json_value}, '{path}')" for path in ("$[*]", "$[*][*]"))
    values = f"CASE WHEN json_type({json_value}, '$[0]') = 'ARRAY' THEN {nested} ELSE {flat} END"
    distinct = f"list_filter({values}, lambda value, place: list_position({values}, value) = place)"
    return (
        f"CASE WHEN json_type({json_value}) = 'ARRAY' THEN array_to_string({distinct}, ', ')"
        f" ELSE json_extract_string(line, {pointer_sql(name)}) END"
    )
