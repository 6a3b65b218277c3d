"""Columns of Parquet files by type: SQL of ids, texts and times, or an error that names the type.

Every column of a CSV or TSV file is text and passes unchanged. In a Parquet file NaN is a missing
value, as pandas writes it.
"""

import re
from collections.abc import Mapping
from math import inf
from pathlib import Path
from typing import cast

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
from duckdb.sqltypes import DuckDBPyType

from features.atomic_files import is_out_of_space
from features.errors import UserError, no_permission
from features.sql_text import quote_identifier, quoted
from pipeline.datasets.importers.messages import name_others

_INTEGERS = r"U?(TINYINT|SMALLINT|INTEGER|BIGINT|HUGEINT)"
_EXACT = {"FLOAT": 1 << 24, "DOUBLE": 1 << 53}  # larger whole numbers are not all different
_EXACT_HALF = 1 << 11
_NAMES = re.compile(rf"VARCHAR|ENUM\(.*\)|{_INTEGERS}|UUID|\"NULL\"", re.DOTALL)
_NUMBERS = re.compile(r"FLOAT|DOUBLE|DECIMAL\(.*\)")
_DATES = re.compile(r"DATE|TIME(STAMP)?(TZ)?(_S|_MS|_NS)?( WITH TIME ZONE)?")
_MICROSECONDS = {"s": "1000000 *", "ms": "1000 *", "us": "", "ns": "0.001 *"}


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
    repeated = [name for name in dict.fromkeys(lowered) if lowered.count(name) > 1]
    if repeated:
        raise UserError(
            f"{path} has several columns {', '.join(map(repr, repeated))} (upper and lower case are"
            " the same); give every column a name of its own"
        )
    source = f"read_parquet({quoted(str(path))})"
    columns, is_changed = [], False
    for name, kind in column_types(db, source).items():
        column = quote_identifier(name)
        arrow_type = schema.field(name).type if name in schema.names else None
        value = _value_sql(column, kind, arrow_type)
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


def _value_sql(
    value: str, kind: DuckDBPyType, arrow_type: pa.DataType | None, depth: int = 0
) -> str:
    """Return SQL of a value with NULL for NaN, and with intervals for durations.

    Within lists, structs and maps also infinity is NULL. DuckDB reads a duration as an integer
    without its unit.
    """
    if arrow_type is not None and pa.types.is_duration(arrow_type):
        return f"to_microseconds(({_MICROSECONDS[arrow_type.unit]} {value})::BIGINT)"
    if kind.id in ("float", "double"):
        missing = "'nan', 'inf', '-inf'" if depth else "'nan'"
        return f"CASE WHEN {value}::VARCHAR NOT IN ({missing}) THEN {value} END"
    if kind.id == "list":
        ((_, child),) = _children(kind)
        entry = f"entry_{depth}"
        inner = _value_sql(entry, child, getattr(arrow_type, "value_type", None), depth + 1)
        return value if inner == entry else f"list_transform({value}, lambda {entry}: {inner})"
    if kind.id == "map":
        ((_, key_kind), (_, child)) = _children(kind)
        entry = f"entry_{depth}"
        key_type, item_type = (
            getattr(arrow_type, name, None) for name in ("key_type", "item_type")
        )
        key = _value_sql(f"{entry}.key", key_kind, key_type, depth + 1)
        inner = _value_sql(f"{entry}.value", child, item_type, depth + 1)
        if (key, inner) == (f"{entry}.key", f"{entry}.value"):
            return value
        packed = f"struct_pack(key := {key}, value := {inner})"
        entries = f"list_transform(map_entries({value}), lambda {entry}: {packed})"
        return f"map_from_entries({entries})"
    if kind.id == "struct":
        return _struct_sql(value, kind, arrow_type, depth)
    return value


def _struct_sql(value: str, kind: DuckDBPyType, arrow_type: pa.DataType | None, depth: int) -> str:
    fields = [
        (quote_identifier(name), f"{value}.{quote_identifier(name)}", child)
        for name, child in _children(kind)
    ]
    types: list[pa.DataType | None] = [None] * len(fields)
    if arrow_type is not None and pa.types.is_struct(arrow_type):
        types = [arrow_type.field(index).type for index in range(len(fields))]
    inners = [
        _value_sql(field, child, child_type, depth + 1)
        for (_, field, child), child_type in zip(fields, types, strict=True)
    ]
    if inners == [field for _, field, _ in fields]:
        return value
    packed = ", ".join(
        f"{name} := {inner}" for (name, _, _), inner in zip(fields, inners, strict=True)
    )
    return f"CASE WHEN {value} IS NOT NULL THEN struct_pack({packed}) END"


