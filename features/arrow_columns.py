"""Vectors and tokens as columns of a part, and back, without a Python object for each number.

Legend: N items of the dataset, R rows, K tokens of all items, T of one, D width.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from features.errors import UserError
from features.provenance import WITHOUT
from features.schema import feature_schema


def embedding_array(vectors: npt.NDArray[Any]) -> pa.FixedSizeListArray:
    """Make the embedding column of (R, D) vectors without a Python object per number."""
    rows, dim = vectors.shape
    kind = feature_schema(dim, str(vectors.dtype)).field("embedding").type
    flat = pa.array(np.ascontiguousarray(vectors).reshape(rows * dim))
    return pa.FixedSizeListArray.from_arrays(flat, type=kind)


def token_array(tokens: Sequence[npt.NDArray[Any]]) -> pa.ListArray:
    """Make the embedding column of one (T, D) matrix for each row; they share D and dtype."""
    kind = feature_schema(1, str(tokens[0].dtype), "tokens").field("embedding").type
    ends = np.cumsum([0, *(one.size for one in tokens)], dtype=np.int32)
    flat = pa.array(np.concatenate([one.reshape(-1) for one in tokens]))
    return pa.ListArray.from_arrays(pa.array(ends), flat, type=kind)


def vectors_of(rows: pa.Table, dim: int) -> npt.NDArray[Any]:
    """Give the embedding column of pooled rows as (R, D)."""
    column = rows.column("embedding").combine_chunks()
    flat = column.flatten().to_numpy(zero_copy_only=True)
    # A null row would vanish in flatten and shift all that follow.
    assert column.null_count == 0
    assert len(flat) == len(rows) * dim
    vectors: npt.NDArray[Any] = flat.reshape(-1, dim)
    return vectors


def items_of(rows: pa.Table, n_items: int, where: Path) -> npt.NDArray[np.int32]:
    """Give the column ``item``.

    Raises:
        UserError: One is none of the dataset's.
    """
    item: npt.NDArray[np.int32] = rows.column("item").to_numpy()
    if not ((item >= 0) & (item < n_items)).all():
        raise UserError(f"{where} has an item that is not in 0..{n_items - 1}; {WITHOUT}")
    return item


def copy_tokens(
    rows: pa.Table, offsets: npt.NDArray[np.int64], values: npt.NDArray[Any], part: Path
) -> None:
    """Copy the tokens of some rows to where their items own ``values`` (K, D).

    Args:
        rows: Of ``part``.
        offsets: (N + 1,) item i owns ``values[offsets[i]:offsets[i + 1]]``.
        values: Written to.
        part: Named in messages.

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
        raise UserError(f"{part} has rows of other lengths than it says; {WITHOUT}")
    for start, begin, end in zip(starts, ends[:-1], ends[1:], strict=True):
        values[start : start + end - begin] = flat[begin:end]


def positions(ids: pa.ChunkedArray, item_ids: pa.ChunkedArray) -> npt.NDArray[np.int32]:
    """Where each of ``ids`` stands in ``item_ids``; -1 for one that is not there."""
    found = pc.index_in(ids, value_set=item_ids.combine_chunks())
    return np.asarray(pc.fill_null(found, -1).to_numpy(), dtype=np.int32)
