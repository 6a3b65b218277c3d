"""The catalogue that a run has learned: the ids of its items and the names of its attributes.

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

from features.atomic_files import read_errors, read_table, write_table
from features.dataset import Ints, load_items
from features.errors import UserError
from features.warehouse import Warehouse

NAME = "items.parquet"
"""Name of the file of item ids in a run's folder."""
ATTRIBUTES = "attributes.parquet"
"""Name of the file of attributes, in the folder of a run that reads attributes."""


def write_catalogue(folder: Path, warehouse: Warehouse, datasets: Sequence[str]) -> pa.Array:
    """Write the item ids of a run's datasets into its folder, in the order of the items.

    Returns:
        (N,) the ids.
    """
    table = pa.concat_tables([load_items(warehouse, name, ["item_id"]) for name in datasets])
    write_table(folder / NAME, table, compression="zstd")
    return table.column("item_id").combine_chunks()


def write_attributes(folder: Path, names: Sequence[str]) -> None:
    """Write the names of the attributes that a run learns, in the order of its vectors."""
    table = pa.table({"name": pa.array(names, pa.string())})
    write_table(folder / ATTRIBUTES, table, compression="zstd")


def read_attributes(folder: Path) -> list[str]:
    """Return the names of the attributes that a run has learned.

    Raises:
        UserError: A version of mmrec that stored no attributes wrote the run, or the file is
            damaged.
    """
    path = folder / ATTRIBUTES
    if not path.exists():
        raise UserError(
            f"run {folder.name!r} has no {ATTRIBUTES}, so its vectors of attributes cannot be"
            " matched with those of another preparation; train again, or prepare the dataset as it"
            " was"
        )
    with read_errors(path, "train again"):
        names: list[str] = read_table(path, ["name"]).column("name").to_pylist()
    return names


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
    with read_errors(path, "train again"):
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

    def lines(self, is_listed_U: npt.NDArray[np.bool_], model: str | None) -> list[str]:
        """Describe the later catalogue for people.

        Args:
            is_listed_U: The items that can be recommended.
            model: Name of a model that encodes no new items; ``None`` for one that does.
        """
        is_new_U = self.is_current_U & ~self.is_learned_U
        lines = [
            f"catalogue: {len(self.position_M):,} items, {int(is_new_U.sum()):,} of them new since"
            " training"
        ]
        if left_out := int((is_new_U & ~is_listed_U).sum()):
            reason = f"{model} learns a vector for each item in training"
            if model is None:
                reason = "they have no features"
            lines.append(f"left out: {left_out:,} new items, because {reason}")
        if gone := int((~self.is_current_U).sum()):
            lines.append(f"not recommended: {gone:,} items that left the catalogue")
        return lines

    def rows_of_later(self) -> pa.Array:
        """Return the row in the later preparation of each item: (U,); null if it has none."""
        row_U = np.full(len(self.ids), -1, np.int64)
        row_U[self.position_M] = np.arange(len(self.position_M))
        return pa.array(row_U, mask=row_U < 0)
