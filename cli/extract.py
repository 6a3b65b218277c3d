"""``mmrec extract``: run the backbones of stage 1."""

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

from typer import Exit, Option

from cli import console
from cli.options import DatasetOption, JsonOption, WarehouseOption
from cli.prepare import run_prepare, show_prepared
from features.errors import UserError
from features.warehouse import Warehouse

if TYPE_CHECKING:
    from pipeline.extraction.estimate import ExtractionEstimate
    from pipeline.extraction.options import ExtractOptions
    from pipeline.extraction.reports import ExtractProgress, ExtractReport

OptionalStr = str | None
OptionalInt = int | None


def extract(
    dataset: DatasetOption = None,
    image: Annotated[OptionalStr, Option(help="Backbone for images.")] = None,
    text: Annotated[OptionalStr, Option(help="Backbone for texts.")] = None,
    video: Annotated[OptionalStr, Option(help="Backbone for videos, 1 frame a second.")] = None,
    joint: Annotated[OptionalStr, Option(help="Backbone for image and text together.")] = None,
    level: Annotated[str, Option(help="pooled, tokens, or layer-K: K blocks run.")] = "pooled",
    max_tokens: Annotated[
        OptionalInt, Option(help="Most tokens of a text; default: all that fit.")
    ] = None,
    mask_ratio: Annotated[
        float | None, Option(help="Share of the patches that mae-b does not see: 0.75.")
    ] = None,
    frames: Annotated[OptionalInt, Option(help="Evenly spread frames of a video.")] = None,
    decode: Annotated[str, Option(help="exact, or draft: scale JPEGs in decoding.")] = "exact",
    dtype: Annotated[str, Option(help="Type of a stored element: float16 or float32.")] = "float16",
    compute: Annotated[str, Option(help="Forward pass: float32 or bfloat16.")] = "float32",
    device: Annotated[
        OptionalStr, Option(help="cpu, cuda, ...; default: cuda if available.")
    ] = None,
    batch_size: Annotated[OptionalInt, Option(help="Inputs of a forward pass.")] = None,
    overwrite: Annotated[
        bool, Option("--overwrite", help="Extract a table again if its settings differ.")
    ] = False,
    strict: Annotated[bool, Option("--strict", help="Stop at the first unusable input.")] = False,
    engine: Annotated[str, Option(help="local, or ray: actors, here or on a cluster.")] = "local",
    workers: Annotated[OptionalInt, Option(help="Actors of --engine ray.")] = None,
    estimate: Annotated[
        bool, Option("--dry-run", help="Only estimate items, bytes and time from a short probe.")
    ] = False,
    json: JsonOption = False,
    root: WarehouseOption = None,
) -> None:
    """Encode every item once with frozen backbones and store the embeddings in Parquet.

    Without a backbone, CLIP ViT-B/32 encodes images and texts. Stored rows are reused. A dataset
    that is not prepared is prepared first.
    """
    from pipeline.extraction.options import ExtractOptions

    options = ExtractOptions(
        image=image, text=text, video=video, joint=joint, level=level, max_tokens=max_tokens,
        mask_ratio=mask_ratio, frames=frames, decode=decode, dtype=dtype, compute=compute,
        device=device, batch_size=batch_size, overwrite=overwrite, strict=strict, engine=engine,
        workers=workers,
    )  # fmt: skip
    warehouse = Warehouse(root)
    name = _prepared_dataset(warehouse, dataset, may_prepare=not estimate, show=not json)
    if estimate:
        estimates = run_estimate(warehouse, name, options)
        if json:
            console.emit_json({"dataset": name, "tables": [asdict(row) for row in estimates]})
        else:
            show_estimates(estimates)
    else:
        _extract(warehouse, name, options, json=json)


def _extract(warehouse: Warehouse, dataset: str, options: "ExtractOptions", *, json: bool) -> None:
    """Extract, and print the report; end the command with exit code 2 if it was in vain."""
    report = run_extract(warehouse, dataset, options)
    if json:
        console.emit_json(asdict(report))
    else:
        show_extracted(report)
    _check_inputs(report)


def _check_inputs(report: "ExtractReport") -> None:
    """End the command with exit code 2 if no input of a modality could be used."""
    useless = [
        row.modality
        for row in report.tables
        if row.failed and row.items == row.absent + sum(row.failed.values())
    ]
    if useless:
        console.notify(
            f"error: no input of {', '.join(useless)} could be used, see the reasons above; repair"
            " the files and run the command again"
        )
        raise Exit(2)


