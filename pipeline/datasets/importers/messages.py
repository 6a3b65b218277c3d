"""Words of messages about raw files: counts, quoted examples, numbers of rows."""

from collections.abc import Sequence


def plural(count: int, noun: str) -> str:
    """Return the count with its noun: ``1 item``, ``2,000 items``."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def quote_all(values: list[str]) -> str:
    """Return the values in quotes, separated by commas, for a message."""
    return ", ".join(repr(value) for value in values)


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


def name_others(count: int, rows: Sequence[int], noun: str = "row") -> str:
    """Return `` (as in 4 rows (such as 2, 5, 6))`` for a message about the first; one row: nothing.

    Args:
        count: Number of the rows with one fault.
        rows: The first of them, counted from 0.
        noun: The word for a row.
    """
    return f" (as in {name_rows(count, rows, noun)})" if count > 1 else ""
