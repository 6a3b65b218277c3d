"""Conversion between matrices and the columns of a part, without a Python object for each number.

Shape suffixes in descriptions: N items of the dataset, R rows, K tokens of all items, T tokens of
one item, D width.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from features.errors import UserError
from features.provenance import REMOVE_FILE
from features.schema import feature_schema


def embedding_array(vectors: npt.NDArray[Any]) -> pa.FixedSizeListArray:
    """Return the embedding column of (R, D) vectors."""
    rows, dim = vectors.shape
    kind = feature_schema(dim, str(vectors.dtype)).field("embedding").type
    flat = pa.array(np.ascontiguousarray(vectors).reshape(rows * dim))
    return pa.FixedSizeListArray.from_arrays(flat, type=kind)


def token_array(tokens: Sequence[npt.NDArray[Any]]) -> pa.ListArray:
    """Return the embedding column of one (T, D) matrix for each row; all share D and dtype."""
    kind = feature_schema(1, str(tokens[0].dtype), "tokens").field("embedding").type
    ends = np.cumsum([0, *(matrix.size for matrix in tokens)], dtype=np.int32)
    flat = pa.array(np.concatenate([matrix.reshape(-1) for matrix in tokens]))
    return pa.ListArray.from_arrays(pa.array(ends), flat, type=kind)


def vectors_of(rows: pa.Table, dim: int) -> npt.NDArray[Any]:
    """Return the embedding column of pooled rows as (R, D)."""
    column = rows.column("embedding").combine_chunks()
    flat = column.flatten().to_numpy(zero_copy_only=True)
    # A null row would vanish in flatten and shift all that follow.
    assert column.null_count == 0
    assert len(flat) == len(rows) * dim
    vectors: npt.NDArray[Any] = flat.reshape(-1, dim)
    return vectors


def items_of(rows: pa.Table, n_items: int, path: Path) -> npt.NDArray[np.int32]:
    """Return the column ``item``, (R,).

    Raises:
        UserError: An item is outside 0..N-1.
    """
    item: npt.NDArray[np.int32] = rows.column("item").to_numpy()
    if not ((item >= 0) & (item < n_items)).all():
        raise UserError(f"{path} has an item that is not in 0..{n_items - 1}; {REMOVE_FILE}")
    return item


def copy_tokens(
    rows: pa.Table, offsets: npt.NDArray[np.int64], values: npt.NDArray[Any], part: Path
) -> None:
    """Copy the tokens of some rows into the matrix of all tokens.

    Args:
        rows: Rows of the part.
        offsets: (N + 1,) item i owns ``values[offsets[i]:offsets[i + 1]]``.
        values: (K, D) matrix that is written to.
        part: Path for messages.

    Raises:
        UserError: A row has more or fewer tokens than its item owns.
    """
    column = rows.column("embedding").combine_chunks()
    flat = column.flatten().to_numpy(zero_copy_only=True).reshape(-1, values.shape[1])
    ends = column.offsets.to_numpy().astype(np.int64) // values.shape[1]
    ends -= ends[0]
    items = rows.column("item").to_numpy()
    starts = offsets[items]
    if not (offsets[items + 1] - starts == np.diff(ends)).all():
        raise UserError(f"{part} has rows whose number of tokens is not n_tokens; {REMOVE_FILE}")
    for start, begin, end in zip(starts, ends[:-1], ends[1:], strict=True):
        values[start : start + end - begin] = flat[begin:end]


def positions(ids: pa.ChunkedArray, item_ids: pa.ChunkedArray) -> npt.NDArray[np.int32]:
    """Return the index of each id in ``item_ids``, -1 for an id that is not there."""
    indices = pc.index_in(ids, value_set=item_ids.combine_chunks())
    return np.asarray(pc.fill_null(indices, -1).to_numpy(), dtype=np.int32)
