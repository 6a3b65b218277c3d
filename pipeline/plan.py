"""What there is to encode: which modalities, which items, in which order."""

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc

from features.errors import UserError
from features.schema import MODALITIES
from pipeline.backbones import DEFAULT


def choose(dataset: str, items: pa.Table, given: dict[str, str | None]) -> dict[str, str]:
    """Pick the backbone of each modality; without any choice, CLIP for what there is.

    Args:
        dataset: Its name, for messages.
        items: The items table.
        given: The backbone asked for, by modality.

    Raises:
        UserError: No item has anything of a modality.
    """
    wanted = {modality: name for modality, name in given.items() if name is not None}
    counts = {modality: count(items[modality]) for modality in MODALITIES}
    if not wanted:
        wanted = {name: DEFAULT for name in ("image", "text") if counts[name]}
        if not wanted:
            raise UserError(
                f"no item of {dataset} has a picture or a text; prepare it again with some,"
                " or give --video BACKBONE"
            )
    for modality in wanted:
        if not counts[modality]:
            have = ", ".join(name for name in MODALITIES if counts[name]) or "nothing"
            raise UserError(
                f"the column {modality} of {dataset} is empty for all {len(items)} items;"
                f" leave out --{modality} (there is {have}) or prepare it again with one"
            )
    return wanted


def _filled(column: pa.ChunkedArray) -> pa.ChunkedArray:
    trimmed = pc.utf8_trim_whitespace(column)
    return pc.fill_null(pc.greater(pc.binary_length(trimmed), 0), False)


def count(column: pa.ChunkedArray) -> int:
    """How many items have something in this column; blank is nothing."""
    return int(pc.sum(_filled(column)).as_py() or 0)


def present(column: pa.ChunkedArray) -> Iterator[tuple[int, str]]:
    """Give (item, value) of the items that have one, in order, some thousand at a time."""
    filled = _filled(column)
    for start in range(0, len(column), 4096):
        values = column.slice(start, 4096).to_pylist()
        there = filled.slice(start, 4096).to_pylist()
        for offset, value in enumerate(values):
            if there[offset]:
                yield start + offset, value
