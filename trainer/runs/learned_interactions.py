"""The interactions that a run has learned or chosen its epoch by, stored in the run's folder.

An evaluation on a later preparation leaves these interactions out of its targets. A pair of a user
and an item is stored as a hash of their ids, with the number of its interactions: the first ones of
the user's later history are those of the training. So a pair that occurs once more is a new target.

Legend: P pairs, T interactions, U users, N items.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from features.atomic_files import read_errors, read_table, write_table
from features.dataset import Ints, load_user_ids
from features.errors import UserError
from features.warehouse import Warehouse
from trainer.data.batches import TrainingData
from trainer.runs.spec import RunSpec
from trainer.tasks.registry import NEXT_ITEM

NAME = "learned_interactions.parquet"
"""Name of the file in a run's folder."""

_BITS = 48
"""Bits of a pair's hash. The differences of sorted hashes are stored: for 10 million pairs, this is
about 35 MB, and one target in 28 million is taken for one of them."""
_ODD = np.uint64(0x9E3779B97F4A7C15)

Hashes = npt.NDArray[np.uint64]


def hash_ids(ids: Iterable[str]) -> Hashes:
    """Return a hash of 64 bits of each id."""
    digests = b"".join(hashlib.blake2b(name.encode(), digest_size=8).digest() for name in ids)
    return np.frombuffer(digests, "<u8").astype(np.uint64)


def hash_pairs(users: Hashes, items: Hashes) -> Ints:
    """Return a hash of each pair of a user and an item: (T,) integers of 48 bits.

    Args:
        users: (T,) hashes of the ids of the users.
        items: (T,) hashes of the ids of the items.
    """
    return ((users + items * _ODD) >> np.uint64(64 - _BITS)).astype(np.int64)


@dataclass(frozen=True, kw_only=True, slots=True)
class LearnedInteractions:
    """The number of interactions of each pair of a user and an item that a run has read.

    Examples:
        A pair occurs twice in training, and once more as the validation target:

        >>> learned = LearnedInteractions.of(np.array([7, 7]), np.array([7]))
        >>> [array.tolist() for array in learned.counts(np.array([7, 8]))]
        [[2, 0], [3, 0]]
    """

    pairs: Ints
    """(P,) hashes, ascending."""
    trained: Ints
    """(P,) number of interactions that the weights were trained on."""
    read: Ints
    """(P,) number of these interactions and of the validation targets, which early stopping ranks
    to choose the epoch."""

    @classmethod
    def of(cls, trained: Ints, validation: Ints) -> "LearnedInteractions":
        """Count the hashes of the training interactions and of the validation targets."""
        pairs, number = np.unique(np.concatenate([trained, validation]), return_inverse=True)
        return cls(
            pairs=pairs,
            trained=np.bincount(number[: len(trained)], minlength=len(pairs)),
            read=np.bincount(number, minlength=len(pairs)),
        )

    @classmethod
    def none(cls) -> "LearnedInteractions":
        """Return no interactions."""
        return cls.of(np.zeros(0, np.int64), np.zeros(0, np.int64))

    def counts(self, pairs: Ints) -> tuple[Ints, Ints]:
        """Return ``trained`` and ``read`` of some pairs, 0 for pairs that the run has not read."""
        if not len(self.pairs):
            return np.zeros_like(pairs), np.zeros_like(pairs)
        rows = np.searchsorted(self.pairs, pairs).clip(max=len(self.pairs) - 1)
        is_known = self.pairs[rows] == pairs
        return self.trained[rows] * is_known, self.read[rows] * is_known

    def merged(self, other: "LearnedInteractions") -> "LearnedInteractions":
        """Return the interactions of two runs; those that both have read count once."""
        pairs = np.union1d(self.pairs, other.pairs)
        own, others = self.counts(pairs), other.counts(pairs)
        return LearnedInteractions(
            pairs=pairs,
            trained=np.maximum(own[0], others[0]),
            read=np.maximum(own[1], others[1]),
        )

    def write(self, folder: Path) -> None:
        """Write the interactions into a run's folder."""
        columns = {"pair": self.pairs, "trained": self.trained, "read": self.read}
        write_table(
            folder / NAME,
            pa.table(columns),
            compression="zstd",
            use_dictionary=["trained", "read"],
            column_encoding={"pair": "DELTA_BINARY_PACKED"},
        )


def read_learned(folder: Path) -> LearnedInteractions:
    """Read the interactions that a run has learned, with those of its initial weights.

    Raises:
        UserError: The run has no such file, or the file is damaged.
    """
    path = folder / NAME
    if not path.exists():
        raise UserError(
            f"run {folder.name!r} has no {NAME}: an earlier version of mmrec trained the run or its"
            " initial weights, so it is unknown which targets they have learned; train again"
        )
    with read_errors(path, "train again"):
        table = read_table(path, ["pair", "trained", "read"])
        pairs, trained, read = (column.to_numpy() for column in table.columns)
    return LearnedInteractions(pairs=pairs, trained=trained, read=read)


def write_learned(
    folder: Path, warehouse: Warehouse, spec: RunSpec, data: TrainingData, item_ids: pa.Array
) -> None:
    """Write the interactions that a run will learn, with those of its initial weights.

    Nothing is written if the run of the initial weights has stored none. The alignment of texts and
    images learns no interactions.

    Args:
        folder: Folder of the run.
        warehouse: Holds the datasets and the run of the initial weights.
        spec: The run.
        data: Data of the datasets.
        item_ids: (N,) ids of their items.
    """
    learned = LearnedInteractions.none()
    if spec.task == NEXT_ITEM:
        learned = _learned_by_training(warehouse, spec.datasets, data, item_ids)
    if spec.init is not None:
        source, _ = warehouse.choose_run(spec.init.run)
        if not (source / NAME).exists():
            return
        learned = learned.merged(read_learned(source))
    learned.write(folder)


def _learned_by_training(
    warehouse: Warehouse, datasets: Sequence[str], data: TrainingData, item_ids: pa.Array
) -> LearnedInteractions:
    """Return the interactions that a training on prepared datasets reads."""
    users_U = hash_ids(
        name for dataset in datasets for name in load_user_ids(warehouse, dataset).to_pylist()
    )
    items_N = hash_ids(item_ids.to_pylist())
    histories = data.train.histories
    trained = hash_pairs(np.repeat(users_U, np.diff(histories.offsets)), items_N[histories.items])
    split = data.dataset.eval_split("validation")
    validation = hash_pairs(users_U[split.users], items_N[data.dataset.items[split.targets]])
    return LearnedInteractions.of(trained, validation)
