"""Token tables on disk, gathered for the items of a batch.

Legend: N items, R tokens of all items, K items of a batch, T most tokens of these, D width.
"""

from dataclasses import dataclass
from typing import Any

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
    """(N + 1,) the tokens of item i are ``values[offsets[i]:offsets[i + 1]]``."""
    device: torch.device
    """Device of the gathered tokens."""

    @property
    def width(self) -> int:
        """The width D."""
        return int(self.values.shape[1])

    @property
    def longest(self) -> int:
        """Most tokens of an item, at least 1."""
        return max(1, int(np.diff(self.offsets).max(initial=0)))

    @property
    def present_N(self) -> Tensor:
        """(N,) bool, true where an item has at least one token."""
        return torch.from_numpy(np.diff(self.offsets) > 0).to(self.device)

    def gather(self, items_K: Tensor) -> tuple[Tensor, Tensor]:
        """Read the tokens of items.

        Args:
            items_K: (K,) int64, best without duplicates: each is read from disk or its cache.

        Returns:
            (K, T, D) float32, and (K, T) bool, true where a token exists; other rows are zero. T
            is at least 1.
        """
        items = items_K.cpu().numpy()
        starts, lengths = self.offsets[items], self.offsets[items + 1] - self.offsets[items]
        columns = np.arange(max(1, int(lengths.max(initial=0))))
        mask = columns < lengths[:, None]
        if not mask.any():
            values = np.zeros((*mask.shape, self.width), dtype=self.values.dtype)
        else:  # padding reads row 0: one copy is faster than a second pass
            values = np.asarray(self.values)[np.where(mask, starts[:, None] + columns, 0)]
            values[~mask] = 0
        x_KTD = torch.from_numpy(values).to(self.device)
        return x_KTD.float(), torch.from_numpy(mask).to(self.device)
