"""The items that lists may contain, and the share of new items in each list.

Legend: N items, B lists, K items of a list, R items of the lists of rare items.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from features.errors import UserError
from features.splits import COLD_BELOW
from retrieval.indexes import TopItems

_EXAMPLES = 3  # ids that a message names


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """The items that can be recommended.

    Raises:
        UserError: A share is outside 0..1, or a number of interactions is below 1.
    """

    only: Path | None = None
    """File of the ids of the items that are allowed; ``None`` allows all."""
    exclude: Path | None = None
    """File of the ids of items that are not allowed."""
    new_share: float = 0.0
    """Least share of each list that is new: items with fewer than ``new_below`` interactions."""
    new_below: int = COLD_BELOW
    """Training interactions from which on an item is not new."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        if not 0 <= self.new_share <= 1:
            raise UserError(f"--new-share {self.new_share} is no share; give 0 to 1")
        if self.new_below < 1:
            raise UserError(f"--new-below {self.new_below} is too small; give at least 1")

    def allowed(self, ids: pa.Array) -> npt.NDArray[np.bool_]:
        """Return which items the files allow: (N,) bool.

        Args:
            ids: (N,) ids of the catalogue.

        Raises:
            UserError: A file cannot be read, or names no item of the catalogue.
        """
        is_allowed_N = np.ones(len(ids), dtype=bool)
        if self.only is not None:
            is_allowed_N &= _contained(ids, self.only, "--only")
        if self.exclude is not None:
            is_allowed_N &= ~_contained(ids, self.exclude, "--exclude")
        return is_allowed_N

    def least_new(self, k: int) -> int:
        """Return the least number of new items in a list of ``k`` items."""
        return math.ceil(self.new_share * k - 1e-9)


def _contained(ids: pa.Array, path: Path, option: str) -> npt.NDArray[np.bool_]:
    """Return which ids a file names, one in a line."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UserError(
            f"{option} {path}: {reason}; give a text file with an item id in each line"
        ) from None
    named = pa.array(dict.fromkeys(line.strip() for line in lines if line.strip()), pa.string())
    is_named_N = pc.is_in(ids, value_set=named).to_numpy(zero_copy_only=False)
    if not is_named_N.any():
        examples = ", ".join(ids.slice(0, _EXAMPLES).to_pylist())
        raise UserError(
            f"{option} {path} names no item of the catalogue; give an id in each line, such as"
            f" {examples}"
        )
    return np.asarray(is_named_N, dtype=bool)


def with_new_items(top: TopItems, rare: TopItems, is_rare_N: npt.NDArray[np.bool_]) -> TopItems:
    """Return lists in which the best rare items replace the last items that are not rare.

    Args:
        top: (B, K) scores and items, the best of all items.
        rare: (B, R) scores and items, the best rare items; a list gets at least these.
        is_rare_N: Whether each item is rare.

    Examples:
        >>> top = np.array([[3.0, 2.0, 1.0]], np.float32), np.array([[5, 4, 3]])
        >>> rare = np.array([[0.5]], np.float32), np.array([[0]])
        >>> with_new_items(top, rare, np.array([True] + 5 * [False]))[1].tolist()
        [[5, 4, 0]]
    """
    scores_BK, items_BK = top[0].copy(), top[1].copy()
    for row, (row_scores, row_items) in enumerate(zip(*rare, strict=True)):
        wanted = row_items >= 0
        absent = wanted & ~np.isin(row_items, items_BK[row])
        is_common_K = (items_BK[row] >= 0) & ~is_rare_N[items_BK[row]]
        free = np.flatnonzero(items_BK[row] < 0)
        # A list with enough rare items holds the best of them already.
        places = np.concatenate([free, np.flatnonzero(is_common_K)[::-1]])[: int(absent.sum())]
        chosen = np.flatnonzero(absent)[: len(places)]
        items_BK[row, places], scores_BK[row, places] = row_items[chosen], row_scores[chosen]
        order = np.argsort(-scores_BK[row], kind="stable")
        items_BK[row], scores_BK[row] = items_BK[row, order], scores_BK[row, order]
    return scores_BK, items_BK
