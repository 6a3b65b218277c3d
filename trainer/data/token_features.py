"""Token tables as models read them: on disk, gathered for the items of a batch.

Legend: N items, R tokens of all of them, K items asked for, T most tokens of these, D width.
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
    """The tokens of one modality: a memory-mapped matrix, of which a batch reads its own items."""

    values: npt.NDArray[Any]
    """(R, D) float16 or float32, item by item."""
    offsets: Ints
    """(N + 1,) item i owns ``values[offsets[i]:offsets[i + 1]]``."""
    device: torch.device
    """Where gathered tokens go."""

    @property
    def width(self) -> int:
        """D."""
        return int(self.values.shape[1])

    @property
    def longest(self) -> int:
        """Most tokens of an item, at least 1."""
        return max(1, int(np.diff(self.offsets).max(initial=0)))

    @property
    def present_N(self) -> Tensor:
        """(N,) bool, on the device: which items have at least one token."""
        return torch.from_numpy(np.diff(self.offsets) > 0).to(self.device)

    def gather(self, items_K: Tensor) -> tuple[Tensor, Tensor]:
        """Read the tokens of some items; T is the most that one of them has, at least 1.

        Args:
            items_K: (K,) int64, best each item once: every one is read from the disk's cache.

        Returns:
            (K, T, D) float32 and (K, T) bool, which of them exist; the others are zero.
        """
        items = items_K.cpu().numpy()
        starts, lengths = self.offsets[items], self.offsets[items + 1] - self.offsets[items]
        columns = np.arange(max(1, int(lengths.max(initial=0))))
        mask = columns < lengths[:, None]
        if not mask.any():
            found = np.zeros((*mask.shape, self.width), dtype=self.values.dtype)
        else:  # one copy: what is padding reads row 0, which is nearer than another pass
            found = np.asarray(self.values)[np.where(mask, starts[:, None] + columns, 0)]
            found[~mask] = 0
        x_KTD = torch.from_numpy(found).to(self.device)
        return x_KTD.float(), torch.from_numpy(mask).to(self.device)
