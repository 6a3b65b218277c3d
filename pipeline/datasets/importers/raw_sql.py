"""SQL over raw text and Parquet files, with errors that name the file and the line."""

import csv
import os
import re
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import duckdb

from features.atomic_files import is_out_of_space
from features.errors import UserError
from features.sql_text import quoted
from pipeline.datasets.importers.column_types import column_types, parquet_sql, read_error
from pipeline.datasets.importers.dict_lines import open_bytes
from pipeline.datasets.importers.messages import name_others

MAX_LINE = 64 * 1024 * 1024  # bytes; one user of a sequences file is one line
MAX_FIELD = 2_000_000  # bytes of a line of CSV that DuckDB reads
_LAST_LINE = 16_000_000  # bytes at the end of a file that must contain the end of a line
_DELIMITERS = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
_SEPARATORS = ",;\t|"
TABLES = (*_DELIMITERS, ".csv.gz", ".tsv.gz", ".parquet")
_NO_DETECTION = "auto_detect = false"
_ERROR_LINE = r"CSV Error on Line: (\d+)"
_ECHO = re.compile(r".*CSV Error on Line|Original Line:")  # these repeat a line of any length


def fetch_row(db: duckdb.DuckDBPyConnection, sql: str) -> tuple[Any, ...]:
    """Return the only row of a query."""
    (row,) = db.sql(sql).fetchall()
    return tuple(row)


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
        f"read_csv({quoted(str(path))}, {_NO_DETECTION}, columns = {{{names}}},"
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
    counts = Counter(name.lower() for name in names)
    repeated = [name for name in names if counts[name.lower()] > 1]
    if not any(given) or repeated:
        raise UserError(
            f"{path}, line 1: {', '.join(map(repr, repeated or given)) or 'an empty line'} cannot"
            f" name the columns{' (upper and lower case are the same)' if repeated else ''}; give"
            " every column a name of its own"
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
    return find_columns(path, columns, names)[0]


def find_columns(
    path: Path,
    columns: Sequence[str],
    *groups: Sequence[str],
    remedy: str = "rename one of them",
) -> list[str]:
    """Return a column of a file for each group: the first of its names; case does not matter.

    Args:
        path: The file, for messages.
        columns: The columns of the file.
        groups: Names that each column may have, the best first.
        remedy: Advice of the error.

    Raises:
        UserError: The file has none of the names of a group.
    """
    names = [find_optional_column(columns, *group) for group in groups]
    absent = [
        " or ".join(map(repr, group))
        for group, name in zip(groups, names, strict=True)
        if name is None
    ]
    if absent:
        raise UserError(
            f"{path} has no column {' and no column '.join(absent)};"
            f" its columns are {', '.join(columns)}; {remedy}"
        )
    return [name for name in names if name is not None]


def find_optional_column(columns: Sequence[str], *names: str) -> str | None:
    """Return the first of ``names`` among ``columns``, or None.

    Case does not matter, but a column of the same case is preferred.
    """
    # JSON may have keys that differ by case alone.
    known = {name.lower(): name for name in columns} | {name: name for name in columns}
    keys = (name if name in known else name.lower() for name in names)
    return next((known[key] for key in keys if key in known), None)


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
        raise file_error(error, path, _lines_like(db, select, error)) from None


def _lines_like(db: duckdb.DuckDBPyConnection, select: str, error: duckdb.Error) -> list[int]:
    """Return the lines of a file of CSV that have the fault of an error, in order."""
    first = re.search(_ERROR_LINE, str(error))
    if not first or _NO_DETECTION not in select:
        return []
    rejecting = f"{_NO_DETECTION}, store_rejects = true, rejects_limit = 0"
    try:
        db.execute(
            f"CREATE OR REPLACE TEMP TABLE _kept AS {select.replace(_NO_DETECTION, rejecting)}"
        )
    except duckdb.Error:  # the first line is named alone
        return []
    # Too few and too many columns are one fault.
    kind = "CASE WHEN error_type LIKE '%COLUMNS' THEN 'COLUMNS' ELSE error_type::VARCHAR END"
    faults = f"(SELECT line, {kind} AS kind FROM reject_errors)"
    lines = db.sql(
        f"SELECT DISTINCT line FROM {faults} WHERE kind IN"
        f" (SELECT kind FROM {faults} WHERE line = {first[1]}) ORDER BY line"
    ).fetchall()
    return [line for (line,) in lines]


def file_error(error: duckdb.Error, path: Path, lines: Sequence[int] = ()) -> UserError:
    """Return the error of DuckDB about a file as one line with a remedy.

    Args:
        error: The error.
        path: The file.
        lines: Numbers of the lines that have this fault, if they are known.
    """
    text = str(error)
    if "Permission denied" in text:
        return read_error(path, PermissionError())
    line = re.search(_ERROR_LINE, text)
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
        parts = [part for part in text.splitlines() if part and not _ECHO.match(part)]
        reason = parts[0].partition(" Error: ")[2] or parts[0] if parts else type(error).__name__
        remedy = "correct the file"
    if lines:
        others = name_others(len(lines), [number - 1 for number in lines[:3]], "line")
        return UserError(f"{path}, line {lines[0]}: {reason}{others}; {remedy}")
    place = f"{path}, line {line[1]}" if line else f"{path}"
    return UserError(f"{place}: {reason}; {remedy}")
