"""What there is to encode: which modalities, which items, in which order."""

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc

from features.errors import UserError
from features.schema import FEATURE_MODALITIES, MODALITIES
from pipeline.backbones import DEFAULT
from pipeline.encode import Input


def sources(modality: str) -> tuple[str, ...]:
    """The columns of the items table that a modality is made of; joint: an item needs both."""
    return ("image", "text") if modality == "joint" else (modality,)


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
    counts = {name: count(items, name) for name in FEATURE_MODALITIES}
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


def _filled(items: pa.Table, modality: str) -> pa.ChunkedArray:
    """(N,) bool: which items have it; blank is nothing."""
    there = None
    for name in sources(modality):
        trimmed = pc.utf8_trim_whitespace(items[name])
        here = pc.fill_null(pc.greater(pc.binary_length(trimmed), 0), False)
        there = here if there is None else pc.and_(there, here)
    return there


def count(items: pa.Table, modality: str) -> int:
    """How many items have something of a modality; blank is nothing."""
    return int(pc.sum(_filled(items, modality)).as_py() or 0)


def present(items: pa.Table, modality: str) -> Iterator[tuple[int, Input]]:
    """Give (item, input) of the items that have one, in order, some thousand at a time."""
    filled = _filled(items, modality)
    columns = [items[name] for name in sources(modality)]
    for start in range(0, len(items), 4096):
        values = zip(*(column.slice(start, 4096).to_pylist() for column in columns), strict=True)
        there = filled.slice(start, 4096).to_pylist()
        for offset, value in enumerate(values):
            if there[offset]:
                yield start + offset, value if len(value) > 1 else value[0]
