"""Read attributes of items, such as categories or brands, from the columns of the items table.

Legend: N items, A attributes, X pairs of item and attribute.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from features.dataset import Ints, stream_items
from features.errors import UserError, shorten
from features.warehouse import Warehouse


@dataclass(frozen=True, kw_only=True, slots=True)
class ItemAttributes:
    """The attributes of each item, as compressed sparse rows."""

    names: Sequence[str]
    """(A,) ``column=value`` of each attribute, in alphabetical order."""
    offsets: Ints
    """(N + 1,) item i has ``ids[offsets[i]:offsets[i + 1]]``."""
    ids: Ints
    """(X,) attributes of each item, ascending and without repetition."""

    def padded(self, column: str) -> Ints:
        """Return the attributes of one column: (N, P) ids, padded with -1; P is at least 1."""
        is_of_column = np.array([name.startswith(f"{column}=") for name in self.names], bool)
        rows = np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))
        kept = is_of_column[self.ids] if len(self.ids) else np.zeros(0, bool)
        rows, ids = rows[kept], self.ids[kept]
        places = np.arange(len(rows)) - np.searchsorted(rows, rows)
        table_NP = np.full((len(self.offsets) - 1, places.max(initial=0) + 1), -1, np.int64)
        table_NP[rows, places] = ids
        return table_NP

    def digest(self) -> str:
        """Return a hash of the attributes of all items."""
        digest = hashlib.sha256(json.dumps(list(self.names)).encode())
        digest.update(self.offsets.tobytes())
        digest.update(self.ids.tobytes())
        return digest.hexdigest()[:16]


def load_attributes(
    warehouse: Warehouse,
    datasets: Sequence[str],
    columns: Sequence[str],
    *,
    least: int = 1,
    vocabulary: Sequence[str] | None = None,
) -> ItemAttributes:
    """Read the attributes of the items of datasets, one dataset after the other.

    A column can hold a text, a number, true or false, or a list of these, also nested, such as the
    categories of Amazon. A text is split at ``|``, as the genres of MovieLens are.

    Args:
        warehouse: Holds the datasets.
        datasets: Names of prepared datasets.
        columns: Columns of the items that the raw data brought, such as ``categories``.
        least: Attributes of fewer items are left out.
        vocabulary: The names of the attributes, in place of those that the items have. Other
            attributes are left out, and ``least`` is not read.

    Raises:
        UserError: No item of a dataset has one of the columns, or a value is an object.
    """
    rows: list[set[str]] = []
    for dataset in datasets:
        rows += _rows(warehouse, dataset, columns)
    if vocabulary is None:
        every = [name for row in rows for name in row]
        names, counts = np.unique(every or [""], return_counts=True)
        vocabulary = names[counts >= least].tolist()
    kept = {name: index for index, name in enumerate(vocabulary) if name}
    ids = [sorted(kept[name] for name in row if name in kept) for row in rows]
    return ItemAttributes(
        names=list(kept),
        offsets=np.cumsum([0, *(len(row) for row in ids)]).astype(np.int64),
        ids=np.array([index for row in ids for index in row], np.int64),
    )


def _rows(warehouse: Warehouse, dataset: str, columns: Sequence[str]) -> list[set[str]]:
    """Return the names of the attributes of each item."""
    rows, present = [], set[str]()
    for batch in stream_items(warehouse, dataset, ["item_id", "attributes"]):
        for item_id, text in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            values = json.loads(text) if text else {}
            present |= values.keys()
            place = f"dataset {dataset!r}, item {item_id!r}"
            rows.append(
                {
                    f"{column}={value}"
                    for column in columns
                    for value in _values(values.get(column), f"{place}: attribute {column!r}")
                }
            )
    for column in columns:
        if column not in present:
            raise UserError(
                f"the items of {dataset!r} have no attribute {column!r}; choose from"
                f" {shorten(', '.join(sorted(present)) or 'none', 1000)}"
            )
    return rows


def _values(value: Any, place: str) -> Iterator[str]:
    if isinstance(value, list):
        for part in value:
            yield from _values(part, place)
    elif isinstance(value, dict):
        raise UserError(f"{place} is an object; name a column of texts, numbers or lists")
    elif isinstance(value, str):
        yield from (part.strip() for part in value.split("|") if part.strip())
    elif value is not None:
        yield str(value).lower() if isinstance(value, bool) else str(value)
