"""``mmrec models``, ``train`` and ``eval``: stage 2."""

import textwrap
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import show
from cli.options import DatasetOption, DeviceOption, JsonOption, WarehouseOption
from cli.training import (
    ConfigOption,
    FeaturesOption,
    InitOption,
    ModelOption,
    NameOption,
    Request,
    ResumeOption,
    RunOption,
    SetOption,
    TransferOption,
    TuneOption,
    run_training,
    with_blocks,
)
from features.errors import UserError, unknown
from features.warehouse import Warehouse

if TYPE_CHECKING:
    from trainer.evaluate import EvalReport

_PROTOCOLS = ("ranking", "retrieval")


def models(json: JsonOption = False) -> None:
    """List the recommenders and their settings for --set."""
    from trainer.config import TrainConfig
    from trainer.models import MODELS
    from trainer.pretrain import pretrain_defaults

    documents: list[dict[str, Any]] = []
    for name, model in MODELS.items():
        settings, recommender = model.load()
        own = {field.name: field.default for field in fields(settings)}
        documents.append(
            {
                "model": name,
                "summary": model.summary,
                "settings": own,
                "train": dict(model.train),
                "pretrain": pretrain_defaults(model),
                "transfers": ["full", *recommender.parts],
                "variants": dict(model.variants),
            }
        )
    loop = {field.name: field.default for field in fields(TrainConfig)}
    if json:
        show.emit_json({"models": documents, "train": loop})
        return
    for entry in documents:
        show.out.print(f"{entry['model']}: {entry['summary']}", markup=False)
        show.out.print(_settings({**entry["settings"], **entry["train"]}), markup=False)
        if entry["pretrain"]:
            show.out.print("  mmrec pretrain:", markup=False)
            show.out.print(_settings(entry["pretrain"], "    "), markup=False)
        show.out.print(f"  --transfer: {', '.join(entry['transfers'])}", markup=False)
        for what, words in entry["variants"].items():
            show.out.print(f"  {what}: {words}", markup=False)
    show.out.print("the loop, for all of them where they do not say otherwise:", markup=False)
    show.out.print(_settings(loop), markup=False)


def _settings(values: dict[str, Any], indent: str = "  ") -> str:
    from trainer.grid import text

    words = [f"{key}={text(value)}" for key, value in values.items()]
    return textwrap.fill(" ".join(words), 79, initial_indent=indent, subsequent_indent=indent)


def train(
    model: ModelOption = None,
    dataset: DatasetOption = None,
    features: FeaturesOption = None,
    set: SetOption = None,
    config: ConfigOption = None,
    name: NameOption = None,
    init: InitOption = None,
    transfer: TransferOption = None,
    tune_blocks: TuneOption = None,
    resume: ResumeOption = False,
    run: RunOption = None,
    json: JsonOption = False,
    warehouse: WarehouseOption = None,
) -> None:
    """Train a recommender on interactions and features; Ctrl-C keeps all and ends with 130."""
    run_training(
        Request(
            house=Warehouse(warehouse),
            warehouse=warehouse,
            stage="",
            model=model,
            datasets=[] if dataset is None else [dataset],
            features=features,
            settings=with_blocks(set, tune_blocks),
            config=config,
            name=name,
            init=init,
            transfer=transfer,
            resume=resume,
            run=run,
            json=json,
        )
    )


def evaluate(
    index: Annotated[str, typer.Option("--index", help="What ranks the catalogue.")] = "faiss",
    run: Annotated[str | None, typer.Option("--run", help="Else the last one.")] = None,
    protocol: Annotated[
        str,
        typer.Option("--protocol", help="ranking: held-out targets; retrieval: text to vision."),
    ] = "ranking",
    dataset: Annotated[
        str | None, typer.Option("--dataset", help="With retrieval: the items of another dataset.")
    ] = None,
    device: DeviceOption = None,
    json: JsonOption = False,
    warehouse: WarehouseOption = None,
) -> None:
    """Rank every held-out target of a run in the full catalogue, validation and test."""
    from retrieval.indexes import INDEXES

    if index not in INDEXES:
        raise unknown("index", index, list(INDEXES))
    if protocol not in _PROTOCOLS:
        raise unknown("protocol", protocol, list(_PROTOCOLS))
    if dataset is not None and protocol == "ranking":
        raise UserError(f"--dataset {dataset} goes with --protocol retrieval; a run has its own")
    house = Warehouse(warehouse)
    folder, why = house.choose_run(run)
    if why != "given":
        show.say(f"run: {folder.name} ({why})")
    if protocol == "retrieval":
        _retrieve(house, folder, dataset, device, json)
        return
    report = run_evaluate(house, folder, index, device)
    if json:
        show.emit_json(asdict(report))
    else:
        show_evaluated(report)