def _prepared_dataset(
    warehouse: Warehouse, dataset: str | None, *, may_prepare: bool, show: bool
) -> str:
    """Return the name of the dataset to extract; prepare it if necessary.

    Later commands that name no dataset mean the one that is named here, also if it fails.
    """
    if dataset is not None and may_prepare:
        _remember(warehouse, dataset)
    if dataset is not None and not warehouse.is_prepared(dataset):
        from pipeline.datasets.prepare import PrepareOptions
        from pipeline.datasets.registry import find_dataset

        find_dataset(warehouse.check_name(dataset))  # refuse an unknown name first
        if not may_prepare:
            raise UserError(
                f"dataset {dataset!r} is not prepared, and --dry-run writes nothing; run:"
                f" mmrec prepare --dataset {dataset}"
            )
        console.notify(f"preparing {dataset} from {warehouse.raw_dir(dataset)}")
        info = run_prepare(warehouse, PrepareOptions(dataset=dataset))
        if show:
            show_prepared(info)
    name, why = warehouse.choose_dataset(dataset)
    if why != "given":
        console.notify(f"dataset: {name} ({why})")
    return name


def _remember(warehouse: Warehouse, dataset: str) -> None:
    """Record the dataset; a name that nobody knows is refused later, and not recorded."""
    from pipeline.datasets.registry import DATASETS

    if warehouse.is_prepared(dataset) or dataset in DATASETS:
        warehouse.create()
        warehouse.remember_extracted(dataset)


def run_estimate(
    warehouse: Warehouse, dataset: str, options: "ExtractOptions"
) -> "list[ExtractionEstimate]":
    """Estimate an extraction; messages go to the terminal."""
    from pipeline.extraction.estimate import estimate_extraction

    return estimate_extraction(warehouse, dataset, options, notify=console.notify)


def run_extract(warehouse: Warehouse, dataset: str, options: "ExtractOptions") -> "ExtractReport":
    """Extract with a live line for each modality."""
    from pipeline.extraction.job import extract_features

    line = ExtractLine()
    try:
        return extract_features(warehouse, dataset, options, progress=line, notify=console.notify)
    finally:
        line.close()


def show_estimates(estimates: "list[ExtractionEstimate]") -> None:
    """Print the estimated cost of an extraction."""
    console.table(
        ["modality", "backbone", "level", "dim", "items", "absent", "rows", "tokens", "MB", "time"],
        [
            [
                row.modality, row.backbone, row.level, row.dim, row.items, row.absent, row.rows,
                None if row.tokens is None else f"{row.tokens:.1f}", f"{row.bytes / 1e6:.1f}",
                console.format_duration(row.seconds),
            ]
            for row in estimates
        ],
        transpose=True,
    )  # fmt: skip
    for row in estimates:
        failed = f", {row.failed} of them failed" if row.failed else ""
        console.notify(f"{row.modality}: from {row.probed} inputs{failed}; nothing was written")


def show_extracted(report: "ExtractReport") -> None:
    """Print the counts of an extraction and the reasons of failures."""
    levels = ["level"] if any(row.level != "pooled" for row in report.tables) else []
    console.table(
        ["modality", "backbone", *levels, "dim", "items", "encoded", "shared", "reused", "absent",
         "failed", "items/s", "MB"],
        [
            [
                row.modality, row.backbone, *[row.level for _ in levels], row.dim, row.items,
                row.encoded, row.shared, row.reused, row.absent, sum(row.failed.values()),
                f"{row.rate:.1f}", f"{row.bytes / 1e6:.1f}",
            ]
            for row in report.tables
        ],
        transpose=True,
    )  # fmt: skip
    for row in report.tables:
        for reason, count in row.failed.items():
            console.notify(f"failed: {row.modality}, {count} x {reason}")
        if row.partial:
            console.notify(f"partial: {row.partial} damaged videos, used up to the damage")


class ExtractLine:
    """Show the progress of an extraction on a live line: rate, time left and failures."""

    def __init__(self) -> None:
        self._line = console.ProgressLine()
        self._started: dict[str, tuple[float, int]] = {}
        self._finished: set[str] = set()

    def __call__(self, progress: "ExtractProgress") -> None:
        """Show the progress of one modality. Reused items do not count in the rate."""
        now = time.monotonic()
        started, first = self._started.setdefault(progress.modality, (now, progress.done))
        rate = (progress.done - first) / (now - started) if now > started else 0.0
        pace = ""
        if rate:
            left = console.format_duration((progress.total - progress.done) / rate)
            pace = f" {rate:,.1f}/s, {left} left,"
        text = (
            f"{progress.modality} by {progress.backbone}:"
            f" {progress.done:,} of {progress.total:,},{pace} {progress.failed} failed"
        )
        is_finished = progress.done >= progress.total
        if not (is_finished and progress.modality in self._finished):
            share = progress.done / max(1, progress.total)
            self._line.update(text, share=share, keep=is_finished)
        if is_finished:
            self._finished.add(progress.modality)

    def close(self) -> None:
        """End the live line."""
        self._line.close()
