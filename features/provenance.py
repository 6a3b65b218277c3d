"""Provenance of the vectors of a feature table.

Every part holds it in its footer, as JSON under the key ``mmrec``.
"""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from features.atomic_files import read_errors
from features.errors import UserError

METADATA_KEY = b"mmrec"
IMPORTED = "imported"
"""Arithmetic (``compute``) of vectors that ``mmrec import-features`` has read from a file."""
EXTRACT_AGAIN = "run mmrec extract again; what is whole is reused"
REMOVE_FILE = f"remove this file and {EXTRACT_AGAIN}"
SMALL_COLUMNS = ("item", "item_id", "content_hash", "n_frames", "n_tokens", "partial")
"""All columns but the embedding."""
_COLUMNS = {*SMALL_COLUMNS, "embedding"}
OPTIONAL_COLUMN = "partial"
"""A column that older tables do not have, in any of their parts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Provenance:
    """How vectors were made. Vectors with the same identity may be in one table."""

    backbone: str
    """Short name or specification, as given to ``mmrec extract``."""
    checkpoint: str
    """Fingerprint of the weights."""
    preprocessing: str
    """Preprocessing of the backbone's input."""
    pooling: str
    modality: str
    level: str
    compute: str
    """Arithmetic of the forward pass: ``float32`` or ``bfloat16``; ``imported`` for a file."""
    dtype: str
    """How an element is stored: ``float16`` or ``float32``."""
    dim: int
    libraries: dict[str, str] = field(default_factory=dict)
    """Library versions; recorded, not part of the identity."""

    def identity(self) -> dict[str, Any]:
        """Return the fields that must be equal for two rows of one table."""
        return {key: value for key, value in asdict(self).items() if key != "libraries"}

    def difference(self, other: "Provenance") -> str:
        """Return the fields that differ and their values, for a message; empty if none does."""
        mine, theirs = self.identity(), other.identity()
        return ", ".join(
            f"{key} {mine[key]!r} and {theirs[key]!r}" for key in mine if mine[key] != theirs[key]
        )


_KINDS: dict[str, Any] = {entry.name: entry.type for entry in fields(Provenance)} | {
    "libraries": dict
}


def read_provenance(part: Path) -> Provenance:
    """Read the provenance of a part.

    Raises:
        UserError: The part cannot be read, has no provenance, or is of another version.
    """
    with read_errors(part, REMOVE_FILE):
        schema = pq.read_schema(part)
        metadata = schema.metadata or {}
        if METADATA_KEY not in metadata:
            raise UserError(f"{part} has no provenance; {REMOVE_FILE}")
        document = json.loads(metadata[METADATA_KEY])
        provenance = Provenance(**document)
        wrong = any(type(getattr(provenance, name)) is not kind for name, kind in _KINDS.items())
        if wrong or {OPTIONAL_COLUMN, *schema.names} != _COLUMNS:
            raise UserError(
                f"{part} was written by another version; redo its table by mmrec extract"
                " --overwrite, or remove its folder"
            )
    return provenance
