"""Columns of Parquet files by type: SQL of ids, texts and times, or an error that names the type.

Every column of a CSV or TSV file is text and passes unchanged. In a Parquet file NaN is a missing
value, as pandas writes it.
"""

import re
from pathlib import Path
from typing import cast

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
from duckdb.sqltypes import DuckDBPyType

from features.errors import UserError, no_permission
from features.sql_text import quoted

_INTEGERS = r"U?(TINYINT|SMALLINT|INTEGER|BIGINT|HUGEINT)"
_EXACT = {"FLOAT": 1 << 24, "DOUBLE": 1 << 53}  # larger whole numbers are not all different
_EXACT_HALF = 1 << 11
_NAMES = re.compile(rf"VARCHAR|ENUM\(.*\)|{_INTEGERS}|UUID|\"NULL\"", re.DOTALL)
_NUMBERS = re.compile(r"FLOAT|DOUBLE|DECIMAL\(.*\)")
_DATES = re.compile(r"DATE|TIME(STAMP)?(TZ)?(_S|_MS|_NS)?( WITH TIME ZONE)?")
_MICROSECONDS = {"s": "1000000 *", "ms": "1000 *", "us": "", "ns": "0.001 *"}


def quote_identifier(name: str) -> str:
    """Quote the name of a column for SQL."""
    return '"' + name.replace('"', '""') + '"'


def column_types(db: duckdb.DuckDBPyConnection, source: str) -> dict[str, DuckDBPyType]:
    """Return name to type of the columns of SQL that reads a file."""
    relation = db.sql(f"SELECT * FROM {source} LIMIT 0")
    return dict(zip(relation.columns, relation.types, strict=True))


def _children(kind: DuckDBPyType) -> list[tuple[str, DuckDBPyType]]:
    """Return the fields of a struct, or the one field of a list."""
    return cast(list[tuple[str, DuckDBPyType]], kind.children)


def parquet_sql(db: duckdb.DuckDBPyConnection, path: Path) -> str:
    """Return SQL that reads a Parquet file, with NULL in place of NaN and intervals as such.

    If the file has floats, the connection no longer trusts the statistics of files.

    Raises:
        UserError: The file is not a Parquet file, or two columns have the same name.
    """
    try:
        schema = pq.read_schema(path)
    except (pa.ArrowException, OSError) as error:
        raise read_error(path, error) from None
    lowered = [name.lower() for name in schema.names]
    repeated = next((name for name in lowered if lowered.count(name) > 1), None)
    if repeated is not None:
        raise UserError(
            f"{path} has several columns {repeated!r} (upper and lower case are the same);"
            " give every column a name of its own"
        )
    source = f"read_parquet({quoted(str(path))})"
    columns, is_changed = [], False
    for name, kind in column_types(db, source).items():
        column = quote_identifier(name)
        value = _without_nan(column, kind)
        duration = schema.field(name).type if name in schema.names else None
        if duration is not None and pa.types.is_duration(duration):
            value = f"to_microseconds(({_MICROSECONDS[duration.unit]} {column})::BIGINT)"
        is_changed |= value != column
        columns.append(f"{value} AS {column}")
    if not is_changed:
        return source
    # The statistics of a file leave NaN out. DuckDB would take a column of one number and NaN for
    # a constant, and skip the test for NaN.
    db.execute("SET disabled_optimizers = 'statistics_propagation'")
    return f"(SELECT {', '.join(columns)} FROM {source})"


def read_error(path: Path, error: Exception) -> UserError:
    """Return the error about a file that cannot be opened or is not a Parquet file."""
    if isinstance(error, PermissionError):
        return no_permission(path)
    reason = " ".join(str(error).split())[:160]
    return UserError(f"{path} is not a readable Parquet file ({reason}); copy it again")


def _without_nan(value: str, kind: DuckDBPyType, depth: int = 0) -> str:
    """Return SQL of a value with NULL for NaN; within lists, structs and maps also for infinity."""
    if kind.id in ("float", "double"):
        missing = "'nan', 'inf', '-inf'" if depth else "'nan'"
        return f"CASE WHEN {value}::VARCHAR NOT IN ({missing}) THEN {value} END"
    if kind.id == "list":
        ((_, child),) = _children(kind)
        entry = f"entry_{depth}"
        inner = _without_nan(entry, child, depth + 1)
        return value if inner == entry else f"list_transform({value}, lambda {entry}: {inner})"
    if kind.id == "map":
        (_, (_, child)) = _children(kind)
        entry = f"entry_{depth}"
        inner = _without_nan(f"{entry}.value", child, depth + 1)
        packed = f"struct_pack(key := {entry}.key, value := {inner})"
        entries = f"list_transform(map_entries({value}), lambda {entry}: {packed})"
        return value if inner == f"{entry}.value" else f"map_from_entries({entries})"
    if kind.id == "struct":
        fields = [
            (quote_identifier(name), f"{value}.{quote_identifier(name)}", child)
            for name, child in _children(kind)
        ]
        inners = [_without_nan(field, child, depth + 1) for _, field, child in fields]
        if inners != [field for _, field, _ in fields]:
            packed = ", ".join(
                f"{name} := {inner}" for (name, _, _), inner in zip(fields, inners, strict=True)
            )
            return f"CASE WHEN {value} IS NOT NULL THEN struct_pack({packed}) END"
    return value


