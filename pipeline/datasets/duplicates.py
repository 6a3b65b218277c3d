"""Repeated rows of the raw files: items that are listed twice, and copies of interactions.

A copy is an interaction that agrees with an earlier one in user, item and time. A pair of user and
item at another time is no copy: the user came back.
"""

from collections.abc import Iterator
from pathlib import Path

import duckdb

from features.errors import UserError
from features.registry import Registry
from features.splits import TimeSplit, split_sql
from pipeline.datasets.importers.messages import plural, quote_all
from pipeline.datasets.importers.raw_sql import fetch_row

DUPLICATE_ITEMS: Registry[str | None] = Registry(
    "choice for --duplicate-items", {"refuse": None, "first": "min", "last": "max"}
)
"""Choice of ``--duplicate-items`` to the aggregate that chooses a row; None refuses."""

DUPLICATE_INTERACTIONS: Registry[bool] = Registry(
    "choice for --duplicate-interactions", {"keep": True, "drop": False}
)
"""Choice of ``--duplicate-interactions`` to whether copies are kept."""


def handle_duplicate_items(
    db: duckdb.DuckDBPyConnection, choice: str, listing: Path
) -> Iterator[str]:
    """Keep one row of each item in ``raw_items``; yield a message for the user.

    Args:
        db: A connection with the table ``raw_items`` in the order of the file.
        choice: A name in ``DUPLICATE_ITEMS``.
        listing: The file of items, for messages.

    Raises:
        UserError: An item has several rows, and the choice is ``refuse``.
    """
    repeated, examples = fetch_row(
        db,
        "SELECT count(*), list(item_id ORDER BY item_id)[:3]"
        " FROM (SELECT item_id FROM raw_items GROUP BY item_id HAVING count(*) > 1)",
    )
    if not repeated:
        return
    facts = (
        f"{listing} lists {plural(repeated, 'item')} more than once (such as {quote_all(examples)})"
    )
    aggregate = DUPLICATE_ITEMS.find(choice)
    if aggregate is None:
        raise UserError(
            f"{facts}; keep one row for each, or give --duplicate-items first or"
            " --duplicate-items last"
        )
    db.execute(
        "DELETE FROM raw_items WHERE rowid NOT IN"
        f" (SELECT {aggregate}(rowid) FROM raw_items GROUP BY item_id)"
    )
    yield f"{facts}; the {choice} row of each is used"


def drop_duplicate_interactions(
    db: duckdb.DuckDBPyConnection, timestamps: bool, source: Path
) -> str:
    """Keep the first row of equal interactions in ``core``; return a message for the user.

    Args:
        db: A connection with the table ``core``.
        timestamps: Whether the interactions have times.
        source: The file of interactions, for messages.

    Raises:
        UserError: The interactions have no times, so a repeated pair may be a second visit.
    """
    if not timestamps:
        raise UserError(
            f"--duplicate-interactions drop compares user, item and time, but {source} has no"
            " times; leave the option out, or remove the rows from the file"
        )
    (before,) = fetch_row(db, "SELECT count(*) FROM core")
    db.execute(
        "CREATE OR REPLACE TABLE core AS SELECT u, i, timestamp, min(ordinal) AS ordinal FROM core"
        " GROUP BY u, i, timestamp"
    )
    (after,) = fetch_row(db, "SELECT count(*) FROM core")
    return (
        f"{plural(before - after, 'interaction')} equal to another in user, item and time; dropped"
    )


def count_copies(db: duckdb.DuckDBPyConnection, dates: TimeSplit | None) -> tuple[int, int]:
    """Return the number of copies in ``ordered``, and of copies among the held-out targets.

    A held-out target that is a copy is a row of its own input: a model that repeats the last items
    ranks it first.
    """
    # Only users with a tie can have copies.
    tied = (
        "(SELECT u AS user, i, timestamp, position FROM ordered"
        " SEMI JOIN (SELECT DISTINCT u FROM ordered WHERE tie) USING (u))"
    )
    copies, targets = fetch_row(
        db,
        "SELECT count(*), count(*) FILTER (split IN ('validation', 'test')) FROM"
        f" (SELECT split FROM ({split_sql(tied, dates)}) QUALIFY row_number() OVER"
        " (PARTITION BY user, i, timestamp ORDER BY position) > 1)",
    )
    return copies, targets
