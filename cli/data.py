"""``mmrec datasets``, ``prepare``, ``backbones`` and ``extract``: stage 1."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli import show
from cli.options import DatasetOption, JsonOption, WarehouseOption
from features.errors import UserError
from features.warehouse import DatasetInfo, Warehouse

if TYPE_CHECKING:
    from pipeline.dry import Estimate
    from pipeline.options import Options
    from pipeline.reports import ExtractReport, Progress

_WIDE = 144  # columns that a list of backbones takes with all there is to say of each


def datasets(json: JsonOption = False, warehouse: WarehouseOption = None) -> None:
    """List the known datasets: where their raw files are expected, and what is prepared."""
    from pipeline.prepare import describe

    rows = describe(Warehouse(warehouse))
    if json:
        show.emit_json(rows)
        return
    show.table(
        ["dataset", "raw files", "prepared", "users", "items", "interactions", "k-core"],
        [
            [
                row["dataset"], "there" if row["raw_found"] else "-",
                "damaged" if row["damaged"] else row["prepared"],
                row["users"], row["items"], row["interactions"], row["k_core"],
            ]
            for row in rows
        ],
    )  # fmt: skip
    show.out.print("\nwhere the raw files are looked for (another folder: --raw), and their source")
    for row in rows:
        files = "; ".join(map(_role, row["expected"].items()))
        show.out.print(f"  {row['dataset']} ({row['format']}): {row['raw']}", markup=False)
        show.out.print(f"    {files or 'as prepared'}", markup=False)
        show.out.print(f"    from {row['source']}", markup=False)


def _role(entry: tuple[str, list[str]]) -> str:
    role, names = entry
    return f"{role}: {' or '.join(names)}"


def prepare(
    dataset: Annotated[str, typer.Option("--dataset", help="A known dataset, or a new name.")],
    raw: Annotated[Path | None, typer.Option("--raw", help="Folder of the raw files.")] = None,
    name: Annotated[
        str | None,
        typer.Option("--name", help="What it is called here, to keep several preparations."),
    ] = None,
    k_core: Annotated[
        int | None,
        typer.Option("--k-core", help="Users and items keep at least this many; 0: all."),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option("--format", help="Importer of a dataset of your own: see the README."),
    ] = None,
    file: Annotated[
        list[str] | None,
        typer.Option("--file", help="ROLE=PATH of a raw file, relative to --raw; repeatable."),
    ] = None,
    unlisted: Annotated[
        str,
        typer.Option(help="Interactions with items that are not listed: refuse, keep or drop."),
    ] = "refuse",
    json: JsonOption = False,
    warehouse: WarehouseOption = None,
) -> None:
    """Read raw files, apply the k-core, order by time, and write the canonical tables."""
    house = Warehouse(warehouse)
    info = run_prepare(house, dataset, raw, k_core, format, file, unlisted, name)
    if json:
        show.emit_json(info.summary())
    else:
        show_prepared(info)


def run_prepare(
    house: Warehouse,
    dataset: str,
    raw: Path | None = None,
    k_core: int | None = None,
    format: str | None = None,
    file: list[str] | None = None,
    unlisted: str = "refuse",
    name: str | None = None,
) -> DatasetInfo:
    """Prepare a dataset; files are ``role=path``."""
    from pipeline.prepare import prepare as run

    files = {}
    for entry in file or []:
        role, equals, path = entry.partition("=")
        if not equals:
            raise UserError(f"--file {entry!r} must look like ROLE=PATH, such as items=items.csv")
        files[role] = path
    return run(
        house,
        dataset,
        to=name,
        raw=raw,
        k_core=k_core,
        format=format,
        files=files,
        unlisted=unlisted,
        say=show.say,
    )


def show_prepared(info: DatasetInfo) -> None:
    """Print what a prepared dataset holds."""
    figures = info.summary()
    show.table(
        ["dataset", "users", "items", "interactions", "average length", "sparsity", "k-core"],
        [
            [
                info.name, info.users, info.items, info.interactions,
                f"{figures['average_length']:.2f}", f"{figures['sparsity']:.4%}", info.k_core,
            ]
        ],
    )  # fmt: skip


def backbones(json: JsonOption = False) -> None:
    """List the frozen backbones by short name."""
    from pipeline.backbones import list_backbones

    rows = list_backbones()
    if json:
        show.emit_json(rows)
        return
    heads = ["name", "takes", "dim", "layers", "library", "offline"]
    facts = [
        [row["name"], " ".join(row["modalities"]), row["dim"], _layers(row["blocks"]),
         row["library"], row["offline"]]
        for row in rows
    ]  # fmt: skip
    origins = [_origin(row["checkpoint"], row["licence"]) for row in rows]
    if show.out.width < _WIDE:
        show.table(heads, facts)
        heads, facts = ["name"], [[row["name"]] for row in rows]
    lines = []
    for fact, (first, *more) in zip(facts, origins, strict=True):
        lines += [[*fact, *first], *([""] * len(heads) + origin for origin in more)]
    show.table([*heads, "checkpoint", "licence"], lines)
    for note in dict.fromkeys(row["note"] for row in rows if row["note"]):
        show.say(f"{', '.join(row['name'] for row in rows if row['note'] == note)}: {note}")
    show.say("levels: pooled, tokens, layer-K; of clips, and of pairs by two towers, pooled alone")
    show.say("beside these: open_clip:ARCH/TAG, hf:ORG/NAME, or a local folder with a saved model")


def _layers(blocks: int) -> str | None:
    return f"1-{blocks - 1}" if blocks else None


def _origin(checkpoint: str, licence: str) -> list[list[str]]:
    """One line for each checkpoint that a backbone is made of."""
    first, *more = checkpoint.split(" + ")
    return [[first, licence], *([f"+ {one}", ""] for one in more)]


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
    warehouse: WarehouseOption = None,
) -> None:
    """Run frozen backbones once over every item and keep the embeddings in Parquet.

    Without a backbone: CLIP ViT-B/32 for pictures and texts. What is already there is not encoded
    again; a dataset that is not prepared yet is prepared first.
    """
    from pipeline.options import Options

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
    house = Warehouse(warehouse)
    if dataset is not None and not house.is_prepared(dataset):
        from pipeline.datasets import plan

        plan(house.check_name(dataset), None)  # a name that nobody knows is refused first
        if dry_run:
            raise UserError(
                f"{dataset} is not prepared, and a dry run writes nothing; run: mmrec prepare"
                f" --dataset {dataset}"
            )
        show.say(f"{dataset} is not prepared yet: preparing it from {house.raw_dir(dataset)}")
        info = run_prepare(house, dataset)
        if not json:
            show_prepared(info)
    name, why = house.choose_dataset(dataset)
    if why != "given":
        show.say(f"dataset: {name} ({why})")
    if dry_run:
        from pipeline.dry import estimate

        estimates = estimate(house, name, options, say=show.say)
        if json:
            show.emit_json({"dataset": name, "tables": [asdict(one) for one in estimates]})
        else:
            show_estimates(estimates)
        return
    report = run_extract(house, name, options)
    if json:
        show.emit_json(asdict(report))
        return
    show_extracted(report)


def run_extract(house: Warehouse, dataset: str, options: "Options") -> "ExtractReport":
    """Extract with a live line for each modality."""
    from pipeline.extract import extract as run

    watch = ExtractWatch()
    try:
        return run(house, dataset, options, progress=watch, say=show.say)
    finally:
        watch.line.close()


def show_estimates(estimates: "list[Estimate]") -> None:
    """Print what an extraction would cost."""
    show.sheet(
        ["modality", "backbone", "level", "dim", "items", "absent", "rows", "tokens", "MB", "time"],
        [
            [
                one.modality, one.backbone, one.level, one.dim, one.items, one.absent, one.rows,
                None if one.tokens is None else f"{one.tokens:.1f}", f"{one.bytes / 1e6:.1f}",
                show.seconds(one.seconds),
            ]
            for one in estimates
        ],
    )  # fmt: skip
    for one in estimates:
        failed = f", of which {one.failed} could not be used" if one.failed else ""
        show.say(f"{one.modality}: from {one.probed} inputs{failed}; nothing was written")


def show_extracted(report: "ExtractReport") -> None:
    """Print what an extraction did, and why inputs failed."""
    levels = ["level"] if any(row.level != "pooled" for row in report.tables) else []
    show.sheet(
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
    )  # fmt: skip
    for row in report.tables:
        for reason, count in row.failed.items():
            show.say(f"failed: {row.modality}, {count} x {reason}")
        if row.partial:
            show.say(f"partial: {row.partial} damaged clips were used up to the damage")


class ExtractWatch:
    """The live line of an extraction: rate, time left, failures so far."""

    def __init__(self) -> None:
        self.line = show.Line()
        self._began: dict[str, tuple[float, int]] = {}
        self._ended: set[str] = set()

    def __call__(self, state: "Progress") -> None:
        """Show how far one modality is; what was reused does not count for the rate."""
        now = time.monotonic()
        began, first = self._began.setdefault(state.modality, (now, state.done))
        rate = (state.done - first) / (now - began) if now > began else 0.0
        pace = ""
        if rate:
            left = show.seconds((state.total - state.done) / rate)
            pace = f" {rate:,.1f}/s, {left} left,"
        bar = show.bar(state.done, state.total)
        tail = f"{state.done:,} of {state.total:,},{pace} {state.failed} failed"
        text = show.fit(f"{state.modality} by ", state.backbone, bar, tail)
        ended = state.done >= state.total
        if not (ended and state.modality in self._ended):
            self.line.update(text, keep=ended)
        if ended:
            self._ended.add(state.modality)
