"""The catalogue that a run has learned: the ids of its items, in the order of its tables.

A later preparation numbers items anew, so weights with a row for each item meet the items of a
later preparation by these ids.

Legend: N items that the run has learned, M items of a later preparation, U items of both.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from features.atomic_files import read_table, write_table
from features.dataset import Ints, load_items
from features.errors import UserError
from features.warehouse import Warehouse

NAME = "items.parquet"
"""Name of the file in a run's folder."""


def write_catalogue(folder: Path, warehouse: Warehouse, datasets: Sequence[str]) -> None:
    """Write the item ids of a run's datasets into its folder, in the order of the items."""
    tables = [load_items(warehouse, name, ["item_id"]) for name in datasets]
    write_table(folder / NAME, pa.concat_tables(tables), compression="zstd")


def read_catalogue(folder: Path) -> pa.Array:
    """Return the ids of the items that a run has learned: (N,) strings.

    Raises:
        UserError: A version of mmrec that stored no ids wrote the run, or the file is damaged.
    """
    path = folder / NAME
    if not path.exists():
        raise UserError(
            f"run {folder.name!r} has no {NAME}, so its weights cannot be matched with the items of"
            " another preparation; train again, or prepare the dataset as it was"
        )
    return read_table(path, ["item_id"]).column("item_id").combine_chunks()


@dataclass(frozen=True, kw_only=True, slots=True)
class JointCatalogue:
    """The items of a training and of a later preparation.

    Examples:
        >>> joint = JointCatalogue.of(pa.array(["a", "b"]), pa.array(["c", "b"]))
        >>> joint.ids.to_pylist(), joint.position_M.tolist(), joint.is_current_U.tolist()
        (['a', 'b', 'c'], [2, 1], [False, True, True])
    """

    ids: pa.Array
    """(U,) item ids, those of the training first."""
    learned: int
    """Number of items N of the training."""
    position_M: Ints
    """(M,) the row among the U items of each item of the later preparation."""

    @classmethod
    def of(cls, learned_ids: pa.Array, later_ids: pa.Array) -> "JointCatalogue":
        """Join two catalogues by their item ids."""
        position = pc.index_in(later_ids, value_set=learned_ids)
        new_ids = later_ids.filter(pc.is_null(position))
        new_M = pc.index_in(later_ids, value_set=new_ids).to_numpy(zero_copy_only=False)
        known_M = position.to_numpy(zero_copy_only=False)
        position_M = np.where(np.isnan(known_M), new_M + len(learned_ids), known_M)
        return cls(
            ids=pa.concat_arrays([learned_ids, new_ids]),
            learned=len(learned_ids),
            position_M=position_M.astype(np.int64),
        )

    @property
    def is_current_U(self) -> npt.NDArray[np.bool_]:
        """(U,) true for the items of the later preparation."""
        is_current_U = np.zeros(len(self.ids), dtype=bool)
        is_current_U[self.position_M] = True
        return is_current_U

    @property
    def is_learned_U(self) -> npt.NDArray[np.bool_]:
        """(U,) true for the items of the training."""
        return np.arange(len(self.ids)) < self.learned

    def rows_of_later(self) -> pa.Array:
        """Return the row in the later preparation of each item: (U,); null if it has none."""
        row_U = np.full(len(self.ids), -1, np.int64)
        row_U[self.position_M] = np.arange(len(self.position_M))
        return pa.array(row_U, mask=row_U < 0)
