"""Where the vectors of a table came from, and what every part of it says of that.

A part bears it in its footer, under the key ``mmrec``.
"""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from features.atomic_files import read_errors
from features.errors import UserError

KEY = b"mmrec"
AGAIN = "run mmrec extract again; what is whole is reused"
WITHOUT = f"remove this file and {AGAIN}"
LIGHT = ("item", "item_id", "content_hash", "n_frames", "n_tokens", "partial")
"""All columns but the embedding."""
_COLUMNS = {*LIGHT, "embedding"}
LATER = "partial"
"""The column that tables of before it lack, in all of their parts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Provenance:
    """Where the vectors of a table came from; two tables with one identity may be mixed."""

    backbone: str
    """Short name or specification, as ``mmrec extract`` was told."""
    checkpoint: str
    """Fingerprint of the weights."""
    preprocessing: str
    """What was done to the input before the backbone saw it."""
    pooling: str
    modality: str
    level: str
    compute: str
    """Arithmetic of the forward pass: ``float32`` or ``bfloat16``."""
    dtype: str
    """How an element is stored: ``float16`` or ``float32``."""
    dim: int
    libraries: dict[str, str] = field(default_factory=dict)
    """Library versions; recorded, not part of the identity."""

    def identity(self) -> dict[str, Any]:
        """What must be equal for two rows to stand in one table."""
        return {key: value for key, value in asdict(self).items() if key != "libraries"}

    def difference(self, other: "Provenance") -> str:
        """Name what differs, for a message; empty when nothing does."""
        mine, theirs = self.identity(), other.identity()
        return ", ".join(
            f"{key} {mine[key]!r} and {theirs[key]!r}" for key in mine if mine[key] != theirs[key]
        )


_KINDS: dict[str, Any] = {entry.name: entry.type for entry in fields(Provenance)} | {
    "libraries": dict
}


def read_provenance(part: Path) -> Provenance:
    """Read what a part says of itself.

    Raises:
        UserError: It cannot be read, says nothing, or is of another version.
    """
    with read_errors(part, WITHOUT):
        schema = pq.read_schema(part)
        metadata = schema.metadata or {}
        if KEY not in metadata:
            raise UserError(f"{part} does not say where it came from; {WITHOUT}")
        document = json.loads(metadata[KEY])
        provenance = Provenance(**document)
        wrong = any(type(getattr(provenance, name)) is not kind for name, kind in _KINDS.items())
        if wrong or {LATER, *schema.names} != _COLUMNS:
            raise UserError(
                f"{part} was written by another version; redo its table by mmrec extract"
                " --overwrite, or remove its folder"
            )
    return provenance
