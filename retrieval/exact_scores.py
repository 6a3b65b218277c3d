"""Compare inner products exactly, by canonical float64 scores and an error bound for fp32.

Shape suffixes: U users, B users of one block, N items, D dimensions, P pairs of a user and an item.
"""

from __future__ import annotations

from copy import copy
from functools import cached_property
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from retrieval.blocks import for_each_block
from retrieval.sparse_scores import SparseScores

if TYPE_CHECKING:
    import torch

    Matrix: TypeAlias = torch.Tensor | npt.NDArray[np.float32]
    Indices: TypeAlias = torch.Tensor | npt.NDArray[np.int64]

FP32_ROUNDOFF = 2.0**-24
"""Unit roundoff of float32."""
FP64_ROUNDOFF = 2.0**-53
"""Unit roundoff of float64."""


def as_matrix(name: str, values: Matrix) -> torch.Tensor:
    """Return a (rows, D) fp32 matrix as a torch tensor on its device, without gradient or copy.

    Raises:
        ValueError: The matrix is not two-dimensional, not fp32, or D is 0.
    """
    import torch

    matrix = values.detach() if isinstance(values, torch.Tensor) else _from_numpy(values)
    if matrix.dtype != torch.float32:
        raise ValueError(f"{name} are {matrix.dtype}: convert them to float32")
    if matrix.ndim != 2 or matrix.shape[1] < 1:
        raise ValueError(f"{name} have shape {tuple(matrix.shape)}: expected (rows, dimensions)")
    return matrix


def as_indices(name: str, values: Indices) -> npt.NDArray[np.int64]:
    """Return one-dimensional integers as an int64 numpy array.

    Raises:
        ValueError: The values are not one-dimensional or not integers.
    """
    array = values if isinstance(values, np.ndarray) else values.detach().cpu().numpy()
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"{name} are {array.dtype} of shape {array.shape}: expected (n,) integers")
    return array.astype(np.int64, copy=False)


def _from_numpy(values: npt.NDArray[np.float32]) -> torch.Tensor:
    import torch

    array = np.ascontiguousarray(values)
    # torch warns about read-only memory, such as a memory-mapped matrix.
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def row_norms(name: str, matrix_RD: torch.Tensor) -> torch.Tensor:
    """Return the Euclidean length of each row, (rows,) float64.

    Raises:
        ValueError: A row holds NaN or infinity.
    """
    import torch

    norms_R = torch.empty(len(matrix_RD), dtype=torch.float64, device=matrix_RD.device)

    def measure(rows: slice) -> None:
        norms_R[rows] = torch.linalg.vector_norm(matrix_RD[rows].double(), dim=1)

    for_each_block(measure, len(matrix_RD), _rows_at_once(matrix_RD), matrix_RD.device)
    # fp32 squared cannot overflow float64, so an infinite length comes from an infinite entry.
    bad_R = ~torch.isfinite(norms_R)
    if bad_R.any():
        raise ValueError(f"{name} row {int(bad_R.nonzero()[0])} holds NaN or infinity")
    return norms_R


def error_bound(
    dim: int, left: torch.Tensor, right: torch.Tensor | float, roundoff: float
) -> torch.Tensor:
    """Return a bound on the error of a computed inner product against its canonical score.

    Any order of summation, with or without fused multiply-add, errs by at most
    g * |left| * |right| with g = D * u / (1 - D * u) (Higham, Accuracy and Stability of Numerical
    Algorithms, 2nd ed., section 3.1). The second term covers the rounding of the canonical
    score and of a difference of two scores; the last term covers underflow.

    Args:
        dim: D.
        left: Lengths of the vectors on one side, float64.
        right: Lengths of the vectors on the other side.
        roundoff: Unit roundoff u of the format that the product was computed in.
    """
    terms = dim / (1 - dim * roundoff) + dim.bit_length() + 4
    return 1.001 * roundoff * terms * left * right + dim * 2.0**-124


