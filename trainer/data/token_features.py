"""Token tables on disk, gathered for the items of a batch.

Legend: N items, R tokens of all items, K items of a batch, T most tokens of these, D width.
"""

from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from features.dataset import Ints


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenFeatures:
    """The tokens of one modality: a memory-mapped matrix."""

    values: npt.NDArray[Any]
    """(R, D) float16 or float32, ordered by item."""
    offsets: Ints
    """(N + 1,) the tokens of row i are ``values[offsets[i]:offsets[i + 1]]``."""
    device: torch.device
    """Device of the gathered tokens."""
    row_N: Ints | None = None
    """(N,) the row of each item, -1 for an item without tokens; ``None``: item i has row i."""

    @property
    def width(self) -> int:
        """The width D."""
        return int(self.values.shape[1])

    @property
    def longest(self) -> int:
        """Most tokens of an item, at least 1."""
        return max(1, int(self._lengths_N.max(initial=0)))

    @property
    def present_N(self) -> Tensor:
        """(N,) bool, true where an item has at least one token."""
        return torch.from_numpy(self._lengths_N > 0).to(self.device)

    @property
    def _lengths_N(self) -> Ints:
        lengths_R = np.diff(self.offsets)
        if self.row_N is None:
            return lengths_R
        return np.where(self.row_N < 0, 0, lengths_R[self.row_N])

    def renumbered(self, position_N: Ints, n_items: int) -> Self:
        """Return the tokens of items with other numbers.

        Args:
            position_N: (N,) the new number of each item.
            n_items: Number of items; those that no item gets have no tokens.
        """
        row = np.full(n_items, -1, np.int64)
        row[position_N] = np.arange(len(position_N)) if self.row_N is None else self.row_N
        return replace(self, row_N=row)

    def gather(self, items_K: Tensor) -> tuple[Tensor, Tensor]:
        """Read the tokens of items.

        Args:
            items_K: (K,) int64, best without duplicates: each is read from disk or its cache.

        Returns:
            (K, T, D) float32, and (K, T) bool, true where a token exists; other rows are zero. T
            is at least 1.
        """
        items = items_K.cpu().numpy()
        rows = items if self.row_N is None else self.row_N[items]
        starts = self.offsets[rows]
        lengths = np.where(rows < 0, 0, self.offsets[rows + 1] - starts)
        columns = np.arange(max(1, int(lengths.max(initial=0))))
        mask = columns < lengths[:, None]
        if not mask.any():
            values = np.zeros((*mask.shape, self.width), dtype=self.values.dtype)
        else:  # padding reads row 0: one copy is faster than a second pass
            values = np.asarray(self.values)[np.where(mask, starts[:, None] + columns, 0)]
            values[~mask] = 0
        x_KTD = torch.from_numpy(values).to(self.device)
        return x_KTD.float(), torch.from_numpy(mask).to(self.device)