def id_sql(name: str, kind: DuckDBPyType) -> str:
    """Return SQL of a column of ids as text; a whole float is an integer: ``5``, not ``5.0``."""
    column = quote_identifier(name)
    if _NUMBERS.fullmatch(str(kind)):
        return f"TRY_CAST({column} AS HUGEINT)::VARCHAR"
    return f"{column}::VARCHAR"


def check_ids(
    db: duckdb.DuckDBPyConnection, path: Path, source: str, name: str, kind: DuckDBPyType
) -> None:
    """Check that a column can hold ids: text or whole numbers.

    Raises:
        UserError: The column is of another type, or a number is not whole or too large to be exact.
    """
    if _NAMES.fullmatch(str(kind)):
        return
    if not _NUMBERS.fullmatch(str(kind)):
        raise type_error(path, name, kind, "write the ids as text or integers")
    column = quote_identifier(name)
    limit = _exact_limit(path, name, kind)
    inexact = f" OR abs(value) > {limit}" if limit else ""
    bad = db.sql(
        f"SELECT row, value FROM (SELECT row_number() OVER () AS row, {column} AS value"
        f" FROM {source}) WHERE value <> trunc(value){inexact} ORDER BY row LIMIT 1"
    ).fetchall()
    if bad:
        ((row, value),) = bad
        raise UserError(
            f"{path}, row {row}: {name} is {value!s}, not a whole number that {kind} holds exactly;"
            " write the ids as text or integers"
        )


def _exact_limit(path: Path, name: str, kind: DuckDBPyType) -> int | None:
    """Return the limit of the whole numbers that a column holds exactly; None if there is none."""
    # DuckDB reads floats of 16 bits as floats of 32 bits.
    if str(kind) == "FLOAT" and pa.types.is_float16(pq.read_schema(path).field(name).type):
        return _EXACT_HALF
    return _EXACT.get(str(kind))


def text_sql(path: Path, name: str, kind: DuckDBPyType) -> str:
    """Return SQL of a column as text; the distinct values of a list are joined by commas.

    Raises:
        UserError: The column is of a type that is not text.
    """
    column = quote_identifier(name)
    if kind.id == "list":
        values = column
        ((_, kind),) = _children(kind)
        while kind.id == "list":
            values = f"flatten({values})"
            ((_, kind),) = _children(kind)
        _check_text(path, name, kind)
        texts = f"list_transform({values}, lambda value: {_plain_text('value', kind)})"
        values = f"list_filter({texts}, lambda value: value IS NOT NULL)"
        distinct = f"lambda value, place: list_position({values}, value) = place"
        return f"array_to_string(list_filter({values}, {distinct}), ', ')"
    _check_text(path, name, kind)
    return _plain_text(column, kind)


def _plain_text(value: str, kind: DuckDBPyType) -> str:
    """Return SQL of a value as text; a whole float is an integer: ``5``, not ``5.0``."""
    if str(kind) in _EXACT:
        return (
            f"CASE WHEN {value} = trunc({value}) AND abs({value}) < {_EXACT['DOUBLE']}"
            f" THEN {value}::BIGINT::VARCHAR ELSE {value}::VARCHAR END"
        )
    return f"{value}::VARCHAR"


def _check_text(path: Path, name: str, kind: DuckDBPyType) -> None:
    if not any(pattern.fullmatch(str(kind)) for pattern in (_NAMES, _NUMBERS, _DATES)):
        raise type_error(path, name, kind, "write text, or lists of text")


def json_value_sql(name: str, kind: DuckDBPyType) -> str:
    """Return SQL of a column as a value of JSON, which has no infinity."""
    column = quote_identifier(name)
    return f"CASE WHEN isfinite({column}) THEN {column} END" if str(kind) in _EXACT else column


_UNITS = {
    "DATE": ("days", "{} - DATE '1970-01-01'"),
    "TIMESTAMP": ("microseconds", "epoch_us({})"),
    "TIMESTAMP WITH TIME ZONE": ("microseconds", "epoch_us({})"),
    "TIMESTAMP_S": ("microseconds", "epoch_us({})"),
    "TIMESTAMP_MS": ("microseconds", "epoch_us({})"),
    "TIMESTAMP_NS": ("nanoseconds", "epoch_ns({})"),
    "TIMESTAMPTZ_NS": ("nanoseconds", "epoch_ns({})"),
}


def time_sql(path: Path, name: str, kind: DuckDBPyType) -> tuple[str, str | None]:
    """Return SQL of a column of times as numbers, and the unit if the column is a date or time.

    Raises:
        UserError: The column is of a type that is not a time.
    """
    column = quote_identifier(name)
    if str(kind) in _UNITS:
        unit, sql = _UNITS[str(kind)]
        # DuckDB has infinite times; they have no number of units.
        plain = f"{column}::TIMESTAMP_NS" if str(kind) == "TIMESTAMPTZ_NS" else column
        finite = f"isfinite({plain})"
        return f"CASE WHEN {finite} THEN {sql.format(column)} END", unit
    if str(kind) == "UUID" or not (_NAMES.fullmatch(str(kind)) or _NUMBERS.fullmatch(str(kind))):
        raise type_error(path, name, kind, "write whole numbers, dates or timestamps")
    return column, None


def type_error(path: Path, name: str, kind: DuckDBPyType, remedy: str) -> UserError:
    """Return the error about a column of a type that cannot be used."""
    return UserError(f"{path}: the column {name!r} is of type {str(kind)[:80]}; {remedy}")
