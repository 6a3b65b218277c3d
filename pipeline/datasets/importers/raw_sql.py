"""SQL over raw text and Parquet files, with errors that name the file and the line."""

import csv
import os
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import duckdb

from features.atomic_files import is_out_of_space
from features.errors import UserError
from features.sql_text import quoted
from pipeline.datasets.importers.column_types import column_types, parquet_sql, read_error
from pipeline.datasets.importers.dict_lines import open_bytes

MAX_LINE = 64 * 1024 * 1024  # bytes; one user of a sequences file is one line
MAX_FIELD = 2_000_000  # bytes of a line of CSV that DuckDB reads
_LAST_LINE = 16_000_000  # bytes at the end of a file that must contain the end of a line
_DELIMITERS = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
_SEPARATORS = ",;\t|"
TABLES = (*_DELIMITERS, ".csv.gz", ".tsv.gz", ".parquet")
_ECHO = re.compile(r".*CSV Error on Line|Original Line:")  # these repeat a line of any length


def fetch_row(db: duckdb.DuckDBPyConnection, sql: str) -> tuple[Any, ...]:
    """Return the only row of a query."""
    (row,) = db.sql(sql).fetchall()
    return tuple(row)


def name_rows(count: int, rows: Sequence[int], noun: str = "row") -> str:
    """Return ``4 rows (such as 2, 5, 6)`` for a message.

    Args:
        count: Number of the rows.
        rows: The first of them, counted from 0.
        noun: The word for a row.
    """
    numbers = ", ".join(str(row + 1) for row in rows)
    examples = f"such as {numbers}" if count > len(rows) else numbers
    return f"{count} {noun}{'s' if count > 1 else ''} ({examples})"


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
    """Return SQL that reads a delimited file with every column as VARCHAR.

    Args:
        path: The file.
        columns: Names of all its columns.
        delimiter: Text between two columns.
        header: Whether the first line holds names and is skipped.
        quote: Quote character, or empty if quotes are ordinary characters.
        encoding: Encoding of the file.
        limits: Further arguments of ``read_csv``.
    """
    names = ", ".join(f"{quoted(name)}: 'VARCHAR'" for name in columns)
    return (
        f"read_csv({quoted(str(path))}, auto_detect = false, columns = {{{names}}},"
        f" delim = {quoted(delimiter)}, header = {str(header).lower()},"
        f" quote = {quoted(quote)}, escape = {quoted(quote)}, encoding = {quoted(encoding)}"
        f"{', compression = ' + quoted('gzip') if is_gzip(path) else ''} {limits})"
    )


def lines_sql(path: Path) -> str:
    """Return SQL that reads a text file into one column ``line``; an empty line is NULL."""
    # No text contains this delimiter. strict_mode = false accepts mixed line endings. The default
    # buffer would hold sixteen of the longest lines for each thread.
    limits = f", strict_mode = false, max_line_size = {MAX_LINE}, buffer_size = {2 * MAX_LINE}"
    return delimited_sql(path, ["line"], delimiter="\x1f\x1e", limits=limits)


def table_sql(db: duckdb.DuckDBPyConnection, path: Path) -> tuple[str, list[str]]:
    """Return SQL that reads a CSV, TSV or Parquet file with named columns, and the names.

    Raises:
        UserError: The file is of another kind, or its header cannot be used.
    """
    suffix = table_suffix(path)
    if suffix == ".parquet":
        try:
            source = parquet_sql(db, path)
            return source, list(column_types(db, source))
        except duckdb.Error as error:
            raise file_error(error, path) from None
    if suffix not in _DELIMITERS:
        raise UserError(f"{path} is none of {', '.join(TABLES)}; convert it to one of them")
    delimiter = _find_delimiter(path, _DELIMITERS[suffix])
    names = read_header(path, delimiter)
    _check_last_line(path)
    # In TSV files a stray quote in a title is more common than a quoted tab.
    quote = "" if suffix != ".csv" and delimiter == "\t" else '"'
    return delimited_sql(path, names, delimiter=delimiter, header=True, quote=quote), names


def is_gzip(path: Path) -> bool:
    """Return whether the name of a file ends in ``.gz``."""
    return path.name.lower().endswith(".gz")


def table_suffix(path: Path) -> str:
    """Return the suffix of a table in lower case, of text files without ``.gz``.

    Examples:
        >>> table_suffix(Path("Items.CSV.gz"))
        '.csv'
    """
    name = Path(path.name.lower())
    inner = Path(name.stem).suffix
    return inner if name.suffix == ".gz" and inner != ".parquet" else name.suffix


def _find_delimiter(path: Path, usual: str) -> str:
    """Return the text between the columns: the usual one of the suffix, or that of the header.

    Excel writes ``;`` into files of CSV in many countries.
    """
    for mark in usual + _SEPARATORS:
        first, *others = read_first_row(path, mark, '"') or [""]
        if others and not any(other in first for other in _SEPARATORS):
            return mark
    return usual


