"""The dates of a split by time: ``mmrec prepare --split time --valid-from --test-from``."""

from collections.abc import Iterator
from datetime import UTC, datetime

import duckdb

from features.errors import UserError
from features.registry import Registry
from features.splits import NANOSECONDS, TimeSplit, format_time, split_sql

SPLIT_KINDS = Registry("split", {"leave-one-out": False, "time": True})
"""Name of a split to whether it has dates."""


def check_dates(kind: str, valid_from: str | None, test_from: str | None) -> None:
    """Check that the dates of a split are given if and only if it has dates.

    Raises:
        UserError: The kind is unknown, a date is missing, or a date is given without a use.
    """
    given = [f"--valid-from {valid_from}"] if valid_from is not None else []
    given += [f"--test-from {test_from}"] if test_from is not None else []
    if SPLIT_KINDS.find(kind):
        if len(given) < 2:
            raise UserError(
                "--split time needs two dates; give --valid-from DATE and --test-from DATE, such as"
                " 2026-03-01"
            )
    elif given:
        raise UserError(
            f"{' and '.join(given)} without a split by time has no use; give --split time, or leave"
            " it out"
        )


def time_split(
    valid_from: str | None, test_from: str | None, *, has_times: bool, unit: str | None
) -> TimeSplit | None:
    """Return two dates in the unit of a dataset's timestamps; None without dates.

    Args:
        valid_from: ISO date or time; without a zone it is in UTC. Or a whole number in the unit.
        test_from: As ``valid_from``.
        has_times: Whether the interactions have times.
        unit: Unit of the timestamps, see :attr:`features.warehouse.DatasetInfo.time_unit`.

    Raises:
        UserError: There are no times, a date cannot be read, or the dates are not in order.
    """
    if valid_from is None or test_from is None:
        return None
    if not has_times:
        raise UserError(
            "--split time needs times, and the interactions have none; give a file with times, or"
            " --split leave-one-out"
        )
    dates = TimeSplit(
        valid_from=_parse("--valid-from", valid_from, unit),
        test_from=_parse("--test-from", test_from, unit),
    )
    if dates.valid_from >= dates.test_from:
        read = [format_time(time, unit) for time in (dates.valid_from, dates.test_from)]
        raise UserError(
            f"--valid-from {valid_from} ({read[0]}) is not before --test-from {test_from}"
            f" ({read[1]}); exchange them or give other dates, such as 2026-03-01"
        )
    return dates


def _parse(option: str, text: str, unit: str | None) -> int:
    """Return a date in a unit of time."""
    is_basic_date = unit is not None and len(text.strip()) == 8  # 20260301
    if text.strip().lstrip("-").isdecimal() and not is_basic_date:
        return int(text)
    if unit is None:
        raise UserError(
            f"{option} {text!r}: the unit of the timestamps is unknown; give a number as in the"
            " file"
        )
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        raise UserError(
            f"{option} {text!r} is no date; write 2026-03-01, 2026-03-01T12:00:00, or a number as"
            " in the file"
        ) from None
    if moment.tzinfo is not None:
        moment = moment.astimezone(UTC).replace(tzinfo=None)
    since = moment - datetime(1970, 1, 1)
    nanoseconds = (since.days * 86_400 + since.seconds) * 10**9 + since.microseconds * 1000
    return -(-nanoseconds // NANOSECONDS[unit])  # the first time that is not before the date


def describe_split(
    db: duckdb.DuckDBPyConnection, dates: TimeSplit, unit: str | None
) -> Iterator[str]:
    """Yield the numbers of a split by time.

    Raises:
        UserError: A split is empty.
    """
    ordered = "(SELECT u AS user, timestamp, position FROM ordered)"
    counts = dict(
        db.sql(
            f"SELECT split, count(*) FROM ({split_sql(ordered, dates)}) GROUP BY split"
        ).fetchall()
    )
    valid, test = format_time(dates.valid_from, unit), format_time(dates.test_from, unit)
    first, last = db.sql("SELECT min(timestamp), max(timestamp) FROM ordered").fetchall()[0]
    places = {
        "train": f"before {valid}", "validation": f"from {valid} to {test}",
        "test": f"from {test} on",
    }  # fmt: skip
    for split, place in places.items():
        if not counts.get(split):
            kind = "interaction" if split == "train" else "interaction with an earlier one"
            raise UserError(
                f"--split time: no {kind} is {place}; the times are from"
                f" {format_time(first, unit)} to {format_time(last, unit)}, give other dates"
            )
    yield (
        f"split by time: {counts['train']:,} interactions before {valid} are for training,"
        f" {counts['validation']:,} users are validated from then on and {counts['test']:,} tested"
        f" from {test} on; {counts.get('other', 0):,} interactions are only inputs or unused"
    )
