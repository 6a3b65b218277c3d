"""What the in-batch operators share: blocks of scores, in bounded memory.

Legend: C columns (keys), D width, R rows of a block.
"""

import torch
from torch import Tensor

_BLOCK_BYTES = {"cpu": 8 * 2**20, "cuda": 512 * 2**20}  # scores of one block of rows
_FEWEST_ROWS = 128  # below this the matrix products lose more than a smaller buffer gives


class Scores:
    """Blocks of scores in buffers that are used again: fresh memory costs more than the sums."""

    def __init__(
        self, key_CD: Tensor, offset_C: Tensor | None, wide: torch.dtype, rows: int
    ) -> None:
        self.key_CD = key_CD
        self._offset_C = offset_C
        self._wide = wide
        C, kind = len(key_CD), key_CD.device.type
        bytes_ = _BLOCK_BYTES.get(kind, _BLOCK_BYTES["cpu"])
        self.size = max(1, min(rows, max(_FEWEST_ROWS, bytes_ // (wide.itemsize * max(1, C)))))
        self._buffers = [key_CD.new_empty((0, C), dtype=wide) for _ in range(2)]

    def block(self, query_RD: Tensor) -> Tensor:
        """(R, C) scores, in a buffer that the next call overwrites."""
        score_RC = self._take(0, len(query_RD))
        if self.key_CD.dtype != self._wide:
            score_RC.copy_(query_RD.to(self.key_CD.dtype) @ self.key_CD.T)
        else:
            torch.mm(query_RD, self.key_CD.T, out=score_RC)
        if self._offset_C is not None:
            score_RC += self._offset_C
        return score_RC

    def spare(self, rows: int) -> Tensor:
        """(R, C), another buffer."""
        return self._take(1, rows)

    def _take(self, which: int, rows: int) -> Tensor:
        if len(self._buffers[which]) < rows:
            held = self._buffers[which]
            self._buffers[which] = held.new_empty((self.size, held.shape[1]))
        return self._buffers[which][:rows]


def top(score_RC: Tensor, dim: int) -> Tensor:
    """The largest along ``dim``, finite where there is nothing but -inf, which stays -inf."""
    return score_RC.amax(dim, keepdim=True).clamp_min_(torch.finfo(score_RC.dtype).min)


def add_product(total_CD: Tensor, a_CR: Tensor, b_RD: Tensor, narrow: torch.dtype) -> None:
    """Add a product of matrices to ``total_CD``, in its dtype; the factors are ``narrow``."""
    if narrow == total_CD.dtype:
        total_CD.addmm_(a_CR, b_RD)
    else:
        total_CD += a_CR @ b_RD.to(narrow)


def product_dtype(x: Tensor) -> torch.dtype:
    """In what the matrix products of ``x`` are: its own dtype, or autocast's."""
    kind = x.device.type
    if x.dtype == torch.float32 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def as_kind(grad: Tensor | None, like: Tensor) -> Tensor | None:
    """A gradient in the dtype of what it is of."""
    return None if grad is None else grad.to(like.dtype)


def times(saved: tuple[Tensor | None, ...], grad: Tensor) -> list[Tensor | None]:
    """The gradients that the forward pass has formed, times that of the loss."""
    return [None if held is None else held * grad for held in saved]
