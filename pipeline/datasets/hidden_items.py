"""A strict protocol of cold start: ``mmrec prepare --hide-items SHARE --seed S``.

A random sample of the items is hidden: their interactions are in the tables as test targets only.
The test target of a user is the same as without hidden items. Every other interaction with a hidden
item is dropped before the tables are written, so no history, count or validation has one.
"""

from collections.abc import Iterator

import duckdb

from features.errors import UserError
from features.splits import MIN_EVALUATED, TimeSplit
from pipeline.datasets.importers.messages import plural
from pipeline.datasets.importers.raw_sql import fetch_row


def check_share(share: float | None) -> None:
    """Raise a UserError unless a share is above 0 and below 1, or None."""
    if share is not None and not 0 < share < 1:
        raise UserError(
            f"--hide-items {share} is no share of the items; give a number above 0 and below 1,"
            " such as 0.1"
        )


def hide_items(
    db: duckdb.DuckDBPyConnection,
    share: float | None,
    seed: int,
    order: str,
    dates: TimeSplit | None,
) -> Iterator[str]:
    """Create ``hidden`` (i), the hidden items, and drop their interactions that are no test target.

    With leave-one-out, the last interaction of a user stays if at least two interactions with other
    items are before it: fewer could not be divided into training and validation. With a split by
    time, a user's first interaction of the test period stays if an interaction with another item is
    before the period.

    Args:
        db: A connection with the tables ``core``, ``user_ids`` and ``item_ids``.
        share: Share of the items with interactions; None hides none.
        seed: Seed of the sample, which depends on it and on the item ids.
        order: SQL that orders the interactions of a user with equal times.
        dates: The dates of a split by time; None is leave-one-out.

    Yields:
        A message with the numbers of items and interactions; none if no item is hidden.

    Raises:
        UserError: The share is less than one item, or all items.
    """
    items = fetch_row(db, "SELECT count(DISTINCT i) FROM core")[0]
    count = 0 if share is None else round(share * items)
    if share is not None and not 0 < count < items:
        raise UserError(
            f"--hide-items {share} hides {count} of {plural(items, 'item')} with interactions;"
            " give a share that hides some and leaves some"
        )
    db.execute(
        "CREATE TABLE hidden AS SELECT i FROM item_ids SEMI JOIN core USING (i)"
        f" ORDER BY md5_number_lower('item:{seed}:' || item_id), i LIMIT {count}"
    )
    if count:
        _select_kept(db, dates, order)
        yield _replace_core(db, count, seed)


def _select_kept(db: duckdb.DuckDBPyConnection, dates: TimeSplit | None, order: str) -> None:
    """Create ``kept``: the interactions with other items, and the test targets."""
    is_target = f"latest AND visible >= {MIN_EVALUATED - 1}"
    if dates is not None:
        is_target = "is_first_in_test AND visible_before_test > 0"
    test_from = 0 if dates is None else dates.test_from
    db.execute(
        "CREATE TABLE kept AS SELECT u, i, timestamp, ordinal FROM (SELECT *,"
        " row_number() OVER (PARTITION BY u ORDER BY number DESC) = 1 AS latest,"
        " count(*) FILTER (NOT is_hidden) OVER (PARTITION BY u) AS visible,"
        f" min(number) FILTER (timestamp >= {test_from}) OVER (PARTITION BY u) = number"
        " AS is_first_in_test,"
        f" count(*) FILTER (NOT is_hidden AND timestamp < {test_from}) OVER (PARTITION BY u)"
        " AS visible_before_test"
        " FROM (SELECT core.*, i IN (SELECT i FROM hidden) AS is_hidden, row_number() OVER"
        f" (PARTITION BY u ORDER BY timestamp, {order}) AS number"
        " FROM core JOIN user_ids USING (u) JOIN item_ids USING (i)))"
        f" WHERE NOT is_hidden OR ({is_target})"
    )


def _replace_core(db: duckdb.DuckDBPyConnection, count: int, seed: int) -> str:
    """Replace ``core`` by ``kept``; return a message about the ``count`` hidden items."""
    items, users, rows = fetch_row(
        db, "SELECT count(DISTINCT i), count(DISTINCT u), count(*) FROM core"
    )
    kept_users, kept, targets = fetch_row(
        db,
        "SELECT count(DISTINCT u), count(*), count(*) FILTER (i IN (SELECT i FROM hidden))"
        " FROM kept",
    )
    db.execute("DROP TABLE core")
    db.execute("ALTER TABLE kept RENAME TO core")
    gone = f", {plural(users - kept_users, 'user')} without other items left out"
    return (
        f"{plural(count, 'hidden item')} of {items:,} (seed {seed}): {targets:,} of their"
        f" interactions are test targets, {rows - kept:,} are dropped"
        f"{gone if users > kept_users else ''}"
    )
