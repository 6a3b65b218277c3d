"""Checks and row selection for compressed sparse rows (CSR)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


def check_rows(name: str, items: Ints, offsets: Ints) -> None:
    """Check that items and offsets are well-formed compressed rows.

    Args:
        name: Name of the rows in messages.
        items: (nnz,) item of each entry.
        offsets: (U + 1,) row u owns the entries offsets[u] to offsets[u + 1].

    Raises:
        ValueError: An array is not one-dimensional int64, or the offsets do not run from 0 to nnz
            in ascending order.
    """
    for part, values in (("items", items), ("offsets", offsets)):
        if not isinstance(values, np.ndarray) or values.dtype != np.int64 or values.ndim != 1:
            raise ValueError(f"{name} {part} must be a one-dimensional int64 numpy array")
    if len(offsets) == 0 or offsets[0] != 0 or offsets[-1] != len(items):
        raise ValueError(f"{name} offsets must run from 0 to {len(items)}, the number of entries")
    if (offsets[1:] < offsets[:-1]).any():
        raise ValueError(f"{name} offsets must not decrease")


def check_shape(name: str, rows: int, items: Ints, users: int, item_count: int) -> None:
    """Check that rows fit a matrix of users x items.

    Args:
        name: Name of the rows in messages.
        rows: Number of rows.
        items: (nnz,) item of each entry.
        users: Expected number of rows.
        item_count: Number of items; every entry must be below it.

    Raises:
        ValueError: The number of rows differs, or an item is outside 0..item_count-1.
    """
    if rows != users:
        raise ValueError(f"{name} covers {rows} users but there are {users}")
    if len(items) and not 0 <= items.min() <= items.max() < item_count:
        low, high = items.min(), items.max()
        raise ValueError(f"{name} holds items {low}..{high}, outside 0..{item_count - 1}")


def take_rows(offsets: Ints, users: Ints) -> tuple[Ints, Ints]:
    """Select rows in a given order.

    Args:
        offsets: (U + 1,) offsets of all rows.
        users: (R,) rows to select; a row may be selected more than once.

    Returns:
        The index of each selected entry among all entries, and (R + 1,) offsets of the selection.
    """
    starts, lengths = offsets[users], np.diff(offsets)[users]
    new_offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    position_in_row = np.arange(new_offsets[-1]) - np.repeat(new_offsets[:-1], lengths)
    return np.repeat(starts, lengths) + position_in_row, new_offsets
