"""Estimate the items, bytes and time of an extraction from a short probe. Nothing is written."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

from features.warehouse import Warehouse
from pipeline.extraction.deduplication import Deduplicator, EncodedRow, RowStore
from pipeline.extraction.encoder import InputEncoder
from pipeline.extraction.options import ExtractOptions
from pipeline.extraction.plan import ExtractionPlan, plan_extraction
from pipeline.media.images import quiet_decoders
from pipeline.media.reader import MediaReader

_PROBE_BATCHES = {"image": 2, "joint": 2, "text": 8}
_PROBE_VIDEOS = 4
_OTHER_BYTES = 64  # bytes of a row besides its embedding


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtractionEstimate:
    """Estimated cost of one table that does not exist yet."""

    modality: str
    backbone: str
    level: str
    dim: int
    items: int
    """Items of the dataset."""
    rows: int
    """Items that have an input of this modality."""
    absent: int
    """Items without an input of this modality."""
    tokens: float | None
    """Mean number of tokens of a row; None at the level ``pooled``."""
    bytes: int
    """Size of the table on disk."""
    seconds: float
    """Wall time on this machine when it is idle, without loading the backbone."""
    probed: int
    """Inputs that were read and encoded for the estimate."""
    failed: int
    """Probed inputs that cannot be used."""


class _CountedRows(RowStore):
    """Count the rows that an extraction would write."""

    def __init__(self) -> None:
        self.n_rows = self.n_bytes = self.n_tokens = 0

    def add(self, row: EncodedRow) -> None:
        self.n_rows += 1
        self.n_bytes += row.vector.nbytes + _OTHER_BYTES
        self.n_tokens += row.tokens or 0

    def copy(self, contents: dict[int, str]) -> None:
        pass


def estimate_extraction(
    warehouse: Warehouse,
    dataset: str,
    options: ExtractOptions,
    *,
    notify: Callable[[str], None] = lambda line: None,
) -> list[ExtractionEstimate]:
    """Read and encode a few inputs of each modality, spread over the dataset, in this process.

    Args:
        warehouse: The warehouse with the dataset.
        dataset: Name of a prepared dataset.
        options: Options of the extraction to estimate.
        notify: Called with messages for the user.

    Returns:
        One estimate for each modality.

    Raises:
        UserError: As :func:`pipeline.extraction.job.extract_features`.
    """
    plan = plan_extraction(warehouse, dataset, options).loaded()
    with quiet_decoders():
        return [_probe(plan, modality, notify) for modality in plan.backbones]


def _probe(
    plan: ExtractionPlan, modality: str, notify: Callable[[str], None]
) -> ExtractionEstimate:
    n_inputs = plan.items.counts[modality]
    task = plan.task(modality)
    size = _PROBE_BATCHES.get(modality, 0) * task.options.batch_size or _PROBE_VIDEOS
    size = min(n_inputs, size)
    inputs = list(islice(plan.items.inputs(modality), 0, None, max(1, n_inputs // size)))[:size]
    media = MediaReader(task.raw, task.prepared)
    try:
        for subset in (inputs[:1], inputs):  # the first pass is a warm-up
            rows = _CountedRows()
            deduplicator = Deduplicator(
                rows, plan.options.dtype, item_id=plan.item_id, strict=plan.options.strict
            )
            encoder = InputEncoder(
                backbone=task.backbone,
                options=task.options,
                deduplicator=deduplicator,
                media=media,
                report=lambda counts: None,
                notify=notify,
            )
            started = time.monotonic()
            encoder.encode(subset)
            seconds = time.monotonic() - started
    finally:
        media.close()
    scale = n_inputs / max(1, len(inputs))
    return ExtractionEstimate(
        modality=modality,
        backbone=task.backbone.name,
        level=task.options.level,
        dim=task.token_dim or task.backbone.dim,
        items=len(plan.items),
        rows=n_inputs,
        absent=len(plan.items) - n_inputs,
        tokens=None if task.options.is_pooled else rows.n_tokens / max(1, rows.n_rows),
        bytes=round(rows.n_bytes * scale),
        seconds=seconds * scale,
        probed=len(inputs),
        failed=len(deduplicator.counts.failures),
    )
