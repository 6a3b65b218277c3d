"""What an extraction will cost, from a short probe; nothing is written."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy.typing as npt

from features.warehouse import Warehouse
from pipeline.backbones.base import POOLED, Backbone
from pipeline.extraction.deduplication import Deduplicator, ExtractionCounts
from pipeline.extraction.encoder import Encoder
from pipeline.extraction.job import Job, open_job
from pipeline.extraction.options import Options
from pipeline.media.images import quiet_decoders

_PROBED = {"image": 2, "joint": 2, "text": 8, "video": 0}  # batches; of clips a few
_CLIPS = 4
_LIGHT = 64  # bytes of a row beside its embedding


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """What one table will cost when none of it is there yet."""

    modality: str
    backbone: str
    level: str
    dim: int
    items: int
    """Items of the dataset."""
    rows: int
    """Items that have this modality."""
    absent: int
    tokens: float | None
    """Mean tokens of a row, where the level is not pooled."""
    bytes: int
    """Of the table on disk."""
    seconds: float
    """Without loading the backbone; on an idle machine like this one."""
    probed: int
    """Inputs that were really read and encoded for this."""
    failed: int
    """Of these."""


class _Probe:
    """Counts what a ledger would write."""

    def __init__(self) -> None:
        self.rows = self.bytes = self.tokens = 0

    def has(self, item: int, content: str) -> bool:
        return False

    def knows(self, content: str) -> bool:
        return False

    def keep(self, item: int) -> None:
        pass

    def add(
        self,
        item: int,
        content: str,
        vector: npt.NDArray[Any],
        *,
        frames: int | None = None,
        tokens: int | None = None,
        partial: bool | None = None,
    ) -> None:
        self.rows += 1
        self.bytes += vector.nbytes + _LIGHT
        self.tokens += tokens or 0

    def copy(self, wanted: dict[int, str]) -> int:
        return len(wanted)


def estimate(
    warehouse: Warehouse,
    dataset: str,
    options: Options,
    *,
    notify: Callable[[str], None] = lambda line: None,
) -> list[Estimate]:
    """Read and encode a few inputs of each modality, spread over the dataset.

    Raises:
        UserError: As :func:`pipeline.extraction.job.extract`.
    """
    job, models = open_job(warehouse, dataset, options, notify=notify)
    with quiet_decoders():
        return [_estimate(job, modality, backbone) for modality, backbone in models.items()]


def _estimate(job: Job, modality: str, backbone: Backbone) -> Estimate:
    rows = job.items.counts[modality]
    choices = job.choices(backbone, modality)
    most = min(rows, _PROBED[modality] * choices.batch_size or _CLIPS)
    chosen = list(islice(job.items.present(modality), 0, None, max(1, rows // most)))[:most]
    media = job.media()
    try:
        for part in (chosen[:1], chosen):  # the first pass warms up
            probe = _Probe()
            book = Deduplicator(probe, job.options.dtype, job.name if job.options.strict else None)
            encoder = Encoder(
                backbone=backbone,
                choices=choices,
                book=book,
                media=media,
                report=_ignore,
                notify=job.notify,
            )
            started = time.monotonic()
            encoder.run(part)
            seconds = time.monotonic() - started
    finally:
        media.close()
    share = rows / max(1, len(chosen))
    pooled = choices.level == POOLED
    return Estimate(
        modality=modality,
        backbone=backbone.name,
        level=choices.level,
        dim=backbone.dim if pooled else backbone.token_dim(choices.level, modality),
        items=len(job.items),
        rows=rows,
        absent=len(job.items) - rows,
        tokens=None if pooled else probe.tokens / max(1, probe.rows),
        bytes=round(probe.bytes * share),
        seconds=seconds * share,
        probed=len(chosen),
        failed=len(book.tally.failures),
    )


def _ignore(tally: ExtractionCounts) -> None:
    pass
