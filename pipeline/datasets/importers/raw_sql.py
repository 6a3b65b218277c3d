"""Raw text and Parquet files as SQL; what is wrong with one is said with its file and line."""

import csv
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import duckdb

from features.dataset import quoted
from features.errors import UserError

MAX_LINE = 64 * 1024 * 1024  # bytes; one user of a sequences file is one line
_DELIMITERS = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
TABLES = (*_DELIMITERS, ".parquet")
_ECHO = re.compile(r".*CSV Error on Line|Original Line:")  # the line itself may be without end


def one(db: duckdb.DuckDBPyConnection, sql: str) -> tuple[Any, ...]:
    """The only row of a query."""
    (row,) = db.sql(sql).fetchall()
    return tuple(row)


def ident(name: str) -> str:
    """Quote a column's name for SQL."""
    return '"' + name.replace('"', '""') + '"'


def delimited_sql(
    path: Path,
    columns: Sequence[str],
    *,
    delimiter: str,
    header: bool = False,
    quote: str = "",
    encoding: str = "utf-8",
    limits: str = "",
) -> str:
    """SQL that reads a delimited file, every column as VARCHAR; nothing is guessed."""
    names = ", ".join(f"{quoted(name)}: 'VARCHAR'" for name in columns)
    return (
        f"read_csv({quoted(str(path))}, auto_detect = false, columns = {{{names}}},"
        f" delim = {quoted(delimiter)}, header = {str(header).lower()},"
        f" quote = {quoted(quote)}, escape = {quoted(quote)}, encoding = {quoted(encoding)}"
        f" {limits})"
    )


def lines_sql(path: Path) -> str:
    """SQL that reads a text file line by line into one column, ``line``; NULL for an empty one."""
    # The delimiter is one that no text holds; not strict, for lines that end in different ways.
    # The buffer would be sixteen of the longest lines, for each thread.
    limits = f", strict_mode = false, max_line_size = {MAX_LINE}, buffer_size = {2 * MAX_LINE}"
    return delimited_sql(path, ["line"], delimiter="\x1f\x1e", limits=limits)


