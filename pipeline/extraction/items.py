"""What there is to encode: which modalities, which items, in which order."""

from collections import Counter
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from features.dataset import load_items, stream_items
from features.errors import UserError
from features.schema import FEATURE_MODALITIES, MODALITIES
from features.warehouse import Warehouse
from pipeline.backbones.registry import DEFAULT
from pipeline.extraction.encoder import Input


def sources(modality: str) -> tuple[str, ...]:
    """The columns of the items table that a modality is made of; joint: an item needs both."""
    return ("image", "text") if modality == "joint" else (modality,)


class Items:
    """The items of a dataset: their ids in memory, what they have only while it is passed by.

    Args:
        warehouse: Where the dataset is.
        dataset: A prepared dataset.

    Raises:
        UserError: The dataset is not prepared, or its tables contradict each other.
    """

    def __init__(self, warehouse: Warehouse, dataset: str) -> None:
        self._warehouse = warehouse
        self._dataset = dataset
        self.ids: pa.ChunkedArray = load_items(warehouse, dataset, ["item_id"])["item_id"]
        self.counts: Counter[str] = Counter()
        """How many items have something of a modality; blank is nothing."""
        for batch in stream_items(warehouse, dataset, MODALITIES):
            for modality in FEATURE_MODALITIES:
                self.counts[modality] += int(np.count_nonzero(_filled(batch, modality)))
        pa.default_memory_pool().release_unused()

    def __len__(self) -> int:
        """N."""
        return len(self.ids)

    def present(self, modality: str) -> Iterator[tuple[int, Input]]:
        """Give (item, input) of the items that have one, in order."""
        start = 0
        columns = sources(modality)
        for batch in stream_items(self._warehouse, self._dataset, columns):
            there = np.flatnonzero(_filled(batch, modality))
            values = zip(*(batch[name].take(there).to_pylist() for name in columns), strict=True)
            for offset, value in zip(there.tolist(), values, strict=True):
                yield start + offset, value if len(value) > 1 else value[0]
            start += len(batch)


def choose(dataset: str, items: Items, given: dict[str, str | None]) -> dict[str, str]:
    """Pick the backbone of each modality; without any choice, CLIP for what there is.

    Args:
        dataset: Its name, for messages.
        items: The items.
        given: The backbone asked for, by modality.

    Raises:
        UserError: No item has anything of a modality.
    """
    wanted = {modality: name for modality, name in given.items() if name is not None}
    counts = items.counts
    if not wanted:
        wanted = {name: DEFAULT for name in ("image", "text") if counts[name]}
        if not wanted:
            raise UserError(
                f"no item of {dataset} has a picture or a text; prepare it again with some,"
                " or give --video BACKBONE"
            )
    for modality in wanted:
        if not counts[modality] and modality == "joint":
            raise UserError(
                f"no item of {dataset} has both a picture and a text, which --joint needs;"
                " leave it out or prepare the dataset again with both"
            )
        if not counts[modality]:
            have = ", ".join(name for name in MODALITIES if counts[name]) or "nothing"
            raise UserError(
                f"the column {modality} of {dataset} is empty for all {len(items)} items;"
                f" leave out --{modality} (there is {have}) or prepare it again with one"
            )
    return wanted


def _filled(rows: pa.RecordBatch, modality: str) -> npt.NDArray[np.bool_]:
    """(R,) which rows have it; blank is nothing."""
    there = np.ones(len(rows), np.bool_)
    for name in sources(modality):
        trimmed = pc.utf8_trim_whitespace(rows[name])
        here = pc.fill_null(pc.greater(pc.binary_length(trimmed), 0), False)
        there &= here.to_numpy(zero_copy_only=False)
    return there