def id_sql(name: str, kind: DuckDBPyType) -> str:
    """Return SQL of a column of ids as text, without blanks around them.

    A whole float is an integer: ``5``, not ``5.0``.
    """
    column = quote_identifier(name)
    if _NUMBERS.fullmatch(str(kind)):
        return f"TRY_CAST({column} AS HUGEINT)::VARCHAR"
    return without_blanks_sql(f"{column}::VARCHAR")


def without_blanks_sql(text: str) -> str:
    """Return SQL of a text without spaces and tabs at both ends."""
    return f"trim({text}, ' \t')"


def check_ids(
    db: duckdb.DuckDBPyConnection, path: Path, source: str, types: Mapping[str, DuckDBPyType]
) -> None:
    """Check that columns can hold ids: text or whole numbers.

    Args:
        db: A connection.
        path: The file, for messages.
        source: SQL that reads the file.
        types: Column to its type.

    Raises:
        UserError: A column is of another type or damaged, or a number is not whole or too large
            to be exact.
    """
    remedy = "write the ids as text or integers"
    numbers = {n: kind for n, kind in types.items() if not _NAMES.fullmatch(str(kind))}
    wrong = {n: kind for n, kind in numbers.items() if not _NUMBERS.fullmatch(str(kind))}
    if wrong:
        raise type_error(path, wrong, remedy)
    for name, kind in numbers.items():
        _check_exact(db, path, source, name, kind, remedy)


def check_times(
    db: duckdb.DuckDBPyConnection, path: Path, source: str, name: str, kind: DuckDBPyType
) -> None:
    """Check that the numbers of a column of times are exact; floats of large numbers are rounded.

    Seconds since 1970 lose up to 64 seconds as floats of 32 bits, which changes the order.

    Raises:
        UserError: A number is not whole, or too large to be exact.
    """
    if _NUMBERS.fullmatch(str(kind)):
        _check_exact(
            db, path, source, name, kind, "write the times as integers or timestamps", 2.0**63
        )


def _check_exact(
    db: duckdb.DuckDBPyConnection,
    path: Path,
    source: str,
    name: str,
    kind: DuckDBPyType,
    remedy: str,
    most: float = inf,
) -> None:
    arrow_type = _arrow_type(path, name)
    # DuckDB reads decimals of more than 38 digits as floats.
    if kind.id == "double" and arrow_type is not None and pa.types.is_decimal(arrow_type):
        raise UserError(f"{path}: the column {name!r} is of type {arrow_type}; {remedy}")
    column = quote_identifier(name)
    limit = _exact_limit(arrow_type, kind)
    # Numbers outside the range of 64 bits have an error of their own as times.
    inexact = f" OR abs(value) > {limit} AND abs(value) <= '{most}'::DOUBLE" if limit else ""
    statement = (
        "SELECT count(*), min(row - 1, 3), arg_min(value, row)"
        f" FROM (SELECT row_number() OVER () AS row, {column} AS value"
        f" FROM {source}) WHERE value <> trunc(value){inexact}"
    )
    try:
        ((count, rows, value),) = db.sql(statement).fetchall()
    except duckdb.Error as error:
        if is_out_of_space(error):
            raise
        raise read_error(path, error) from None
    if count:
        raise UserError(
            f"{path}, row {rows[0] + 1}: {name} is {value!s}, not a whole number that {kind} holds"
            f" exactly{name_others(count, rows)}; {remedy}"
        )


def _arrow_type(path: Path, name: str) -> pa.DataType | None:
    """Return the type of a column of a Parquet file; None if Parquet has no column of the name."""
    schema = pq.read_schema(path)
    return schema.field(name).type if name in schema.names else None


def _exact_limit(arrow_type: pa.DataType | None, kind: DuckDBPyType) -> int | None:
    """Return the limit of the whole numbers that a column holds exactly; None if there is none."""
    # DuckDB reads floats of 16 bits as floats of 32 bits.
    if arrow_type is not None and pa.types.is_float16(arrow_type):
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
        raise type_error(path, {name: kind}, "write text, or lists of text")


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
        raise type_error(path, {name: kind}, "write whole numbers, dates or timestamps")
    return column, None


def type_error(path: Path, types: Mapping[str, DuckDBPyType], remedy: str) -> UserError:
    """Return the error about columns of types that cannot be used.

    Args:
        path: The file.
        types: Column to its type.
        remedy: Advice of the error.
    """
    faults = " and ".join(f"{name!r} is of type {str(kind)[:80]}" for name, kind in types.items())
    return UserError(f"{path}: the column {faults}; {remedy}")
