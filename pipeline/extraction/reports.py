"""Report the progress and the result of an extraction."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from features.signals import raise_received
from pipeline.extraction.deduplication import ExtractionCounts

SECONDS_BETWEEN_REPORTS = 0.1
"""Shortest time between two reports of progress."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModalityReport:
    """Result of one modality. Every item is in exactly one of the counts."""

    modality: str
    backbone: str
    level: str
    dim: int
    items: int
    """Items of the dataset = encoded + shared + reused + absent + failed."""
    encoded: int
    """Items that this run encoded."""
    shared: int
    """Items that got the vector of another item with the same content."""
    reused: int
    """Items whose vector is from an earlier run."""
    absent: int
    """Items without an input of this modality."""
    failed: dict[str, int]
    """Inputs that could not be used, by reason."""
    partial: int
    """Encoded videos of which only the frames before a damage were used."""
    seconds: float
    """Wall time, without loading the backbone."""
    rate: float
    """Encoded items per second."""
    bytes: int
    """Size of the table on disk."""
    path: str
    """Folder of the table."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtractReport:
    """Result of one extraction."""

    dataset: str
    tables: tuple[ModalityReport, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtractProgress:
    """Progress of one modality, reported several times per second and at the end."""

    modality: str
    backbone: str
    done: int
    """Items whose outcome is known."""
    total: int
    """Items that have an input of this modality."""
    encoded: int
    failed: int


class ProgressReporter:
    """Convert counts to progress, at most once every :data:`SECONDS_BETWEEN_REPORTS`.

    Args:
        modality: The modality.
        backbone: Name of the backbone.
        total: Items that have an input of this modality.
        progress: Called with the progress. None disables reports.
    """

    def __init__(
        self,
        modality: str,
        backbone: str,
        total: int,
        progress: Callable[[ExtractProgress], None] | None,
    ) -> None:
        self._modality = modality
        self._backbone = backbone
        self._total = total
        self._progress = progress
        self._last = 0.0

    def __call__(self, counts: ExtractionCounts) -> None:
        """Report the counts if the last report is old enough or all items are done.

        Raises:
            Interrupted: A signal was received, see :func:`features.signals.raise_received`.
        """
        raise_received()
        now = time.monotonic()
        is_early = now - self._last < SECONDS_BETWEEN_REPORTS and counts.done < self._total
        if self._progress is None or is_early:
            return
        self._last = now
        self._progress(
            ExtractProgress(
                modality=self._modality,
                backbone=self._backbone,
                done=counts.done,
                total=self._total,
                encoded=counts.encoded,
                failed=len(counts.failures),
            )
        )
