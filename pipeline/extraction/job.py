"""The extraction job: every item's picture, text and clip through a frozen backbone, once.

Inputs are read once: the bytes that are hashed are the bytes that are decoded. Reading, decoding
and tokenising run in threads ahead of the model; vectors go to the table in parts. What is already
there for the same content is reused, and identical content is encoded once. An input that cannot
be used becomes a row of ``failures``; it is tried again by the next run.
"""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from features.atomic_files import lock, write_table
from features.errors import UserError
from features.provenance import Provenance
from features.schema import FAILURES_SCHEMA
from features.store import FeatureStore, FeatureTable
from features.warehouse import DatasetInfo, Warehouse
from pipeline.backbones.base import POOLED, Backbone, UnavailableError
from pipeline.backbones.registry import DEFAULT, check_modality, load_backbone, wrong_modality
from pipeline.extraction.deduplication import Deduplicator, ExtractionCounts, Failure
from pipeline.extraction.encoder import TEXT_MOST, EncodeOptions, Encoder
from pipeline.extraction.items import Items, choose
from pipeline.extraction.options import Options
from pipeline.extraction.reports import ExtractProgress, ExtractReport, ModalityReport
from pipeline.extraction.table_writer import FeatureTableWriter
from pipeline.media.images import DRAFT_PREPROCESSING, IMAGE_PREPROCESSING, quiet_decoders
from pipeline.media.reader import MediaReader
from pipeline.media.video import describe_sampling

SECONDS_A_TICK = 0.1


def extract(
    warehouse: Warehouse,
    dataset: str,
    options: Options,
    *,
    progress: Callable[[ExtractProgress], None] | None = None,
    notify: Callable[[str], None] = lambda line: None,
) -> ExtractReport:
    """Encode a prepared dataset; run again, it does only what is missing or has changed.

    Args:
        warehouse: Where the dataset is and its tables go.
        dataset: Name of a prepared dataset.
        options: What is extracted, and how.
        progress: Called with the state of the job.
        notify: Told what the person at the terminal should know.

    Raises:
        UserError: The dataset is not prepared, has nothing of a modality, its raw files are gone,
            a backbone is unknown, unreachable or of the wrong kind, or a table holds vectors of
            another provenance; with ``strict``, an input cannot be used.
    """
    with _frugal():
        job, models = open_job(warehouse, dataset, options, progress=progress, notify=notify)
        with quiet_decoders(), _engine(options):
            reports = [job.run(modality, backbone) for modality, backbone in models.items()]
    return ExtractReport(dataset=dataset, tables=tuple(reports))


@contextmanager
def _frugal() -> Iterator[None]:
    """Have Arrow return memory to the system: its own pool keeps some 30 MB, more with the items.

    That pool is made for many short-lived columns; here a part is written every few seconds.
    """
    before = pa.default_memory_pool()
    pa.set_memory_pool(pa.system_memory_pool())
    try:
        yield
    finally:
        pa.set_memory_pool(before)


def _engine(options: Options) -> AbstractContextManager[None]:
    if options.engine == "local":
        return nullcontext()
    from pipeline.extraction import ray_engine

    return ray_engine.session()


def open_job(
    warehouse: Warehouse,
    dataset: str,
    options: Options,
    *,
    progress: Callable[[ExtractProgress], None] | None = None,
    notify: Callable[[str], None] = lambda line: None,
) -> tuple["Job", dict[str, Backbone]]:
    """Load all that an extraction needs: the job, and the backbone of each modality.

    Raises:
        UserError: As :func:`extract`.
    """
    info = warehouse.info(dataset)
    items = Items(warehouse, dataset)
    wanted = choose(info.name, items, options.backbones())
    if set(wanted) - {"text"} and not Path(info.raw).is_dir():
        raise UserError(
            f"the raw files of {dataset} are no longer in {info.raw}; put them back or run:"
            f" mmrec prepare --dataset {dataset} --raw DIR"
        )
    if options.frames is not None and "video" not in wanted:
        raise UserError("--frames is of clips; give --video BACKBONE as well, or leave it out")
    if options.decode == "draft" and not {"image", "joint"} & set(wanted):
        raise UserError("--decode draft is of pictures; give --image BACKBONE, or leave it out")
    # All models first: a missing one should not show after hours of work with another.
    loaded: dict[str, Backbone] = {}
    for modality, name in wanted.items():
        check_modality(name, modality)
        if name not in loaded:
            try:
                loaded[name] = load_backbone(name, device=options.device, compute=options.compute)
            except UnavailableError as error:
                same = " ".join(f"--{key} hashed" for key in wanted if wanted[key] == name)
                raise UserError(f"{error}, or {same}, which has no weights") from None
        _check_level(loaded[name], modality, options.level)
    job = Job(
        warehouse=warehouse,
        info=info,
        items=items,
        options=options,
        progress=progress,
        notify=notify,
    )
    return job, {modality: loaded[name] for modality, name in wanted.items()}