def exact_scores(
    left_UD: torch.Tensor, right_ND: torch.Tensor, left_P: torch.Tensor, right_P: torch.Tensor
) -> torch.Tensor:
    """Return the canonical inner products of the pairs (left_P, right_P), (P,) float64.

    A product of two fp32 numbers is exact in float64. The products are summed by adding the second
    half of the vector to the first, again and again. This fixed order of elementwise additions
    gives the same bits on every device and for any number of pairs; a matrix product does not. The
    pairs are computed in chunks, so that memory does not grow with P x D.

    Args:
        left_UD: (U, D) fp32.
        right_ND: (N, D) fp32, on the same device.
        left_P: (P,) row of `left_UD` for each pair.
        right_P: (P,) row of `right_ND` for each pair.
    """
    import torch

    dim, chunk = left_UD.shape[1], _rows_at_once(left_UD)
    scores_P = torch.empty(len(left_P), dtype=torch.float64, device=left_UD.device)
    for start in range(0, len(left_P), chunk):
        part = slice(start, start + chunk)
        sums = left_UD.index_select(0, left_P[part]).double()
        sums.mul_(right_ND.index_select(0, right_P[part]))
        width = dim
        while width > 1:
            half = (width + 1) // 2
            sums[:, : width - half].add_(sums[:, half:width])
            width = half
        scores_P[part] = sums[:, 0]
    return scores_P


