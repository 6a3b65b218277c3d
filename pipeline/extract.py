"""The extraction job: every item's picture, text and clip through a frozen backbone, once.

Inputs are read once: the bytes that are hashed are the bytes that are decoded. Reading, decoding
and tokenising run in threads ahead of the model; vectors go to the table in parts. What is already
there for the same content is reused, and identical content is encoded once. An input that cannot
be used becomes a row of ``failures``; it is tried again by the next run.
"""

import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from features.dataset import load_items
from features.errors import UserError, unknown
from features.files import lock, write_table
from features.schema import FAILURES, MODALITIES
from features.store import FeatureStore, FeatureTable, Provenance
from features.warehouse import DatasetInfo, Warehouse
from pipeline.backbones import check_modality, load_backbone, wrong_modality
from pipeline.backends.contract import Backbone, UnavailableError
from pipeline.encode import Encoder, Failure, Tally
from pipeline.ledger import Ledger
from pipeline.media import PREPROCESSING as OF_PICTURES
from pipeline.media import Media, quiet
from pipeline.plan import choose, count, present
from pipeline.video import PREPROCESSING as OF_CLIPS

DTYPES = ("float16", "float32")
COMPUTES = ("float32", "bfloat16")
SECONDS_A_TICK = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class ModalityReport:
    """What became of one modality's items: all of them are in exactly one of the counts."""

    modality: str
    backbone: str
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
class Progress:
    """How far one modality is; given to the callback some times a second, and at its end."""

    modality: str
    backbone: str
    done: int
    total: int
    """Items that have this modality."""
    encoded: int
    failed: int


