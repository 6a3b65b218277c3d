"""A prepared dataset as flat arrays: the users' sequences with offsets, and the splits.

Shape suffixes in descriptions: U users, N items, I interactions, E evaluated users.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from features.atomic_files import database, open_table, read_errors, read_table
from features.checksums import verify_files
from features.errors import DamagedError, UserError
from features.splits import (
    COLD_BELOW,
    MIN_EVALUATED,
    SPLITS,
    TimeSplit,
    split_sql,
    train_counts_sql,
)
from features.sql_text import parquet_sql
from features.warehouse import DatasetInfo, Warehouse

Ints = npt.NDArray[np.int64]
_TIME_UNITS = ((10**5, "D"), (10**10, "s"), (10**13, "ms"), (10**16, "us"))


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalSplit:
    """The evaluated users of one split, and the positions of their targets in the flat array.

    A user with several targets occurs several times; see :meth:`Dataset.cold_occurrences`.

    The input of user ``users[e]`` is ``items[starts[e]:targets[e]]``, its target
    ``items[targets[e]]``.
    """

    users: Ints
    """(E,) user indices, ascending."""
    starts: Ints
    """(E,) first flat position of the user's history."""
    targets: Ints
    """(E,) flat position of the held-out interaction."""

    def sample(self, count: int, seed: int) -> "EvalSplit":
        """Return a random sample of the users, ascending; all users if there are no more.

        Args:
            count: Number of users.
            seed: Equal seeds give equal samples.
        """
        if count >= len(self.users):
            return self
        rows = np.random.default_rng(seed).choice(len(self.users), count, replace=False)
        rows.sort()
        return self.take(rows)

    def take(self, rows: Ints | slice) -> "EvalSplit":
        """Return some of the users."""
        return EvalSplit(
            users=self.users[rows], starts=self.starts[rows], targets=self.targets[rows]
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Dataset:
    """All interactions of a prepared dataset, user by user, oldest first."""

    info: DatasetInfo
    items: npt.NDArray[np.int32]
    """(I,) item of each interaction."""
    offsets: Ints
    """(U + 1,) user u owns ``items[offsets[u]:offsets[u + 1]]``."""
    train_counts: Ints
    """(N,) training interactions of each item; the only counts that popularity may use."""
    splits: npt.NDArray[np.int8] | None = None
    """(I,) index in :data:`features.splits.SPLITS` of each interaction; ``None`` is leave-one-out,
    whose splits follow from ``offsets``."""
    times: Ints | None = None
    """(I,) time of each interaction in the unit of the raw files; ``None`` if they are not loaded
    or the raw files have none."""

    @property
    def time_unit(self) -> str | None:
        """The unit of ``times`` as numpy names it: D, s, ms, us or ns; ``None`` without times.

        The largest time decides: units of a date between 1973 and 2200 do not overlap.
        """
        if self.times is None:
            return None
        largest = int(np.abs(self.times).max(initial=0))
        return next((unit for limit, unit in _TIME_UNITS if largest < limit), "ns")

    @property
    def cold(self) -> npt.NDArray[np.bool_]:
        """(N,) items with fewer than 10 training interactions."""
        return self.train_counts < COLD_BELOW

    @property
    def hidden(self) -> npt.NDArray[np.bool_]:
        """(N,) items that are test targets only, see :attr:`DatasetInfo.hidden_items`."""
        n_items = len(self.train_counts)
        return np.arange(n_items) >= n_items - self.info.hidden_items

    def digest(self) -> str:
        """Return a hash of the sequences of all users, and of the splits if time decides them."""
        digest = hash_sequences(self.items, self.offsets)
        if self.splits is None:
            return digest
        return hashlib.sha256(digest.encode() + self.splits.tobytes()).hexdigest()[:16]

    def train_ends(self) -> Ints:
        """Return the flat position one past each user's last training interaction, (U,)."""
        if self.splits is not None:
            n_trained_I = np.concatenate([[0], np.cumsum(self.splits == SPLITS.index("train"))])
            n_trained_U: Ints = np.diff(n_trained_I[self.offsets])
            return self.offsets[:-1] + n_trained_U
        lengths = np.diff(self.offsets)
        return self.offsets[1:] - np.where(lengths >= MIN_EVALUATED, 2, 0)

    def train_positions(self, *, hold_out_cold: bool = False) -> Ints:
        """Return the flat positions of the training interactions, ascending: (T,).

        Args:
            hold_out_cold: Leave out the interactions with cold items.
        """
        ends_I = np.repeat(self.train_ends(), np.diff(self.offsets))
        is_train_I = np.arange(len(self.items)) < ends_I
        if hold_out_cold:
            is_train_I &= ~self.cold[self.items]
        return np.flatnonzero(is_train_I)

    def cold_occurrences(self) -> EvalSplit:
        """Return the occurrences of cold items at training positions, one row each.

        The input of a row is the user's sequence before the occurrence. An occurrence that begins a
        sequence has no input and is left out. Only a model that was trained with ``hold_out_cold``
        has not learned them.
        """
        starts_I = np.repeat(self.offsets[:-1], np.diff(self.offsets))
        positions = self.train_positions()
        is_cold = self.cold[self.items[positions]] & (positions > starts_I[positions])
        targets = positions[is_cold]
        users = np.searchsorted(self.offsets, targets, side="right") - 1
        return EvalSplit(users=users, starts=starts_I[targets], targets=targets)

    def eval_split(self, split: str) -> EvalSplit:
        """Return the evaluated users of ``validation`` or ``test``."""
        if self.splits is not None:
            targets = np.flatnonzero(self.splits == SPLITS.index(split))
            users = np.searchsorted(self.offsets, targets, side="right") - 1
            return EvalSplit(users=users, starts=self.offsets[users], targets=targets)
        back = {"validation": 2, "test": 1}[split]
        users = np.flatnonzero(np.diff(self.offsets) >= MIN_EVALUATED)
        return EvalSplit(
            users=users, starts=self.offsets[users], targets=self.offsets[users + 1] - back
        )


def load_dataset(warehouse: Warehouse, name: str, *, with_times: bool = False) -> Dataset:
    """Read a prepared dataset into flat arrays, without an object per row.

    Args:
        warehouse: Holds the dataset.
        name: Name of the dataset.
        with_times: If true, load the times of the interactions as well, if there are any.

    Raises:
        UserError: The dataset is not prepared, or its tables contradict each other.
    """
    info = warehouse.info(name)
    folder = warehouse.dataset_dir(name)
    interactions = parquet_sql(folder / "interactions")
    items = parquet_sql(folder / "items")
    has_times = with_times and info.timestamps
    columns = "user, item, timestamp" if has_times else "user, item"
    for table in ("interactions", "items"):
        verified_parts(warehouse, name, table)
    with _tables(folder, name), database() as db:
        flat = db.execute(
            f"SELECT {columns} FROM {interactions} ORDER BY user, position"
        ).fetchnumpy()
        counts = db.execute(
            f"SELECT train_count FROM ({train_counts_sql(interactions, items, info.dates)})"
            " ORDER BY item"
        ).fetchnumpy()
        splits = _read_splits(db, interactions, info.dates)
    lengths = np.bincount(flat["user"], minlength=info.users)
    item = np.ascontiguousarray(flat["item"], dtype=np.int32)
    counted = (len(item), len(lengths), len(counts["train_count"]))
    if counted != (info.interactions, info.users, info.items) or not lengths.all():
        active = np.count_nonzero(lengths)
        raise UserError(
            f"{folder}: the tables hold {len(item)} interactions of {active} users with"
            f" {counted[2]} items, but dataset.json has {info.interactions} of {info.users} with"
            f" {info.items}; run mmrec prepare again"
        )
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    # Each file holds a checksum of its own bytes, which a file of another preparation has as well.
    if info.sequences not in ("", hash_sequences(item, offsets)):
        raise DamagedError(
            f"{folder / 'interactions'}: the interactions are not those of this preparation;"
            f" run mmrec prepare --dataset {name} again"
        )
    return Dataset(
        info=info,
        items=item,
        offsets=offsets,
        train_counts=np.asarray(counts["train_count"], dtype=np.int64),
        splits=splits,
        times=np.asarray(flat["timestamp"], dtype=np.int64) if has_times else None,
    )


def _read_splits(
    db: duckdb.DuckDBPyConnection, interactions: str, dates: TimeSplit | None
) -> npt.NDArray[np.int8] | None:
    """Return the index in :data:`SPLITS` of each interaction: (I,). None is leave-one-out."""
    if dates is None:
        return None
    number = " ".join(f"WHEN '{name}' THEN {i}" for i, name in enumerate(SPLITS))
    splits: npt.NDArray[np.int8] = db.execute(
        f"SELECT (CASE split {number} END)::TINYINT AS split FROM"
        f" ({split_sql(interactions, dates)}) ORDER BY user, position"
    ).fetchnumpy()["split"]
    return np.ascontiguousarray(splits, dtype=np.int8)


def cold_counts(dataset: Dataset) -> tuple[int, int]:
    """Return two counts of cold sequences: those of mmrec, and those of PMMRec and MMSR.

    Returns:
        The held-out targets of validation and test that are cold; and all occurrences of a cold
        item after the first interaction of a user, each of which ends one sequence. Models have
        learned the occurrences at training positions, unless trained with ``hold_out_cold``.
    """
    is_cold_I = dataset.cold[dataset.items]
    held_out = sum(
        int(is_cold_I[dataset.eval_split(split).targets].sum()) for split in ("validation", "test")
    )
    return held_out, held_out + len(dataset.cold_occurrences().targets)


def hash_sequences(items: npt.NDArray[np.int32], offsets: Ints) -> str:
    """Return a hash of the sequences of all users.

    Args:
        items: (I,) item of each interaction, user by user, oldest first.
        offsets: (U + 1,) user u owns ``items[offsets[u]:offsets[u + 1]]``.
    """
    digest = hashlib.sha256(items.tobytes())
    digest.update(offsets.tobytes())
    return digest.hexdigest()[:16]


def load_items(warehouse: Warehouse, name: str, columns: list[str]) -> pa.Table:
    """Read columns of the items table, in the order of ``item``."""
    info = warehouse.info(name)
    folder = warehouse.dataset_dir(name)
    parts = verified_parts(warehouse, name, "items")
    with _tables(folder / "items", name):
        tables = [read_table(part, ["item", *columns]) for part in parts]
        table = pa.concat_tables(tables).sort_by("item").select(columns)
    if len(table) != info.items:
        raise UserError(
            f"{folder}: the tables hold {len(table)} items, but dataset.json has {info.items};"
            f" run mmrec prepare --dataset {name} again"
        )
    return table


def stream_items(
    warehouse: Warehouse, name: str, columns: Sequence[str], rows: int = 4096
) -> Iterator[pa.RecordBatch]:
    """Read columns of the items table in the order of ``item``, some rows at a time.

    Memory does not grow with the number of items if the parts are in order, as those of mmrec are.

    Raises:
        UserError: The dataset is not prepared, or its tables contradict each other.
    """
    info = warehouse.info(name)
    folder = warehouse.dataset_dir(name)
    paths = verified_parts(warehouse, name, "items")
    with _tables(folder / "items", name), ExitStack() as stack:
        parts = [stack.enter_context(open_table(path, buffer_size=1 << 20)) for path in paths]
        if _in_order(parts, info.items, rows):
            for part in parts:
                yield from part.iter_batches(rows, columns=list(columns))
            return
    yield from load_items(warehouse, name, list(columns)).to_batches(rows)


def _in_order(parts: Sequence[pq.ParquetFile], n_items: int, rows: int) -> bool:
    """Return whether the parts hold the items 0..n_items-1 in order."""
    start = 0
    for part in parts:
        for batch in part.iter_batches(rows, columns=["item"]):
            if not np.array_equal(batch["item"], np.arange(start, start + len(batch))):
                return False
            start += len(batch)
    return start == n_items


def load_user_ids(warehouse: Warehouse, name: str) -> pa.ChunkedArray:
    """Read the id of every user, in the order of ``user``."""
    paths = verified_parts(warehouse, name, "interactions")
    with _tables(warehouse.dataset_dir(name) / "interactions", name):
        parts = [_one_row_per_user(read_table(path, ["user", "user_id"])) for path in paths]
        return _one_row_per_user(pa.concat_tables(parts)).column("user_id")


def _one_row_per_user(table: pa.Table) -> pa.Table:
    """Return the first row of each user of the columns ``user`` and ``user_id``, by ``user``."""
    users = np.from_dlpack(table.column("user").combine_chunks())
    _, rows = np.unique(users, return_index=True)
    # Other conversions import pandas where it is installed, which takes 0.3 CPU s.
    buffer = pa.py_buffer(rows.astype(np.int64))
    return table.take(pa.Array.from_buffers(pa.int64(), len(rows), [None, buffer]))


def verified_parts(warehouse: Warehouse, name: str, table: str) -> list[Path]:
    """Return the files of a dataset's table, in order, after a check of their bytes.

    Args:
        warehouse: Holds the dataset.
        name: Name of the dataset.
        table: ``items`` or ``interactions``.

    Raises:
        DamagedError: The bytes of a file have changed, or a file is of another preparation.
    """
    recorded = warehouse.info(name).checksums.get(table, {})
    folder = warehouse.dataset_dir(name) / table
    with _tables(folder, name):
        parts = sorted(folder.glob("*.parquet"))
        verify_files(parts, recorded)
    return parts


def _tables(folder: Path, name: str) -> AbstractContextManager[None]:
    """Turn errors on reading a dataset's tables into one line."""
    return read_errors(folder, f"run mmrec prepare --dataset {name} again")
