"""The table ``raw_interactions`` from one row for each interaction, and the form of its times.

Times are whole numbers of any unit, or ISO 8601 dates or times as text. All times of a file have
one form; a mixture is refused, because its order would be wrong.
"""

from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path

import duckdb

from features.errors import UserError
from pipeline.datasets.importers.messages import name_rows, plural
from pipeline.datasets.importers.raw_sql import create_table, fetch_row

UNITS = {
    "seconds": (10**8, 10**10),
    "milliseconds": (10**11, 10**13),
    "microseconds": (10**14, 10**16),
    "nanoseconds": (10**17, 2**63),
}
"""Unit to the numbers that are taken for times of this unit since 1970, about 1973 to 2286.

Numbers outside of all ranges, such as 1, 2, 3, have no unit: they only order.
"""
_PER_MICROSECOND = {
    "seconds": "* 1000000", "milliseconds": "* 1000", "microseconds": "", "nanoseconds": "// 1000",
}  # fmt: skip
_DAY = "[0-9]{4}-[0-9]{2}-[0-9]{2}"
_CLOCK = "[Tt ][0-9]{2}:[0-9]{2}(:[0-9]{2}([.,][0-9]{1,9})?)?"
_ISO = {
    "ISO dates": _DAY,
    "ISO times without a zone": _DAY + _CLOCK,
    "ISO times with a zone": _DAY + _CLOCK + " ?([Zz]|UTC|[+-][0-9]{2}(:?[0-9]{2})?)",
}
"""Form of times that are text to the regular expression of a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Times:
    """Facts about the times of interactions."""

    unit: str | None = None
    """Unit of ``timestamp`` since 1970: ``days`` or a name in ``UNITS``; None if it is unknown."""
    notes: tuple[str, ...] = ()
    """Messages for the user, one line each."""


def create_interactions(
    db: duckdb.DuckDBPyConnection,
    path: Path,
    source: str,
    *,
    user: str,
    item: str,
    time: str | None,
    unit: str | None = None,
) -> Times:
    """Create ``raw_interactions`` from one row for each interaction.

    Whole numbers are stored as they are. ISO dates are stored as days since 1970, and ISO times as
    microseconds (nanoseconds if a time has more than six decimals). Times without a zone are UTC.

    Args:
        db: The connection that gets the table.
        path: The file, for messages.
        source: SQL that reads the file.
        user: SQL of the user id.
        item: SQL of the item id.
        time: SQL of the time; None if the file has no times.
        unit: Unit of the time if the type of its column determines the unit.

    Raises:
        UserError: The file is damaged, a time has another form, or the times have several forms.
    """
    number = integer_sql(time) if time else "NULL::BIGINT"
    _create(db, path, source, user, item, number)
    if time is None:
        return Times()
    count, rows = _rows_without_time(db)
    if not count:
        return Times(unit=unit, notes=_stored(unit)) if unit else _units(db, path)
    text = _text_at(db, source, time, rows[0])
    if _iso_form(db, text) is None:
        raise _time_error(path, count, rows, text)
    form, scale = _find_form(db, path, source, time)
    unit, value = _iso_sql(f"trim({time}::VARCHAR)", form, scale)
    db.execute("DROP TABLE raw_interactions")
    _create(db, path, source, user, item, value)
    count, rows = _rows_without_time(db)
    if count:
        raise _time_error(path, count, rows, _text_at(db, source, time, rows[0]))
    zone = "; they are taken for UTC" if form == "ISO times without a zone" else ""
    return Times(unit=unit, notes=(f"timestamps are {form}{zone}", *_stored(unit)))


def _create(
    db: duckdb.DuckDBPyConnection, path: Path, source: str, user: str, item: str, time: str
) -> None:
    create_table(
        db,
        "raw_interactions",
        f"SELECT {user}::VARCHAR AS user_id, {item}::VARCHAR AS item_id, {time} AS timestamp,"
        f" row_number() OVER () - 1 AS ordinal FROM {source}",
        path,
    )


def _stored(unit: str) -> tuple[str, ...]:
    return (f"timestamps are stored as {unit} since 1970",)


def _rows_without_time(db: duckdb.DuckDBPyConnection) -> tuple[int, list[int]]:
    """Return the number of rows without a time, and the first three of these rows from 0."""
    count, rows = fetch_row(
        db, "SELECT count(*), min(ordinal, 3) FROM raw_interactions WHERE timestamp IS NULL"
    )
    return count, rows


def _text_at(db: duckdb.DuckDBPyConnection, source: str, time: str, row: int) -> str | None:
    (text,) = fetch_row(db, f"SELECT {time}::VARCHAR FROM {source} LIMIT 1 OFFSET {row}")
    return None if text is None else str(text)


# -- numbers --------------------------------------------------------------------------------


def integer_sql(value: str) -> str:
    """Return SQL that is a BIGINT for a whole number and NULL otherwise; a cast would round."""
    number = f"TRY_CAST({value} AS DOUBLE)"
    decimal = f"TRY_CAST({value} AS DECIMAL(38, 9))"
    # A DOUBLE of 2^53 and more is whole even if the number is not.
    is_whole = f"(abs({number}) < {1 << 53} OR {decimal} = trunc({decimal}))"
    return (
        f"CASE WHEN isfinite({number}) AND {number} = trunc({number}) AND {is_whole}"
        f" THEN TRY_CAST({value} AS BIGINT) END"
    )


def _units(db: duckdb.DuckDBPyConnection, path: Path) -> Times:
    """Return the unit of whole numbers by their magnitude.

    Raises:
        UserError: Numbers of several units are mixed.
    """
    cases = " ".join(
        f"WHEN timestamp >= {least} AND timestamp < {limit} THEN '{unit}'"
        for unit, (least, limit) in UNITS.items()
    )
    rows = db.sql(
        f"SELECT CASE {cases} END AS unit, count(*), min(ordinal), arg_min(timestamp, ordinal),"
        " min(timestamp), max(timestamp) FROM raw_interactions GROUP BY 1 ORDER BY 3"
    ).fetchall()
    mixed = [entry[:4] for entry in rows if entry[0] is not None]
    if len(mixed) > 1:
        examples = " and ".join(
            f"{unit} ({plural(count, 'row')}, such as {value} in row {row + 1})"
            for unit, count, row, value in mixed
        )
        raise UserError(
            f"{path}: the timestamps mix {examples}, by their magnitude; write all in one unit"
        )
    if len(rows) != 1 or not mixed:
        return Times()
    ((unit, _, _, _, least, most),) = rows
    first, last = fetch_row(
        db,
        "SELECT "
        + ", ".join(
            f"make_timestamp({value}::BIGINT {_PER_MICROSECOND[unit]})::DATE::VARCHAR"
            for value in (least, most)
        ),
    )
    note = f"timestamps are {unit} since 1970, by their magnitude: {first} to {last}"
    return Times(unit=unit, notes=(note,))


# -- ISO 8601 -------------------------------------------------------------------------------


def _form_sql(text: str) -> str:
    """Return SQL of the form of a time, a key of ``_ISO`` or ``whole numbers``, or NULL."""
    cases = " ".join(
        f"WHEN regexp_full_match({text}, '{pattern}')"
        f" AND TRY_CAST({_standard_sql(text)} AS TIMESTAMP) IS NOT NULL THEN '{form}'"
        for form, pattern in _ISO.items()
    )
    return f"CASE {cases} WHEN ({integer_sql(text)}) IS NOT NULL THEN 'whole numbers' END"


def _standard_sql(text: str) -> str:
    """Return SQL of an ISO time as DuckDB reads it."""
    return f"upper(replace({text}, ',', '.'))"


def _iso_form(db: duckdb.DuckDBPyConnection, text: str | None) -> str | None:
    form: str | None
    ((form,),) = db.execute(
        f"SELECT {_form_sql('value')} FROM (SELECT trim($text::VARCHAR) AS value)", {"text": text}
    ).fetchall()
    return form if form in _ISO else None


def _find_form(
    db: duckdb.DuckDBPyConnection, path: Path, source: str, time: str
) -> tuple[str, int]:
    """Return the form of all times of a file, and the largest number of decimals of a second.

    Raises:
        UserError: A time has no form, or the times have several forms.
    """
    forms = db.sql(
        f"SELECT {_form_sql('value')} AS form, count(*), min(row, 3), arg_min(value, row),"
        " max(strlen(regexp_extract(value, '[.,]([0-9]+)', 1)))"
        f" FROM (SELECT trim({time}::VARCHAR) AS value, row_number() OVER () - 1 AS row"
        f" FROM {source}) GROUP BY 1 ORDER BY min(row)"
    ).fetchall()
    for form, count, rows, value, _ in forms:
        if form is None:
            raise _time_error(path, count, rows, value)
    if len(forms) > 1:
        examples = " and ".join(
            f"{form} ({plural(count, 'row')}, such as {value!r} in row {rows[0] + 1})"
            for form, count, rows, value, _ in forms
        )
        raise UserError(f"{path}: the timestamps mix {examples}; write all in one form")
    ((form, _, _, _, decimals),) = forms
    return form, decimals


def _iso_sql(text: str, form: str, decimals: int) -> tuple[str, str]:
    """Return the unit and SQL of ISO times of one form as whole numbers."""
    if form == "ISO dates":
        return "days", f"(TRY_CAST({text} AS DATE) - DATE '1970-01-01')::BIGINT"
    kind = "TIMESTAMPTZ" if form == "ISO times with a zone" else "TIMESTAMP"
    value = f"epoch_us(TRY_CAST({_standard_sql(text)} AS {kind}))"
    if decimals <= 6:
        return "microseconds", value
    rest = f"rpad(substr(regexp_extract({text}, '[.,]([0-9]+)', 1), 7), 3, '0')::HUGEINT"
    return "nanoseconds", f"TRY_CAST({value}::HUGEINT * 1000 + {rest} AS BIGINT)"


def _time_error(path: Path, count: int, rows: list[int], text: str | None) -> UserError:
    """Return the error about rows whose time cannot be read.

    Args:
        path: The file.
        count: Number of these rows.
        rows: The first three of them, from 0.
        text: The time of the first row.
    """
    others = f" ({name_rows(count, rows)} are no times)" if count > 1 else ""
    fault = f"{text[:120]!r}, {_time_fault(text)}" if text and text.strip() else "empty"
    return UserError(
        f"{path}, row {rows[0] + 1}: the timestamp is {fault}{others};"
        " write times as integers (such as Unix seconds) or as 2026-11-27T18:30:00Z, or leave the"
        " column out"
    )


def _time_fault(text: str) -> str:
    try:
        number = Decimal(text.strip())
    except InvalidOperation:
        return "neither a whole number nor an ISO time"
    if number.is_finite() and (number.adjusted() > 30 or number == int(number)):
        return "outside the range of 64-bit integers"
    return "not a whole number"