def extract(
    warehouse: Warehouse,
    dataset: str,
    *,
    image: str | None = None,
    text: str | None = None,
    video: str | None = None,
    dtype: str = "float16",
    batch_size: int | None = None,
    device: str | None = None,
    compute: str = "float32",
    overwrite: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> ExtractReport:
    """Encode a prepared dataset; run again, it does only what is missing or has changed.

    Args:
        warehouse: Where the dataset is and its tables go.
        dataset: Name of a prepared dataset.
        image: Backbone for pictures (see :mod:`pipeline.backbones`).
        text: Backbone for texts.
        video: Backbone for clips; it sees their frames, and their vectors are averaged. When none
            of the three is given: CLIP ViT-B/32 for pictures and texts, as far as there are any.
        dtype: How the vectors are stored: ``float16`` or ``float32``.
        batch_size: Pictures, frames or texts of a forward pass; 32 on a CPU, 256 on a GPU.
        device: Where the model runs; a CUDA device when there is one, else the CPU.
        compute: Arithmetic of the forward pass: ``float32`` or ``bfloat16`` (autocast).
        overwrite: Redo a table whose vectors were made otherwise (another checkpoint, dtype, ...)
            instead of refusing.
        progress: Called with the state of the job.

    Raises:
        UserError: The dataset is not prepared, has nothing of a modality, its raw files are gone,
            a backbone is unknown, unreachable or of the wrong kind, or a table holds vectors of
            another provenance.
    """
    _one_of("dtype", dtype, DTYPES)
    _one_of("compute", compute, COMPUTES)
    if batch_size is not None and batch_size < 1:
        raise UserError(f"batch size {batch_size} is too small; give 1 or more")
    info = warehouse.info(dataset)
    items = load_items(warehouse, dataset, ["item_id", *MODALITIES])
    wanted = choose(info.name, items, {"image": image, "text": text, "video": video})
    if set(wanted) - {"text"} and not Path(info.raw).is_dir():
        raise UserError(
            f"the raw files of {dataset} are no longer in {info.raw}; put them back or run:"
            f" mmrec prepare --dataset {dataset} --raw DIR"
        )
    # All models first: a missing one should not show after hours of work with another.
    models: dict[str, Backbone] = {}
    for modality, name in wanted.items():
        check_modality(name, modality)
        if name not in models:
            try:
                models[name] = load_backbone(name, device=device, compute=compute)
            except UnavailableError as error:
                same = " ".join(f"--{key} hashed" for key in wanted if wanted[key] == name)
                raise UserError(f"{error}, or {same}, which has no weights") from None
        if modality not in models[name].modalities:
            raise wrong_modality(name, models[name].modalities, modality)
    job = _Job(
        warehouse=warehouse, info=info, items=items, dtype=dtype, batch_size=batch_size,
        overwrite=overwrite, progress=progress,
    )  # fmt: skip
    with quiet():
        reports = [job.run(modality, models[name]) for modality, name in wanted.items()]
    return ExtractReport(dataset=dataset, tables=tuple(reports))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Job:
    """What the extractions of one command have in common."""

    warehouse: Warehouse
    info: DatasetInfo
    items: pa.Table
    dtype: str
    batch_size: int | None
    overwrite: bool
    progress: Callable[[Progress], None] | None

    def run(self, modality: str, backbone: Backbone) -> ModalityReport:
        """Extract one modality into its table."""
        dataset = self.info.name
        table = FeatureStore(self.warehouse).table(dataset, backbone.name, modality)
        with lock(table.path / ".lock", f"the feature table {table.label} of {dataset}"):
            return self._run(modality, backbone, table)

    def _run(self, modality: str, backbone: Backbone, table: FeatureTable) -> ModalityReport:
        provenance = _provenance(backbone, modality, self.dtype)
        self._check_provenance(table, provenance)
        started = time.monotonic()
        column = self.items[modality]
        total = count(column)
        last = 0.0

        def report(tally: Tally) -> None:
            nonlocal last
            now = time.monotonic()
            if self.progress is None or (now - last < SECONDS_A_TICK and tally.done < total):
                return
            last = now
            self.progress(
                Progress(
                    modality=modality,
                    backbone=backbone.name,
                    done=tally.done,
                    total=total,
                    encoded=tally.encoded,
                    failed=len(tally.failures),
                )
            )

        ledger = Ledger(table, provenance, self.items["item_id"])
        media = Media(Path(self.info.raw), self.warehouse.dataset_dir(self.info.name))
        encoder = Encoder(
            backbone=backbone,
            modality=modality,
            dtype=self.dtype,
            ledger=ledger,
            media=media,
            batch_size=self.batch_size or backbone.batch_size,
            threads=_cores(),
            report=report,
        )
        try:
            encoder.run(present(column))
            # Before the table is complete: then both are of the same run.
            self._write_failures(table, modality, backbone, encoder.tally.failures)
            ledger.finish(self.info.fingerprint, self.info.inputs[modality])
        except BaseException:
            ledger.flush()  # an interrupt or a crash loses nothing that was encoded
            raise  # the failures of the last whole run stay; all are tried again by the next
        finally:
            media.close()
        seconds = time.monotonic() - started
        tally = encoder.tally
        return ModalityReport(
            modality=modality,
            backbone=backbone.name,
            dim=backbone.dim,
            items=len(column),
            encoded=tally.encoded,
            shared=tally.shared,
            reused=tally.reused,
            absent=len(column) - total,
            failed=dict(Counter(failure.reason for failure in tally.failures).most_common()),
            partial=tally.partial,
            seconds=seconds,
            rate=tally.encoded / seconds if seconds else 0.0,
            bytes=sum(part.stat().st_size for part in table.parts()),
            path=str(table.path),
        )

    def _check_provenance(self, table: FeatureTable, provenance: Provenance) -> None:
        """Refuse to mix, and to throw hours of work away because of one option."""
        try:
            there = table.provenance()
        except UserError:  # damaged or mixed: nothing in it can be trusted
            if not self.overwrite:
                raise
            table.clear()
            return
        if there is None or there.identity() == provenance.identity():
            return
        if not self.overwrite:
            raise UserError(
                f"the feature table {table.label} of {table.dataset} holds other vectors"
                f" ({there.difference(provenance)}); redo it by --overwrite, or remove {table.path}"
            )
        table.clear()

    def _write_failures(
        self, table: FeatureTable, modality: str, backbone: Backbone, failures: list[Failure]
    ) -> None:
        folder = self.warehouse.dataset_dir(self.info.name) / "failures"
        path = folder / f"{table.backbone}-{modality}.parquet"
        if not failures:
            path.unlink(missing_ok=True)
            return
        failures = sorted(failures, key=lambda failure: failure.item)
        item = pa.array([failure.item for failure in failures], pa.int32())
        constant = len(failures)
        columns = [
            item,
            self.items["item_id"].take(item).combine_chunks(),
            pa.array([modality] * constant),
            pa.array([backbone.name] * constant),
            pa.array([failure.stage for failure in failures]),
            pa.array([failure.reason for failure in failures]),
            pa.array([failure.source for failure in failures]),
        ]
        write_table(path, pa.Table.from_arrays(columns, schema=FAILURES))


def _provenance(backbone: Backbone, modality: str, dtype: str) -> Provenance:
    first = {"image": OF_PICTURES, "video": OF_CLIPS, "text": ""}[modality]
    steps = [step for step in (first, backbone.preprocessing(modality)) if step]
    pooling = backbone.pooling(modality)
    return Provenance(
        backbone=backbone.name,
        checkpoint=backbone.checkpoint,
        preprocessing="; ".join(steps),
        pooling=f"{pooling}; mean over frames" if modality == "video" else pooling,
        modality=modality,
        level="pooled",
        compute=backbone.compute,
        dtype=dtype,
        dim=backbone.dim,
        libraries=backbone.libraries,
    )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _one_of(what: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise unknown(what, value, list(known))
