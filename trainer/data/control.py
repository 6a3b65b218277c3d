"""Controls: a training whose features have lost their content, to tell content from luck.

The items that have a modality, and everything else of the training, stay as they are. A model of
features that is not better than its control has used nothing of what the features say of an item.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from features.errors import UserError
from features.matrices import FeatureMatrix
from features.permutation import table_generator

NONE, PERMUTE, RANDOM = "none", "permute", "random"
MEANINGS = {
    PERMUTE: "the rows of each feature table are permuted among the items that have one",
    RANDOM: "the rows of each feature table are Gaussian ones of the same mean and covariance",
}
"""Each control, and what it does to the features."""
_ITEMS_PER_CHUNK = 2**14  # that are in float64 together


@dataclass(frozen=True, kw_only=True, slots=True)
class Control:
    """The treatment of the rows of a run's feature tables."""

    kind: str = NONE
    """``none``, or a key of :data:`MEANINGS`."""
    seed: int = 0
    """The run's seed. Each table has random numbers of its own, from this seed and its label."""

    @property
    def permutation_seed(self) -> int | None:
        """Seed of the permutation of rows; ``None`` if they are not permuted."""
        return self.seed if self.kind == PERMUTE else None

    def check_tokens(self, label: str) -> None:
        """Raise a UserError if the rows of a table of tokens cannot be replaced."""
        if self.kind == RANDOM:
            raise UserError(
                f"control={RANDOM} replaces pooled vectors, and {label} holds tokens; give"
                f" control={PERMUTE}"
            )

    def replace_rows(self, matrix: FeatureMatrix, label: str) -> None:
        """Replace the rows of a pooled table in memory by Gaussian rows, if the control asks.

        Raises:
            UserError: The table is mapped from a file, because it is too large for the memory.
        """
        if self.kind != RANDOM:
            return
        if isinstance(matrix.vectors, np.memmap):
            raise UserError(
                f"control={RANDOM} replaces vectors in memory, and {label} takes more than a"
                f" quarter of the free memory; give control={PERMUTE}, or free memory"
            )
        fill_gaussian(matrix.vectors, matrix.present, table_generator(self.seed, label))


NO_CONTROL = Control()


def control_line(kind: str) -> str:
    """Return the sentence that marks a control wherever its figures are printed."""
    return f"control={kind}: {MEANINGS[kind]}; the run shows what the model reaches without content"


def marked(label: str, kind: str) -> str:
    """Return the label of a run with the mark of its control; the label alone without one."""
    return label if kind == NONE else f"{label} (control: {kind})"


def fill_gaussian(
    vectors_ND: npt.NDArray[np.floating],
    present_N: npt.NDArray[np.bool_],
    rng: np.random.Generator,
) -> None:
    """Overwrite the present rows by Gaussian rows of the same mean and covariance, in place.

    Args:
        vectors_ND: (N, D) rows in any precision.
        present_N: (N,) the rows that are read and written.
        rng: The random numbers.
    """
    rows_K = np.flatnonzero(present_N)
    if not len(rows_K):
        return
    chunks = [rows_K[i : i + _ITEMS_PER_CHUNK] for i in range(0, len(rows_K), _ITEMS_PER_CHUNK)]
    mean_D = sum(vectors_ND[chunk].sum(0, dtype=np.float64) for chunk in chunks) / len(rows_K)
    covariance_DD = np.zeros((vectors_ND.shape[1],) * 2)
    for chunk in chunks:
        centred = vectors_ND[chunk] - mean_D
        covariance_DD += centred.T @ centred
    variances_D, axes_DD = np.linalg.eigh(covariance_DD / len(rows_K))
    factor_DD = np.sqrt(variances_D.clip(0))[:, None] * axes_DD.T
    for chunk in chunks:
        noise = rng.standard_normal((len(chunk), len(mean_D)))
        vectors_ND[chunk] = mean_D + noise @ factor_DD