def _retrieve(
    house: Warehouse, folder: Path, dataset: str | None, device: str | None, json: bool
) -> None:
    from trainer.evaluate_retrieval import evaluate_retrieval
    from trainer.run import open_run

    line = show.Line(every=0.0)
    try:
        run = open_run(house, folder, device)
        report = evaluate_retrieval(house, run, dataset=dataset, on_stage=line.update)
    finally:
        line.close()
    if json:
        show.emit_json(asdict(report))
        return
    reads = ", ".join(report.features)
    show.out.print(f"run {report.run}: {report.model}, {reads}; {report.dataset}", markup=False)
    cells = {(r["split"], r["targets"], r["metric"], r["ranker"]): r for r in report.rows}
    rankers = list(dict.fromkeys(r["ranker"] for r in report.rows))
    metrics = list(dict.fromkeys(r["metric"] for r in report.rows))
    groups = dict.fromkeys((r["split"], r["targets"], r["users"]) for r in report.rows)
    for split, direction, queries in groups:
        show.out.print()
        show.table(
            ["metric", *rankers],
            [[m, *(_interval(cells[split, direction, m, r]) for r in rankers)] for m in metrics],
            title=f"{split}, {direction}: {queries:,} items",
        )
    show.out.print()
    for text in report.protocol:
        show.out.print(f"  {text}", markup=False)


def run_evaluate(
    house: Warehouse, folder: Path, index: str, device: str | None = None
) -> "EvalReport":
    """Evaluate a run, telling on one live line what is being done."""
    from trainer.evaluate import evaluate as go
    from trainer.run import open_run

    line = show.Line(every=0.0)
    try:
        return go(house, open_run(house, folder, device), index=index, on_stage=line.update)
    finally:
        line.close()


def show_evaluated(report: "EvalReport") -> None:
    """Print the metrics with both rankings side by side, the reference, and the protocol."""
    reads = f", {', '.join(report.features)}" if report.features else ""
    show.out.print(
        f"run {report.run}: {report.model} on {report.dataset}{reads}; index {report.index}",
        markup=False,
    )
    cells = {
        (r["split"], r["targets"], r["metric"], r["ranker"], r["seen"]): r for r in report.rows
    }
    groups = dict.fromkeys((r["split"], r["targets"], r["users"]) for r in report.rows)
    metrics = list(dict.fromkeys(r["metric"] for r in report.rows))
    columns = [(r, s) for r in (report.model, "popularity") for s in ("masked", "unmasked")]
    shown: dict[str, Callable[[dict[str, Any]], Any]] = {
        report.model: _interval,
        "popularity": lambda row: row["value"],
    }
    for split, targets, users in groups:
        kind = "" if targets == "all" else ", cold targets only"
        show.out.print()
        show.table(
            ["metric", *(f"{ranker}\n{seen}" for ranker, seen in columns)],
            [
                [metric, *(shown[c[0]](cells[split, targets, metric, *c]) for c in columns)]
                for metric in metrics
            ],
            title=f"{split}{kind}: {users:,} users",
        )
    show.out.print()
    for line in report.protocol:
        show.out.print(f"  {line}", markup=False)


def _interval(row: dict[str, Any]) -> str:
    low, high = (f"{row[key]:.4f}".removeprefix("0") for key in ("low", "high"))
    return f"{row['value']:.4f} [{low}, {high}]"