def _check_level(backbone: Backbone, modality: str, level: str) -> None:
    if modality not in backbone.modalities:
        raise wrong_modality(backbone.name, backbone.modalities, modality)
    known = backbone.levels(modality)
    if level in known:
        return
    if modality == "video":
        raise UserError(
            f"--level {level} is not offered for clips, whose frames are averaged; leave --video"
            " or --level out"
        )
    deep = [name for name in known if name.startswith("layer-")]
    short = [name for name in known if name not in deep]
    if len(deep) > 2:
        deep = [f"{deep[0]} to {deep[-1]}"]
    names = ", ".join([*short, *deep])
    raise UserError(
        f"backbone {backbone.name!r} has no level {level!r} of {modality}; give one of {names}"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What the extractions of one command have in common."""

    warehouse: Warehouse
    info: DatasetInfo
    items: Items
    options: Options
    progress: Callable[[ExtractProgress], None] | None
    notify: Callable[[str], None]

    def run(self, modality: str, backbone: Backbone) -> ModalityReport:
        """Extract one modality into its table."""
        dataset = self.info.name
        store = FeatureStore(self.warehouse)
        table = store.table(dataset, backbone.name, modality, self.options.level)
        with lock(table.path / ".lock", f"the feature table {table.label} of {dataset}"):
            return self._run(modality, backbone, table)

    def _run(self, modality: str, backbone: Backbone, table: FeatureTable) -> ModalityReport:
        provenance = provenance_of(backbone, modality, self.options)
        self._check_provenance(table, provenance)
        started = time.monotonic()
        total = self.items.counts[modality]
        last = 0.0

        def report(tally: ExtractionCounts) -> None:
            nonlocal last
            now = time.monotonic()
            if self.progress is None or (now - last < SECONDS_A_TICK and tally.done < total):
                return
            last = now
            self.progress(
                ExtractProgress(
                    modality=modality,
                    backbone=backbone.name,
                    done=tally.done,
                    total=total,
                    encoded=tally.encoded,
                    failed=len(tally.failures),
                )
            )

        ledger = FeatureTableWriter(table, provenance, self.items.ids)
        strict = self.name if self.options.strict else None
        book = Deduplicator(ledger, self.options.dtype, strict, total)
        try:
            self._encode(backbone, modality, book, report)
            # Before the table is complete: then both are of the same run.
            self._write_failures(table, modality, backbone, book.tally.failures)
            source = getattr(backbone, "source", {})  # for whoever trains its upper blocks
            inputs = self.info.inputs_of(modality)
            ledger.finish(self.info.fingerprint, inputs, source=source)
        except BaseException:
            ledger.flush()  # an interrupt or a crash loses nothing that was encoded
            raise  # the failures of the last whole run stay; all are tried again by the next
        seconds = time.monotonic() - started
        tally = book.tally
        return ModalityReport(
            modality=modality,
            backbone=backbone.name,
            level=provenance.level,
            dim=provenance.dim,
            items=len(self.items),
            encoded=tally.encoded,
            shared=tally.shared,
            reused=tally.reused,
            absent=len(self.items) - total,
            failed=dict(Counter(failure.reason for failure in tally.failures).most_common()),
            partial=tally.partial,
            seconds=seconds,
            rate=tally.encoded / seconds if seconds else 0.0,
            bytes=sum(part.stat().st_size for part in table.parts()),
            path=str(table.path),
        )

    def _encode(
        self,
        backbone: Backbone,
        modality: str,
        book: Deduplicator,
        report: Callable[[ExtractionCounts], None],
    ) -> None:
        inputs, choices = self.items.present(modality), self.choices(backbone, modality)
        if self.options.engine == "ray":
            from pipeline.extraction import ray_engine

            wanted = self.options.backbones()[modality] or DEFAULT
            device = ray_engine.place(self.options.device)
            work = ray_engine.Work(
                backbone=wanted,
                device=device,
                compute=self.options.compute,
                choices=choices,
                raw=Path(self.info.raw).resolve(),
                prepared=self.warehouse.dataset_dir(self.info.name).resolve(),
            )
            pooled = choices.level == POOLED
            ray_engine.run(
                work,
                inputs,
                book=book,
                workers=self.options.workers or ray_engine.default_workers(device),
                width=None if pooled else backbone.token_dim(choices.level, modality),
                report=report,
                notify=self.notify,
            )
            return
        media = self.media()
        try:
            encoder = Encoder(
                backbone=backbone,
                choices=choices,
                book=book,
                media=media,
                report=report,
                notify=self.notify,
            )
            encoder.run(inputs)
        finally:
            media.close()

    def media(self) -> MediaReader:
        """Open what pictures and clips are read from; the caller closes it."""
        return MediaReader(Path(self.info.raw), self.warehouse.dataset_dir(self.info.name))

    def choices(self, backbone: Backbone, modality: str) -> EncodeOptions:
        """How this backbone encodes this modality."""
        return EncodeOptions(
            modality=modality,
            level=self.options.level,
            batch_size=self.options.batch_size or backbone.batch_size,
            threads=_cores(),
            draft=backbone.input_size if self.options.decode == "draft" else None,
            frames=self.options.frames,
        )

    def name(self, item: int) -> str:
        """The id of an item."""
        return str(self.items.ids[item].as_py())

    def _check_provenance(self, table: FeatureTable, provenance: Provenance) -> None:
        """Refuse to mix, and to throw hours of work away because of one option."""
        try:
            there = table.provenance()
        except UserError:  # damaged or mixed: nothing in it can be trusted
            if not self.options.overwrite:
                raise
            table.clear()
            return
        if there is None or there.identity() == provenance.identity():
            return
        if not self.options.overwrite:
            raise UserError(
                f"the feature table {table.label} of {table.dataset} holds other vectors"
                f" ({there.difference(provenance)}); redo it by --overwrite, or remove {table.path}"
            )
        table.clear()

    def _write_failures(
        self, table: FeatureTable, modality: str, backbone: Backbone, failures: list[Failure]
    ) -> None:
        folder = self.warehouse.dataset_dir(self.info.name) / "failures"
        level = "" if table.level == POOLED else f"-{table.level}"
        path = folder / f"{table.backbone}-{modality}{level}.parquet"
        if not failures:
            path.unlink(missing_ok=True)
            return
        failures = sorted(failures, key=lambda failure: failure.item)
        item = pa.array([failure.item for failure in failures], pa.int32())
        constant = len(failures)
        columns = [
            item,
            self.items.ids.take(item).combine_chunks(),
            pa.array([modality] * constant),
            pa.array([backbone.name] * constant),
            pa.array([failure.stage for failure in failures]),
            pa.array([failure.reason for failure in failures]),
            pa.array([failure.source for failure in failures]),
        ]
        write_table(path, pa.Table.from_arrays(columns, schema=FAILURES_SCHEMA))


def provenance_of(backbone: Backbone, modality: str, options: Options) -> Provenance:
    """What a table of this modality by this backbone is made with."""
    pictures = IMAGE_PREPROCESSING + (
        f"; {DRAFT_PREPROCESSING}" if options.decode == "draft" else ""
    )
    words = f"at most {TEXT_MOST} characters"
    first = {
        "text": words, "video": describe_sampling(options.frames), "joint": f"{pictures}; {words}",
    }.get(modality, pictures)  # fmt: skip
    pooling = backbone.pooling(modality, options.level)
    pooled = options.level == POOLED
    return Provenance(
        backbone=backbone.name,
        checkpoint=backbone.checkpoint,
        preprocessing=f"{first}; {backbone.preprocessing(modality)}",
        pooling=f"{pooling}; mean over frames" if modality == "video" else pooling,
        modality=modality,
        level=options.level,
        compute=backbone.compute,
        dtype=options.dtype,
        dim=backbone.dim if pooled else backbone.token_dim(options.level, modality),
        libraries=backbone.libraries,
    )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
