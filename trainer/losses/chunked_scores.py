"""Blocks of scores in bounded memory, and helpers that the in-batch losses share.

The losses compute in ``accumulate_dtype`` (float64 for float64 inputs, else float32), and their
matrix products in ``matmul_dtype`` (the dtype of the inputs, or that of autocast).

Legend: M rows (queries), C columns (keys), D width, R rows of a block.
"""

import torch
from torch import Tensor

_BLOCK_BYTES = {"cpu": 8 * 2**20, "cuda": 512 * 2**20}  # scores of one block of rows
_FEWEST_ROWS = 128  # with fewer rows, matrix products lose more than a smaller buffer gains


class ScoreBlocks:
    """Compute blocks of scores in buffers that are used again: new memory costs more than the sums.

    Args:
        key_CD: Keys, in the dtype of the matrix products.
        offset_C: Added to the scores of a column; ``None``: nothing is added.
        dtype: Dtype of the scores.
        rows: Number of rows M of the whole matrix.
    """

    def __init__(
        self, key_CD: Tensor, offset_C: Tensor | None, dtype: torch.dtype, rows: int
    ) -> None:
        self.key_CD = key_CD
        self._offset_C = offset_C
        self._dtype = dtype
        C, device = len(key_CD), key_CD.device.type
        block_bytes = _BLOCK_BYTES.get(device, _BLOCK_BYTES["cpu"])
        fitting_rows = block_bytes // (dtype.itemsize * max(1, C))
        self.size = max(1, min(rows, max(_FEWEST_ROWS, fitting_rows)))
        """Rows of a block; the last block can have fewer."""
        self._rows = rows
        self._buffers = [key_CD.new_empty((0, C), dtype=dtype) for _ in range(2)]

    def slices(self) -> list[slice]:
        """Return the rows of each block."""
        starts = range(0, self._rows, self.size)
        return [slice(start, min(self._rows, start + self.size)) for start in starts]

    def scores(self, query_RD: Tensor) -> Tensor:
        """Return (R, C) inner products plus offsets, in a buffer that the next call overwrites."""
        score_RC = self._buffer(0, len(query_RD))
        if self.key_CD.dtype != self._dtype:
            score_RC.copy_(query_RD.to(self.key_CD.dtype) @ self.key_CD.T)
        else:
            torch.mm(query_RD, self.key_CD.T, out=score_RC)
        if self._offset_C is not None:
            score_RC += self._offset_C
        return score_RC

    def scratch(self, rows: int) -> Tensor:
        """Return an (R, C) buffer for intermediate results."""
        return self._buffer(1, rows)

    def _buffer(self, number: int, rows: int) -> Tensor:
        if len(self._buffers[number]) < rows:
            buffer_RC = self._buffers[number]
            self._buffers[number] = buffer_RC.new_empty((self.size, buffer_RC.shape[1]))
        return self._buffers[number][:rows]


def finite_max(score_RC: Tensor, dim: int) -> Tensor:
    """Return the maximum along ``dim``, or the lowest finite number where all scores are -inf."""
    return score_RC.amax(dim, keepdim=True).clamp_min_(torch.finfo(score_RC.dtype).min)


def add_matmul_(total_CD: Tensor, a_CR: Tensor, b_RD: Tensor, matmul_dtype: torch.dtype) -> None:
    """Add the product ``a_CR @ b_RD`` to ``total_CD``; ``a_CR`` is of ``matmul_dtype``."""
    if matmul_dtype == total_CD.dtype:
        total_CD.addmm_(a_CR, b_RD)
    else:
        total_CD += a_CR @ b_RD.to(matmul_dtype)


def accumulate_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of sums over ``x``: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def matmul_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of the matrix products of ``x``: that of autocast, else that of ``x``."""
    device = x.device.type
    if x.dtype == torch.float32 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def cast_gradient(grad: Tensor | None, like: Tensor) -> Tensor | None:
    """Return the gradient in the dtype of ``like``."""
    return None if grad is None else grad.to(like.dtype)


def scale_gradients(saved: tuple[Tensor | None, ...], grad: Tensor) -> list[Tensor | None]:
    """Return the gradients that the forward pass computed, times the gradient of the loss."""
    return [None if gradient is None else gradient * grad for gradient in saved]
