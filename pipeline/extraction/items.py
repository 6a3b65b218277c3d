"""Read the inputs of a dataset's items, in the order of ``item``."""

from collections import Counter
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from features.dataset import load_items, stream_items
from features.schema import FEATURE_MODALITIES, MODALITIES
from features.warehouse import Warehouse
from pipeline.extraction.tasks import Input


def input_columns(modality: str) -> tuple[str, ...]:
    """Return the columns of the items table that a modality needs. An item must have them all."""
    return ("image", "text") if modality == "joint" else (modality,)


class ItemInputs:
    """The items of a dataset: ids in memory, inputs streamed from Parquet.

    Args:
        warehouse: The warehouse.
        dataset: Name of a prepared dataset.

    Raises:
        UserError: The dataset is not prepared, or its tables contradict each other.
    """

    def __init__(self, warehouse: Warehouse, dataset: str) -> None:
        self._warehouse = warehouse
        self._dataset = dataset
        self.ids: pa.ChunkedArray = load_items(warehouse, dataset, ["item_id"])["item_id"]
        self.counts: Counter[str] = Counter()
        """Number of items that have an input, by modality. A blank text does not count."""
        for batch in stream_items(warehouse, dataset, MODALITIES):
            for modality in FEATURE_MODALITIES:
                self.counts[modality] += int(np.count_nonzero(_is_present(batch, modality)))
        pa.default_memory_pool().release_unused()

    def __len__(self) -> int:
        """Return N, the number of items."""
        return len(self.ids)

    def inputs(self, modality: str) -> Iterator[tuple[int, Input]]:
        """Yield (item, input) of the items that have an input of this modality, in order."""
        start = 0
        columns = input_columns(modality)
        for batch in stream_items(self._warehouse, self._dataset, columns):
            rows = np.flatnonzero(_is_present(batch, modality))
            values = zip(*(batch[name].take(rows).to_pylist() for name in columns), strict=True)
            for row, value in zip(rows.tolist(), values, strict=True):
                yield start + row, value if len(value) > 1 else value[0]
            start += len(batch)


def _is_present(rows: pa.RecordBatch, modality: str) -> npt.NDArray[np.bool_]:
    """Return (R,) bool, True for the rows that have an input of this modality."""
    is_present = np.ones(len(rows), np.bool_)
    for name in input_columns(modality):
        trimmed = pc.utf8_trim_whitespace(rows[name])
        is_filled = pc.fill_null(pc.greater(pc.binary_length(trimmed), 0), False)
        is_present &= is_filled.to_numpy(zero_copy_only=False)
    return is_present