def _check_last_line(path: Path) -> None:
    """Refuse a file whose last line is too long.

    DuckDB refuses all other lines of more than ``MAX_FIELD`` bytes. Its parallel reader leaves out
    a last line that is longer than a buffer of 32 MB, without an error.
    """
    if is_gzip(path):  # has no parallel reader
        return
    with path.open("rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - _LAST_LINE))
        end = stream.read()
    if size > len(end) and not re.search(rb"[\r\n]", end.rstrip(b"\r\n")):
        raise UserError(
            f"{path}, last line: a line of more than {MAX_FIELD:,} bytes; shorten it, or use"
            " Parquet"
        )


def read_header(path: Path, delimiter: str) -> list[str]:
    """Return the names in the first line of a delimited file.

    A column without a name, such as the index that pandas writes, is called ``column`` and its
    number.

    Raises:
        UserError: The line is empty, or two columns have the same name.
    """
    given = [name.strip() for name in read_first_row(path, delimiter, '"')]
    names = [name or f"column{number}" for number, name in enumerate(given, 1)]
    lowered = [name.lower() for name in names]
    if not any(given) or len(set(lowered)) < len(names):
        raise UserError(
            f"{path}, line 1: {', '.join(map(repr, given)) or 'an empty line'} cannot name the"
            " columns; give every column a name of its own"
        )
    return names


def read_first_row(path: Path, delimiter: str, quote: str) -> list[str]:
    """Return the first line of a delimited file as a list; an empty file gives an empty list.

    Raises:
        UserError: The line cannot be read, is not UTF-8, or ends in a carriage return alone.
    """
    quoting: Any = csv.QUOTE_MINIMAL if quote else csv.QUOTE_NONE
    try:
        with open_bytes(path) as stream:
            line = stream.readline(MAX_LINE).decode("utf-8-sig")
        return next(csv.reader([line], delimiter=delimiter, quoting=quoting), [])
    except (OSError, EOFError, zlib.error) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{path} cannot be read ({reason}); copy it again") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}, line 1: not UTF-8; save the file as UTF-8") from None
    except csv.Error as error:
        if "\r" in line.rstrip("\r\n"):
            raise UserError(
                f"{path}: lines end in a carriage return alone; save the file with line feeds"
            ) from None
        raise UserError(f"{path}, line 1: {error}; correct the line") from None


def find_column(path: Path, columns: Sequence[str], *names: str) -> str:
    """Return the first of ``names`` among the columns of a file; case does not matter.

    Raises:
        UserError: The file has none of them.
    """
    name = find_optional_column(columns, *names)
    if name is None:
        raise UserError(
            f"{path} has no column {' or '.join(map(repr, names))};"
            f" its columns are {', '.join(columns)}; rename one of them"
        )
    return name


def find_optional_column(columns: Sequence[str], *names: str) -> str | None:
    """Return the first of ``names`` among ``columns``, or None; case does not matter."""
    by_lower = {name.lower(): name for name in columns}
    return next((by_lower[name.lower()] for name in names if name.lower() in by_lower), None)


def create_table(db: duckdb.DuckDBPyConnection, table: str, select: str, path: Path) -> None:
    """Create a table from SQL that reads ``path``.

    Raises:
        UserError: The file cannot be read as the SQL expects it.
    """
    try:
        db.execute(f"CREATE TABLE {table} AS {select}")
    except duckdb.Error as error:
        if is_out_of_space(error):
            raise  # the file is not at fault
        raise file_error(error, path) from None


def file_error(error: duckdb.Error, path: Path) -> UserError:
    """Return the error of DuckDB about a file as one line with a remedy."""
    text = str(error)
    if "Permission denied" in text:
        return read_error(path, PermissionError())
    line = re.search(r"CSV Error on Line: (\d+)", text)
    longer = re.search(r"Maximum line size of (\d+) bytes exceeded", text)
    width = re.search(r"Expected Number of Columns: (\d+) Found: (\d+)", text)
    if longer:
        reason, remedy = (
            f"a line of more than {int(longer[1]):,} bytes",
            "shorten it, or use Parquet",
        )
    elif "Parallel CSV Reader" in text:
        reason = f"a field of more than {MAX_FIELD:,} bytes, or a quote that is not closed"
        remedy = "shorten the field or close the quote, or use Parquet"
    elif width:
        reason = f"{width[2]} columns where {width[1]} are expected"
        remedy = "correct the line"
    elif "unicode" in text.lower() or "not utf-8" in text.lower():
        reason, remedy = "not UTF-8", "save the file as UTF-8"
    elif "state machine" in text:
        reason, remedy = "mixed line endings or a stray quote", "correct the file"
    elif "quote" in text.splitlines()[0].lower() or "unterminated quote" in text.lower():
        reason = f"a quote is not closed, or a field has more than {MAX_FIELD:,} bytes"
        remedy = "correct the line, or use Parquet"
    else:
        lines = [part for part in text.splitlines() if part and not _ECHO.match(part)]
        reason = lines[0].partition(" Error: ")[2] or lines[0] if lines else type(error).__name__
        remedy = "correct the file"
    place = f"{path}, line {line[1]}" if line else f"{path}"
    return UserError(f"{place}: {reason}; {remedy}")
