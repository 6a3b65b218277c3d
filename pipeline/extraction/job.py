"""Extract the features of a dataset: encode the input of every item with a frozen backbone.

The bytes that are hashed are the bytes that are decoded. Rows of earlier runs are reused, and
identical content is encoded once. An input that cannot be used becomes a row of ``failures``, and
the next run tries it again.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pyarrow as pa

from features.atomic_files import lock
from features.errors import UserError
from features.provenance import Provenance
from features.store import FeatureStore, FeatureTable
from features.warehouse import Warehouse
from pipeline.extraction.deduplication import Deduplicator
from pipeline.extraction.engines import ENGINES, Engine
from pipeline.extraction.failures import write_failures
from pipeline.extraction.options import ExtractOptions
from pipeline.extraction.plan import ExtractionPlan, plan_extraction, provenance_of
from pipeline.extraction.reports import (
    ExtractProgress,
    ExtractReport,
    ModalityReport,
    ProgressReporter,
)
from pipeline.extraction.table_writer import FeatureTableWriter
from pipeline.extraction.unchanged import report_unchanged, request_of, weights_of
from pipeline.media.images import quiet_decoders


def extract_features(
    warehouse: Warehouse,
    dataset: str,
    options: ExtractOptions,
    *,
    progress: Callable[[ExtractProgress], None] | None = None,
    notify: Callable[[str], None] = lambda line: None,
) -> ExtractReport:
    """Encode a prepared dataset. A later run encodes only inputs that are new or have changed.

    Args:
        warehouse: The warehouse that holds the dataset and receives its tables.
        dataset: Name of a prepared dataset.
        options: The backbones, the level, and how inputs are read and stored.
        progress: Called with the progress of the job.
        notify: Called with messages for the user.

    Raises:
        UserError: As :func:`pipeline.extraction.plan.plan_extraction`; a backbone is unavailable
            or does not take a modality or level; a table holds vectors of another provenance; with
            ``strict``, an input cannot be used.
    """
    with _system_memory():
        plan = plan_extraction(warehouse, dataset, options)
        engine = ENGINES.find(options.engine)()
        unchanged = [report_unchanged(plan, modality) for modality in plan.names]
        if all(unchanged):
            return ExtractReport(dataset=dataset, tables=tuple(filter(None, unchanged)))
        plan = plan.loaded()
        with quiet_decoders(), engine.session():
            reports = [
                _extract_modality(plan, modality, engine, progress, notify)
                for modality in plan.backbones
            ]
    return ExtractReport(dataset=dataset, tables=tuple(reports))


@contextmanager
def _system_memory() -> Iterator[None]:
    """Allocate the memory of Arrow from the system, which gets freed memory back at once.

    Arrow's default pool keeps 30 MB and more of freed memory. Reusing that memory saves time for
    many short-lived columns, but an extraction writes one part every few seconds.
    """
    before = pa.default_memory_pool()
    pa.set_memory_pool(pa.system_memory_pool())
    try:
        yield
    finally:
        pa.set_memory_pool(before)


def _extract_modality(
    plan: ExtractionPlan,
    modality: str,
    engine: Engine,
    progress: Callable[[ExtractProgress], None] | None,
    notify: Callable[[str], None],
) -> ModalityReport:
    """Extract one modality into its feature table, and lock the table until the end."""
    backbone = plan.backbones[modality]
    table = FeatureStore(plan.warehouse).table(
        plan.info.name, backbone.name, modality, plan.options.level
    )
    with lock(table.path / ".lock", f"the feature table {table.label} of {plan.info.name}"):
        started = time.monotonic()
        task = plan.task(modality)
        provenance = provenance_of(task, plan.options.dtype)
        _check_provenance(table, provenance, plan.options.overwrite)
        writer = FeatureTableWriter(table, provenance, plan.items.ids)
        deduplicator = Deduplicator(
            writer, plan.options.dtype, item_id=plan.item_id, strict=plan.options.strict
        )
        total = plan.items.counts[modality]
        report = ProgressReporter(modality, backbone.name, total, progress)
        try:
            engine.encode(
                task,
                plan.items.inputs(modality),
                deduplicator=deduplicator,
                report=report,
                notify=notify,
            )
            # The manifest is written last: if it exists, the failures are of the same run.
            write_failures(plan, table, modality, deduplicator.counts.failures)
            writer.finish(
                plan.info.fingerprint,
                plan.info.inputs_of(modality),
                source=backbone.source,
                request=request_of(plan, modality),
                weights=weights_of(backbone),
            )
        except BaseException:
            writer.flush()  # an interrupt or a crash loses nothing that was encoded
            raise  # the failures of the last complete run stay; the next run tries all again
        seconds = time.monotonic() - started
        return _report(plan, modality, table, deduplicator, seconds)


def _report(
    plan: ExtractionPlan,
    modality: str,
    table: FeatureTable,
    deduplicator: Deduplicator,
    seconds: float,
) -> ModalityReport:
    counts = deduplicator.counts
    task = plan.task(modality)
    return ModalityReport(
        modality=modality,
        backbone=task.backbone.name,
        level=plan.options.level,
        dim=task.token_dim or task.backbone.dim,
        items=len(plan.items),
        encoded=counts.encoded,
        shared=counts.shared,
        reused=counts.reused,
        absent=len(plan.items) - plan.items.counts[modality],
        failed=dict(Counter(failure.reason for failure in counts.failures).most_common()),
        partial=counts.partial,
        seconds=seconds,
        rate=counts.encoded / seconds if seconds else 0.0,
        bytes=sum(part.stat().st_size for part in table.parts()),
        path=str(table.path),
    )


def _check_provenance(table: FeatureTable, provenance: Provenance, overwrite: bool) -> None:
    """Refuse to mix vectors of two provenances; remove the old ones only with ``overwrite``."""
    try:
        stored = table.provenance()
    except UserError:  # the table is damaged or mixes provenances: no row can be used
        if not overwrite:
            raise
        table.clear()
        return
    if stored is None or stored.identity() == provenance.identity():
        return
    if not overwrite:
        raise UserError(
            f"the feature table {table.label} of {table.dataset} holds other vectors"
            f" ({stored.difference(provenance)}); redo it by --overwrite, or remove {table.path}"
        )
    table.clear()