def table_sql(db: duckdb.DuckDBPyConnection, path: Path) -> tuple[str, list[str]]:
    """SQL that reads a CSV, TSV or Parquet file with named columns, and the names.

    Raises:
        UserError: Another kind of file, or one without usable names.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        sql = f"read_parquet({quoted(str(path))})"
        try:
            return sql, list(db.sql(f"SELECT * FROM {sql} LIMIT 0").columns)
        except duckdb.Error as error:
            raise explained(error, path) from None
    if suffix not in _DELIMITERS:
        raise UserError(f"{path} is none of {', '.join(TABLES)}; convert it to one of them")
    delimiter = _DELIMITERS[suffix]
    names = header(path, delimiter)
    # Titles in TSV files hold single quote marks more often than quoted tabs.
    quote = '"' if delimiter == "," else ""
    return delimited_sql(path, names, delimiter=delimiter, header=True, quote=quote), names


def header(path: Path, delimiter: str) -> list[str]:
    """The first line of a delimited file, split.

    Raises:
        UserError: There is none, or two columns bear one name.
    """
    names = [name.strip() for name in first_row(path, delimiter, '"')]
    lowered = [name.lower() for name in names]
    if not any(names) or len(set(lowered)) < len(names):
        raise UserError(
            f"{path}, line 1: {', '.join(map(repr, names)) or 'nothing'} cannot be the names of"
            " the columns; give every column a name of its own"
        )
    return names


def first_row(path: Path, delimiter: str, quote: str) -> list[str]:
    """The first line of a delimited file, split; empty when there is none.

    Raises:
        UserError: The line is not UTF-8.
    """
    quoting: Any = csv.QUOTE_MINIMAL if quote else csv.QUOTE_NONE
    try:
        with path.open("rb") as stream:
            line = stream.readline(MAX_LINE).decode("utf-8-sig")
        return next(csv.reader([line], delimiter=delimiter, quoting=quoting), [])
    except (UnicodeDecodeError, csv.Error):
        raise UserError(f"{path}, line 1: not UTF-8; save the file as UTF-8") from None


def column(path: Path, columns: Sequence[str], *names: str) -> str:
    """The first of ``names`` among the columns of a file, however it is capitalised.

    Raises:
        UserError: None of them is there.
    """
    found = optional(columns, *names)
    if found is None:
        raise UserError(
            f"{path} has no column {' or '.join(map(repr, names))};"
            f" its columns are {', '.join(columns)}; rename one"
        )
    return found


def optional(columns: Sequence[str], *names: str) -> str | None:
    """The first of ``names`` among ``columns``, or nothing."""
    by_lower = {name.lower(): name for name in columns}
    return next((by_lower[name.lower()] for name in names if name.lower() in by_lower), None)


def create(db: duckdb.DuckDBPyConnection, table: str, select: str, path: Path) -> None:
    """Make a table from SQL that reads ``path``.

    Raises:
        UserError: The file is not what it should be.
    """
    try:
        db.execute(f"CREATE TABLE {table} AS {select}")
    except duckdb.Error as error:
        if lacks_room(error):
            raise  # nothing is wrong with the file
        raise explained(error, path) from None


def lacks_room(error: Exception) -> bool:
    """Whether DuckDB has come to the end of its memory or of the disk; Arrow hands it on."""
    text = str(error)
    return isinstance(error, duckdb.OutOfMemoryException) or any(
        words in text for words in ("Out of Memory Error", "No space left on device")
    )


def create_interactions(
    db: duckdb.DuckDBPyConnection, path: Path, source: str, user: str, item: str, time: str | None
) -> None:
    """Make ``raw_interactions`` from one row per interaction.

    Args:
        db: Where the table goes.
        path: The file, for messages.
        source: SQL that reads it.
        user: SQL of the user's id.
        item: SQL of the item's id.
        time: SQL of the time, NULL or a whole number of any unit; none: no column of times.

    Raises:
        UserError: The file is damaged, or a time is not a whole number.
    """
    create(
        db,
        "raw_interactions",
        f"SELECT {user}::VARCHAR AS user_id, {item}::VARCHAR AS item_id,"
        f" {whole_number_sql(time) if time else 'NULL::BIGINT'} AS timestamp,"
        f" row_number() OVER () - 1 AS ordinal FROM {source}",
        path,
    )
    if time is None:
        return
    (place,) = one(db, "SELECT min(ordinal) FROM raw_interactions WHERE timestamp IS NULL")
    if place is not None:
        (bad,) = one(db, f"SELECT {time}::VARCHAR FROM {source} LIMIT 1 OFFSET {place}")
        value = repr(bad) if bad is not None else "empty"
        raise UserError(
            f"{path}, row {place + 1}: the timestamp is {value}, not a whole number;"
            " write times as integers (such as Unix seconds), or leave the column out"
        )


_UNITS = {
    "DATE": ("days", "{} - DATE '1970-01-01'"),
    "TIMESTAMP": ("microseconds", "epoch_us({})"),
    "TIMESTAMP WITH TIME ZONE": ("microseconds", "epoch_us({})"),
    "TIMESTAMP_S": ("microseconds", "epoch_us({})"),
    "TIMESTAMP_MS": ("microseconds", "epoch_us({})"),
    "TIMESTAMP_NS": ("nanoseconds", "epoch_ns({})"),
}


def whole_time(db: duckdb.DuckDBPyConnection, source: str, name: str) -> tuple[str, str | None]:
    """SQL of a column of times as whole numbers, and their unit where the column has a type."""
    ((_, kind, *_),) = db.sql(f"DESCRIBE SELECT {ident(name)} FROM {source}").fetchall()
    if kind not in _UNITS:
        return ident(name), None
    unit, sql = _UNITS[kind]
    # Infinity is a time to DuckDB, and no number of units.
    whole = sql.format(ident(name))
    return f"CASE WHEN isfinite({ident(name)}) THEN {whole} END", unit


def whole_number_sql(value: str) -> str:
    """SQL that gives a BIGINT for a whole number, NULL for anything else (a cast would round)."""
    number = f"TRY_CAST({value} AS DOUBLE)"
    return (
        f"CASE WHEN isfinite({number}) AND {number} = trunc({number})"
        f" THEN TRY_CAST({value} AS BIGINT) END"
    )


def explained(error: duckdb.Error, path: Path) -> UserError:
    """Turn what DuckDB says about a file into one line."""
    text = str(error)
    line = re.search(r"CSV Error on Line: (\d+)", text)
    longer = re.search(r"Maximum line size of (\d+) bytes exceeded", text)
    width = re.search(r"Expected Number of Columns: (\d+) Found: (\d+)", text)
    if longer:
        reason, remedy = (
            f"a line of more than {int(longer[1]):,} bytes",
            "shorten it, or use Parquet",
        )
    elif width:
        reason = f"{width[2]} columns where {width[1]} are expected"
        remedy = "correct the line"
    elif "unicode" in text.lower() or "not utf-8" in text.lower():
        reason, remedy = "not UTF-8", "save the file as UTF-8"
    elif "state machine" in text:
        reason, remedy = "lines that end in different ways, or a stray quote", "write it again"
    elif "quote" in text.splitlines()[0].lower() or "unterminated quote" in text.lower():
        reason, remedy = "a quote is not closed", "correct the line"
    else:
        said = [part for part in text.splitlines() if part and not _ECHO.match(part)]
        reason = said[0].partition(" Error: ")[2] or said[0] if said else type(error).__name__
        remedy = "correct the file"
    place = f"{path}, line {line[1]}" if line else f"{path}"
    return UserError(f"{place}: {reason}; {remedy}")
