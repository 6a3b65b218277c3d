"""Read the parts of a feature table into one matrix, without a Python object for each row.

Shape suffixes in descriptions: N items of the dataset, K tokens of all items, D width.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from features.arrow_columns import copy_tokens, items_of, vectors_of
from features.atomic_files import atomic_write, open_table, read_errors
from features.checksums import EMPTY_CHECKSUM, ChangedBytesError, seal, verify
from features.errors import UserError
from features.memory import check_memory
from features.provenance import REMOVE_FILE, Provenance


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureMatrix:
    """The vectors of one table, aligned with the dataset's items."""

    vectors: npt.NDArray[Any]
    """(N, D) C-contiguous, float16 or float32 as stored; absent items are zero."""
    present: npt.NDArray[np.bool_]
    """(N,) which items have a vector."""
    provenance: Provenance


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenMatrix:
    """The tokens of one table, aligned with the dataset's items, mapped from a file."""

    values: npt.NDArray[Any]
    """(K, D) memory-mapped, float16 or float32 as stored."""
    offsets: npt.NDArray[np.int64]
    """(N + 1,) item i owns ``values[offsets[i]:offsets[i + 1]]``; absent items own nothing."""
    provenance: Provenance


def read_vectors(
    parts: Sequence[Path],
    n_items: int,
    provenance: Provenance,
    place_N: npt.NDArray[np.int64] | None = None,
) -> FeatureMatrix:
    """Read the vectors of a pooled table, part by part.

    Args:
        parts: Parts of the table.
        n_items: N.
        provenance: Provenance that the parts share.
        place_N: (N,) the item that gets the vector of each item; ``None``: the item itself.

    Raises:
        UserError: A part cannot be read, or has an item outside 0..N-1.
        OutOfMemoryError: The limits of memory leave no room for the vectors.
    """
    needed = n_items * provenance.dim * np.dtype(provenance.dtype).itemsize
    check_memory(f"reading {parts[0].parent if parts else 'a feature table'}", needed)
    vectors = np.zeros((n_items, provenance.dim), dtype=provenance.dtype)
    present = np.zeros(n_items, dtype=np.bool_)
    for part in parts:
        for rows in _row_groups(part):
            item = items_of(rows, n_items, part)
            vectors[_places(item, place_N)] = vectors_of(rows, provenance.dim)
            present[item] = True
    return FeatureMatrix(vectors=vectors, present=present, provenance=provenance)


def _places(item: npt.NDArray[Any], place_N: npt.NDArray[np.int64] | None) -> npt.NDArray[Any]:
    return item if place_N is None else place_N[item]


def map_vectors(
    path: Path,
    parts: Sequence[Path],
    n_items: int,
    provenance: Provenance,
    place_N: npt.NDArray[np.int64] | None = None,
) -> npt.NDArray[Any]:
    """Map the vectors of a pooled table into memory: (N, D); absent items are zero.

    Args:
        path: The mapped file, as for :func:`map_tokens`.
        parts: Parts of the table.
        n_items: N.
        provenance: Provenance that the parts share.
        place_N: As for :func:`read_vectors`.

    Raises:
        UserError: A part or the file cannot be read, or has an item outside 0..N-1.
        OSError: The disk is full.
    """

    def fill(rows: pa.Table, values: npt.NDArray[Any], part: Path) -> None:
        item = items_of(rows, n_items, part)
        values[_places(item, place_N)] = vectors_of(rows, provenance.dim)

    return _map(path, parts, (n_items, provenance.dim), provenance, fill)


def map_tokens(
    path: Path, parts: Sequence[Path], offsets: npt.NDArray[np.int64], provenance: Provenance
) -> TokenMatrix:
    """Map the tokens of a table into memory; write the mapped file if it is missing or damaged.

    One part at a time is copied into the file, so that memory does not grow with the table.

    Args:
        path: The file ``<level>-<hash>.npy`` of the table. Files of the level with another hash are
            removed when it is written.
        parts: Parts of the table.
        offsets: (N + 1,) offsets of the items' tokens.
        provenance: Provenance that the parts share.

    Raises:
        UserError: A part or the file cannot be read, or a row has another number of tokens.
        OSError: The disk is full.
    """

    def fill(rows: pa.Table, values: npt.NDArray[Any], part: Path) -> None:
        copy_tokens(rows, offsets, values, part)

    values = _map(path, parts, (int(offsets[-1]), provenance.dim), provenance, fill)
    return TokenMatrix(values=values, offsets=offsets, provenance=provenance)


def _map(
    path: Path,
    parts: Sequence[Path],
    shape: tuple[int, int],
    provenance: Provenance,
    fill: Callable[[pa.Table, npt.NDArray[Any], Path], None],
) -> npt.NDArray[Any]:
    """Return the matrix of a mapped file; write the file first if it is missing or damaged.

    Args:
        path: The file.
        parts: Parts of the table.
        shape: Shape of the matrix.
        provenance: Provenance that the parts share.
        fill: Function that writes the rows of a part into the matrix.
    """
    if not _is_intact(path):
        with atomic_write(path) as temporary:
            values = np.lib.format.open_memmap(temporary, "w+", provenance.dtype, shape)
            # A full disk is an error now. Without this call it would be a signal (SIGBUS) later.
            with temporary.open("rb+") as stream:
                os.posix_fallocate(stream.fileno(), 0, temporary.stat().st_size)
            for part in parts:
                for rows in _row_groups(part):
                    fill(rows, values, part)
            values.flush()
            del values
            with temporary.open("ab") as stream:  # NumPy reads nothing after the values
                stream.write((EMPTY_CHECKSUM + path.name).encode())
            seal(temporary)
        level = path.name.rpartition("-")[0]
        for older in path.parent.glob(f"{level}-*.npy"):
            if older != path:
                older.unlink()
    with read_errors(path, "remove it; it is made again"):
        mapped: npt.NDArray[Any] = np.load(path, mmap_mode="r")
        if mapped.shape != shape or mapped.dtype != provenance.dtype:
            raise UserError(f"{path} is damaged; remove it; it is made again")
    return mapped


def _is_intact(path: Path) -> bool:
    """Return True if a file of tokens exists, with the bytes and the name that were written."""
    try:
        if not path.exists() or verify(path) is None:
            return False
    except ChangedBytesError:
        return False
    with path.open("rb") as stream:
        stream.seek(-len(path.name), os.SEEK_END)
        return stream.read() == path.name.encode()


def _row_groups(part: Path) -> Iterator[pa.Table]:
    """Yield the columns item and embedding of each row group."""
    with read_errors(part, REMOVE_FILE), open_table(part) as file:
        for group in range(file.num_row_groups):
            yield file.read_row_group(group, columns=["item", "embedding"])
