"""The protocol's splits and the cold subset, as SQL over the canonical tables.

Leave-one-out by position: a user's last interaction is ``test``, the one before ``validation``,
all others ``train``. Users with fewer than three interactions are trained on and never evaluated,
because one of the three splits would be empty. The input of ``test`` includes the validation item.

A split by time has two dates for all users. Interactions before the first date are ``train``. A
user's first interaction between the dates is ``validation``, and the first one from the second date
on is ``test``, if it has an earlier interaction as its input. All others are ``other``: they can be
a part of an input, and are never learned or ranked.

Cold items have fewer than ``COLD_BELOW`` training interactions. Interactions of validation and test
do not count: otherwise the choice of the items would depend on the targets.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta

MIN_EVALUATED = 3
COLD_BELOW = 10
SPLITS = ("train", "validation", "test", "other")
"""Values of the column ``split``."""


NANOSECONDS = {
    "days": 86_400 * 10**9, "seconds": 10**9, "milliseconds": 10**6, "microseconds": 10**3,
    "nanoseconds": 1,
}  # fmt: skip
"""Nanoseconds of each unit of time of a dataset."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TimeSplit:
    """The two dates of a split by time, in the unit of the dataset's timestamps."""

    valid_from: int
    test_from: int


def format_time(time: int, unit: str | None) -> str:
    """Return a time as ISO text in UTC, or as a number if its unit is unknown.

    Args:
        time: A time since 1970 in a unit of :data:`NANOSECONDS`.
        unit: The unit.

    Examples:
        >>> format_time(19_783, "days")
        '2024-03-01'
    """
    if unit is None:
        return str(time)
    moment = datetime(1970, 1, 1) + timedelta(seconds=time * NANOSECONDS[unit] // 10**9)
    return moment.isoformat().removesuffix("T00:00:00")


def split_sql(interactions: str, dates: TimeSplit | None = None) -> str:
    """Return a query that adds the column ``split`` to a table, view or subquery.

    Args:
        interactions: The table.
        dates: The dates of a split by time; None is leave-one-out.
    """
    if dates is None:
        return f"""
        SELECT *, CASE
            WHEN n < {MIN_EVALUATED} OR position < n - 2 THEN 'train'
            WHEN position = n - 2 THEN 'validation'
            ELSE 'test' END AS split
        FROM (SELECT *, count(*) OVER (PARTITION BY user) AS n FROM {interactions})
    """
    begins = f"timestamp >= {dates.valid_from} AND timestamp < {dates.test_from}"
    return f"""
        SELECT *, CASE
            WHEN timestamp < {dates.valid_from} THEN 'train'
            WHEN position = validation_at THEN 'validation'
            WHEN position = test_at THEN 'test'
            ELSE 'other' END AS split
        FROM (SELECT *,
            min(position) FILTER (position > 0 AND {begins})
                OVER (PARTITION BY user) AS validation_at,
            min(position) FILTER (position > 0 AND timestamp >= {dates.test_from})
                OVER (PARTITION BY user) AS test_at
            FROM {interactions})
    """


def train_counts_sql(interactions: str, items: str, dates: TimeSplit | None = None) -> str:
    """Return a query of (item, train_count), for every item, also those without interactions."""
    return f"""
        SELECT i.item, count(s.item) AS train_count
        FROM {items} i
        LEFT JOIN (SELECT item FROM ({split_sql(interactions, dates)}) WHERE split = 'train') s
        ON s.item = i.item
        GROUP BY i.item
    """


def cold_sql(interactions: str, items: str, dates: TimeSplit | None = None) -> str:
    """Return a query of the cold-start subset: held-out interactions whose item is cold.

    Each row (user, item, position, split) is the user's sequence up to this cold item. Only
    held-out positions are used: a cold item at a training position has been a training target, and
    ranking it again would measure memorisation.
    """
    return f"""
        SELECT s.user, s.item, s.position, s.split
        FROM ({split_sql(interactions, dates)}) s
        JOIN ({train_counts_sql(interactions, items, dates)}) c ON c.item = s.item
        WHERE s.split IN ('validation', 'test') AND c.train_count < {COLD_BELOW}
    """
