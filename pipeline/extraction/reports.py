"""What an extraction tells: how far it is, and what has become of every item."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class ModalityReport:
    """What became of one modality's items: all of them are in exactly one of the counts."""

    modality: str
    backbone: str
    level: str
    dim: int
    items: int
    """Items of the dataset = encoded + shared + reused + absent + failed."""
    encoded: int
    """Went through the backbone in this run."""
    shared: int
    """Got the vector of another item with the same content."""
    reused: int
    """Had their vector from an earlier run."""
    absent: int
    """Have no input of this modality."""
    failed: dict[str, int]
    """Inputs that could not be used, by reason."""
    partial: int
    """Of the encoded: clips used up to where their file is damaged."""
    seconds: float
    """Wall time of the job, without loading the backbone."""
    rate: float
    """Encoded items a second."""
    bytes: int
    """Size of the table on disk."""
    path: str
    """The table's folder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtractReport:
    """What one run of the extraction did."""

    dataset: str
    tables: tuple[ModalityReport, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtractProgress:
    """How far one modality is; given to the callback some times a second, and at its end."""

    modality: str
    backbone: str
    done: int
    total: int
    """Items that have this modality."""
    encoded: int
    failed: int