def _rows_at_once(matrix_RD: torch.Tensor) -> int:
    """Return the rows of one chunk, which fits a CPU's cache or keeps a GPU busy."""
    return max(1, (2**17 if matrix_RD.device.type == "cpu" else 2**25) // matrix_RD.shape[1])


class TargetScores:
    """The canonical score of each user's target, and comparisons of other items with it.

    The canonical score of a pair is the float64 inner product of `exact_scores` plus the pair's
    float64 correction, rounded once. `at_least` compares canonical scores. `margin` bounds the
    error of scores in a lower precision, so that only pairs within the margin need `at_least`.

    Args:
        queries: (U, D) fp32.
        items: (N, D) fp32, on the same device.
        targets: (U,) item of each user.
        correction: Scores that are added to the inner products; none if None.

    Raises:
        ValueError: Shapes, dtypes, devices, targets or items of the correction that do not fit,
            vectors with NaN or infinity, or scores beyond fp32.
    """

    def __init__(
        self,
        queries: Matrix,
        items: Matrix,
        targets: Indices,
        correction: SparseScores | None = None,
    ) -> None:
        import torch

        self.query_UD = as_matrix("queries", queries)
        self.item_ND = as_matrix("items", items)
        (users, dim), (count, item_dim) = self.query_UD.shape, self.item_ND.shape
        if dim != item_dim:
            raise ValueError(f"queries have {dim} dimensions but items have {item_dim}")
        if self.query_UD.device != self.item_ND.device:
            raise ValueError(
                f"queries are on {self.query_UD.device} but items on {self.item_ND.device}"
            )
        if count == 0:
            raise ValueError("items are empty: there is nothing to rank")
        target_U = as_indices("targets", targets)
        check_targets(target_U, users, count)
        if correction is not None:
            correction.check(users, count)
        self.device, self.dim = self.query_UD.device, dim
        self.target_U = torch.from_numpy(target_U.copy()).to(self.device)
        self.query_length_U = row_norms("queries", self.query_UD)
        self.item_length_N = row_norms("items", self.item_ND)
        check_overflow(self.query_length_U, self.item_length_N, correction)
        self.score_U = torch.empty(users, dtype=torch.float64, device=self.device)
        self.target_value_U: torch.Tensor | None = None
        """(U,) correction of the target, float64; None without a correction."""
        if correction is not None:
            self.target_value_U = torch.zeros_like(self.score_U)
        row_U = torch.arange(users, device=self.device)

        def score(part: slice) -> None:
            self.score_U[part] = exact_scores(
                self.query_UD, self.item_ND, row_U[part], self.target_U[part]
            )
            if correction is not None and self.target_value_U is not None:
                values = correction.values_at(part.start, target_U[part])
                self.target_value_U[part] = torch.from_numpy(values).to(self.device)
                self.score_U[part] += self.target_value_U[part]

        for_each_block(score, users, 512 if self.device.type == "cpu" else 2**20, self.device)

    def take(self, users: npt.NDArray[np.int64]) -> TargetScores:
        """Return the scores of these users, in this order, over the same items."""
        import torch

        part, row_U = copy(self), torch.from_numpy(users).to(self.device)
        part.query_UD, part.target_U = self.query_UD[row_U], self.target_U[row_U]
        part.query_length_U, part.score_U = self.query_length_U[row_U], self.score_U[row_U]
        if self.target_value_U is not None:
            part.target_value_U = self.target_value_U[row_U]
        return part

    def margin(self, users: slice, longest: torch.Tensor, roundoff: float) -> torch.Tensor:
        """Return a bound on the error of the difference of an item's and the target's score.

        If the absolute difference is larger than the bound, its sign is correct. The difference is
        an uncorrected item's score minus the target's canonical score, both in the format of
        `roundoff`.

        Args:
            users: The block of B users.
            longest: Euclidean length of the longest item vector.
            roundoff: Unit roundoff of the format that the scores are computed in.

        Returns:
            (B,) float64.
        """
        length_B = self.query_length_U[users]
        target_length_B = self.item_length_N[self.target_U[users]]
        item_error_B = error_bound(self.dim, length_B, longest, roundoff)
        # The target's score is canonical; its only error is one rounding to the format.
        margin_B = item_error_B + 8 * roundoff * length_B * target_length_B
        if self.target_value_U is not None:
            margin_B += 8 * roundoff * self.target_value_U[users].abs()
        return margin_B

    def at_least(
        self, user_P: torch.Tensor, item_P: torch.Tensor, value_P: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return True for each pair whose item scores at least as much as the user's target.

        Args:
            user_P: (P,) user of each pair.
            item_P: (P,) item of each pair.
            value_P: (P,) correction of each pair, float64; 0 if None.

        Returns:
            (P,) bool.
        """
        scores_P = exact_scores(self.query_UD, self.item_ND, user_P, item_P)
        if value_P is not None:
            scores_P += value_P
        return scores_P >= self.score_U[user_P]

    def equals_target(
        self, user_P: torch.Tensor, item_P: torch.Tensor, value_P: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return True for each pair whose item has the vector and the correction of the target.

        Such an item ties with the target for every query. The arguments are those of `at_least`.
        """
        same_P = self.vector_N[item_P] == self.vector_N[self.target_U[user_P]]
        if self.target_value_U is not None:
            same_P &= self.target_value_U[user_P] == (0.0 if value_P is None else value_P)
        return same_P

    @cached_property
    def vector_N(self) -> torch.Tensor:
        """Return the index of each item's vector among the distinct vectors, (N,)."""
        import torch

        vector_N: torch.Tensor = torch.unique(self.item_ND, dim=0, return_inverse=True)[1]
        return vector_N


def check_targets(target_U: npt.NDArray[np.int64], users: int, items: int) -> None:
    """Raise ValueError unless there is one target in 0..items-1 for each user."""
    if len(target_U) != users:
        raise ValueError(f"there are {len(target_U)} targets but {users} users")
    outside = np.flatnonzero((target_U < 0) | (target_U >= items))
    if len(outside):
        row = outside[0]
        raise ValueError(f"target {target_U[row]} of row {row} is outside 0..{items - 1}")


def check_overflow(
    query_length_U: torch.Tensor,
    item_length_N: torch.Tensor,
    correction: SparseScores | None = None,
) -> None:
    """Raise ValueError if a score, or a difference of two scores, can exceed the range of fp32."""
    largest = float(query_length_U.max()) * float(item_length_N.max()) if len(query_length_U) else 0
    if correction is not None and len(correction.values):
        largest += max(float(correction.values.max()), -float(correction.values.min()))
    if largest >= 2.0**126:
        raise ValueError(f"scores can reach {largest:.1e}, more than float32 holds: scale down")
