"""``mmrec extract``."""

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from cli import console
from cli.options import DatasetOption, JsonOption, WarehouseOption
from cli.prepare import run_prepare, show_prepared
from features.errors import UserError
from features.warehouse import Warehouse

if TYPE_CHECKING:
    from pipeline.extraction.estimate import Estimate
    from pipeline.extraction.options import Options
    from pipeline.extraction.reports import ExtractProgress, ExtractReport


def extract(
    dataset: DatasetOption = None,
    image: Annotated[
        str | None, typer.Option("--image", help="Backbone for pictures.", show_default=False)
    ] = None,
    text: Annotated[
        str | None, typer.Option("--text", help="Backbone for texts.", show_default=False)
    ] = None,
    video: Annotated[
        str | None, typer.Option("--video", help="Backbone for clips, 1 frame a second.")
    ] = None,
    joint: Annotated[
        str | None, typer.Option("--joint", help="Backbone for picture and text together.")
    ] = None,
    level: Annotated[
        str, typer.Option("--level", help="pooled, tokens, or layer-K: after block K.")
    ] = "pooled",
    frames: Annotated[
        int | None, typer.Option("--frames", help="Of a clip, evenly spread; else 1 a second.")
    ] = None,
    decode: Annotated[
        str, typer.Option("--decode", help="exact, or draft: scale large JPEGs in decoding.")
    ] = "exact",
    dtype: Annotated[
        str, typer.Option("--dtype", help="How an element is stored: float16 or float32.")
    ] = "float16",
    compute: Annotated[
        str, typer.Option("--compute", help="Forward pass: float32 or bfloat16.")
    ] = "float32",
    device: Annotated[
        str | None, typer.Option("--device", help="cpu or cuda; else what is there.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", help="Inputs to a forward pass.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Redo a table that was made in another way.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop at the first input that cannot be used.")
    ] = False,
    engine: Annotated[
        str, typer.Option("--engine", help="local, or ray: actors, here or on a cluster.")
    ] = "local",
    workers: Annotated[
        int | None, typer.Option("--workers", help="Actors of --engine ray.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what it would cost, after a short probe.")
    ] = False,
    json: JsonOption = False,
    root: WarehouseOption = None,
) -> None:
    """Run frozen backbones once over every item and keep the embeddings in Parquet.

    Without a backbone: CLIP ViT-B/32 for pictures and texts. What is already there is not encoded
    again; a dataset that is not prepared yet is prepared first.
    """
    from pipeline.extraction.options import Options

    options = Options(
        image=image,
        text=text,
        video=video,
        joint=joint,
        level=level,
        frames=frames,
        decode=decode,
        dtype=dtype,
        compute=compute,
        device=device,
        batch_size=batch_size,
        overwrite=overwrite,
        strict=strict,
        engine=engine,
        workers=workers,
    )
    warehouse = Warehouse(root)
    if dataset is not None and not warehouse.is_prepared(dataset):
        from pipeline.datasets.prepare import PrepareOptions
        from pipeline.datasets.registry import find_dataset

        find_dataset(warehouse.check_name(dataset))  # refuse an unknown name first
        if dry_run:
            raise UserError(
                f"{dataset} is not prepared, and a dry run writes nothing; run: mmrec prepare"
                f" --dataset {dataset}"
            )
        console.notify(
            f"{dataset} is not prepared yet: preparing it from {warehouse.raw_dir(dataset)}"
        )
        info = run_prepare(warehouse, PrepareOptions(dataset=dataset))
        if not json:
            show_prepared(info)
    name, why = warehouse.choose_dataset(dataset)
    if why != "given":
        console.notify(f"dataset: {name} ({why})")
    if dry_run:
        from pipeline.extraction.estimate import estimate

        estimates = estimate(warehouse, name, options, notify=console.notify)
        if json:
            console.emit_json({"dataset": name, "tables": [asdict(one) for one in estimates]})
        else:
            show_estimates(estimates)
        return
    report = run_extract(warehouse, name, options)
    if json:
        console.emit_json(asdict(report))
        return
    show_extracted(report)


def run_extract(warehouse: Warehouse, dataset: str, options: "Options") -> "ExtractReport":
    """Extract with a live line for each modality."""
    from pipeline.extraction.job import extract as run

    watch = ExtractWatch()
    try:
        return run(warehouse, dataset, options, progress=watch, notify=console.notify)
    finally:
        watch.line.close()


def show_estimates(estimates: "list[Estimate]") -> None:
    """Print what an extraction would cost."""
    console.table(
        ["modality", "backbone", "level", "dim", "items", "absent", "rows", "tokens", "MB", "time"],
        [
            [
                one.modality, one.backbone, one.level, one.dim, one.items, one.absent, one.rows,
                None if one.tokens is None else f"{one.tokens:.1f}", f"{one.bytes / 1e6:.1f}",
                console.format_duration(one.seconds),
            ]
            for one in estimates
        ],
        transpose=True,
    )  # fmt: skip
    for one in estimates:
        failed = f", of which {one.failed} could not be used" if one.failed else ""
        console.notify(f"{one.modality}: from {one.probed} inputs{failed}; nothing was written")


def show_extracted(report: "ExtractReport") -> None:
    """Print what an extraction did, and why inputs failed."""
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
            console.notify(f"partial: {row.partial} damaged clips were used up to the damage")


class ExtractWatch:
    """The live line of an extraction: rate, time left, failures so far."""

    def __init__(self) -> None:
        self.line = console.ProgressLine()
        self._began: dict[str, tuple[float, int]] = {}
        self._ended: set[str] = set()

    def __call__(self, state: "ExtractProgress") -> None:
        """Show how far one modality is; what was reused does not count for the rate."""
        now = time.monotonic()
        began, first = self._began.setdefault(state.modality, (now, state.done))
        rate = (state.done - first) / (now - began) if now > began else 0.0
        pace = ""
        if rate:
            left = console.format_duration((state.total - state.done) / rate)
            pace = f" {rate:,.1f}/s, {left} left,"
        text = (
            f"{state.modality} by {state.backbone}:"
            f" {state.done:,} of {state.total:,},{pace} {state.failed} failed"
        )
        ended = state.done >= state.total
        if not (ended and state.modality in self._ended):
            self.line.update(text, share=state.done / max(1, state.total), keep=ended)
        if ended:
            self._ended.add(state.modality)
