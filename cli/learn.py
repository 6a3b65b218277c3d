"""``mmrec models``, ``train`` and ``eval``: stage 2."""

import shlex
import textwrap
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import show
from cli.options import DatasetOption, JsonOption, WarehouseOption
from features.errors import UserError, unknown
from features.warehouse import Warehouse

if TYPE_CHECKING:
    from trainer.evaluate import EvalReport
    from trainer.loop import Tick
    from trainer.run import OpenRun, TrainReport


def models(json: JsonOption = False) -> None:
    """List the recommenders and their settings for --set."""
    from trainer.config import TrainConfig
    from trainer.models import MODELS

    documents: list[dict[str, Any]] = []
    for name, model in MODELS.items():
        settings, _ = model.load()
        documents.append(
            {
                "model": name,
                "summary": model.summary,
                "settings": {field.name: field.default for field in fields(settings)},
                "train": dict(model.train),
            }
        )
    loop = {field.name: field.default for field in fields(TrainConfig)}
    if json:
        show.emit_json({"models": documents, "train": loop})
        return
    for entry in documents:
        show.out.print(f"{entry['model']}: {entry['summary']}", markup=False)
        show.out.print(_settings({**entry["settings"], **entry["train"]}), markup=False)
    show.out.print("the loop, for all of them where they do not say otherwise:", markup=False)
    show.out.print(_settings(loop), markup=False)


def _settings(values: dict[str, Any]) -> str:
    words = [f"{key}={value}" for key, value in values.items()]
    return textwrap.fill(" ".join(words), 79, initial_indent="  ", subsequent_indent="  ")


def train(
    model: Annotated[str | None, typer.Option("--model", help="See mmrec models.")] = None,
    dataset: DatasetOption = None,
    features: Annotated[
        list[str] | None,
        typer.Option("--features", help="MODALITY or MODALITY=BACKBONE; repeatable. Else all."),
    ] = None,
    set: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE of a setting; repeatable.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="TOML file with settings; --set wins.")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="The new run's name.")] = None,
    init: Annotated[
        str | None, typer.Option("--init", help="Start from the best weights of this run.")
    ] = None,
    transfer: Annotated[
        str | None,
        typer.Option("--transfer", help="With --init: full (all), items, users, text or image."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with --run, else with the last run.")
    ] = False,
    run: Annotated[str | None, typer.Option("--run", help="The run to resume.")] = None,
    json: JsonOption = False,
    warehouse: WarehouseOption = None,
) -> None:
    """Train a recommender on interactions and features; Ctrl-C keeps all and ends with 130."""
    house = Warehouse(warehouse)
    if resume:
        fresh = (features, set, config, name, init, transfer)
        opened = _resumed(house, run, model, dataset, *fresh)
    elif run is not None:
        raise UserError("--run names a run to go on with; add --resume, or give --name")
    elif model is None:
        raise UserError("give --model (see mmrec models), or --resume")
    elif transfer is not None and init is None:
        raise UserError(f"--transfer {transfer} takes weights of a run; name it by --init")
    else:
        opened = _begun(
            house, model, dataset, features or [], set or [], config, name, init, transfer
        )
    from trainer.run import train as go

    _describe(opened)
    watch = TrainWatch()
    try:
        report = go(opened, resume=resume, on_tick=watch)
    finally:
        watch.line.close()
    if json:
        show.emit_json(asdict(report))
    if report.finished and not watch.called:
        show.say(f"run {report.run} is finished already; nothing was trained{_best(report)}")
    elif report.finished:
        show.say(f"finished: {_trained(report)}")
    else:
        here = f" --warehouse {shlex.quote(str(warehouse))}" if warehouse else ""
        show.say(
            f"stopped: {_trained(report)};"
            f" go on with: mmrec train --resume --run {report.run}{here}"
        )
        raise typer.Exit(130)


def _begun(
    house: Warehouse,
    model: str,
    dataset: str | None,
    features: list[str],
    settings: list[str],
    config: Path | None,
    name: str | None,
    init: str | None,
    transfer: str | None,
) -> "OpenRun":
    from trainer.config import parse_settings
    from trainer.models import find_model

    # What can be refused without torch is refused before it is loaded.
    find_model(model)
    parse_settings(settings)
    chosen, why = house.choose_dataset(dataset)
    if why != "given":
        show.say(f"dataset: {chosen} ({why})")
    from trainer.run import start_run

    split = [part for entry in features for part in entry.split(",")] if features else None
    return start_run(
        house,
        model,
        chosen,
        features=split,
        file=config,
        settings=settings,
        name=name,
        init=init,
        transfer=transfer or "full",
    )


def _resumed(
    house: Warehouse, run: str | None, model: str | None, dataset: str | None, *fresh: Any
) -> "OpenRun":
    if any(fresh):
        raise UserError(
            "--resume goes on with a run as it is;"
            " leave --features, --set, --config, --name, --init, --transfer out"
        )
    folder, why = house.choose_run(run)
    if why != "given":
        show.say(f"run: {folder.name} ({why})")
    from trainer.run import open_run

    opened = open_run(house, folder)
    for given, held in ((model, opened.model_name), (dataset, opened.dataset)):
        if given is not None and given != held:
            raise UserError(f"run {folder.name!r} is of {held!r}, not {given!r}; choose by --run")
    return opened


def _describe(run: "OpenRun") -> None:
    """Say what is trained on what, and how many items it knows by nothing."""
    reads = f" with {', '.join(run.tables)}" if run.tables else ""
    show.say(
        f"run {run.folder.name}: {run.model_name} on {run.dataset}{reads},"
        f" {run.parameters:,} parameters, {run.data.device}"
    )
    if run.tables:
        counts, bare = run.data.features.coverage()
        have = ", ".join(f"{modality} {count:,}" for modality, count in counts.items())
        show.say(f"of {run.data.features.n_items:,} items: {have}, none of these {bare:,}")
    if run.taken:
        for line in run.taken.lines():
            show.say(line)


class TrainWatch:
    """The live line of a training: loss, rate, time left; each validated epoch stays."""

    def __init__(self) -> None:
        self.line = show.Line()
        self.called = False

    def __call__(self, tick: "Tick") -> None:
        """Show one report of the loop."""
        self.called = True
        losses = "".join(f"  {name} {value:.4f}" for name, value in tick.parts.items())
        text = (
            f"epoch {tick.epoch}/{tick.epochs}  loss {tick.loss:.4f}{losses}"
            f"  {tick.rate:,.0f} {tick.unit}/s"
        )
        if tick.metrics:
            figures = "  ".join(f"{name} {value:.4f}" for name, value in tick.metrics.items())
            text += f"  validation {figures}  best epoch {tick.best_epoch}"
            self.line.update(text, keep=True)
        else:
            left = show.seconds(tick.left)
            self.line.update(f"{text}  step {tick.step}/{tick.steps}, {left} left in this epoch")


def _trained(report: "TrainReport") -> str:
    return f"{report.epochs} epochs in {show.seconds(report.seconds)}{_best(report)}"


def _best(report: "TrainReport") -> str:
    if report.best_epoch < 0:
        return ", none validated yet"
    return f", best epoch {report.best_epoch} with {report.best:.4f} ({report.monitor})"


def evaluate(
    index: Annotated[str, typer.Option("--index", help="What ranks the catalogue.")] = "faiss",
    run: Annotated[str | None, typer.Option("--run", help="Else the last one.")] = None,
    json: JsonOption = False,
    warehouse: WarehouseOption = None,
) -> None:
    """Rank every held-out target of a run in the full catalogue, validation and test."""
    from retrieval.indexes import INDEXES

    if index not in INDEXES:
        raise unknown("index", index, list(INDEXES))
    house = Warehouse(warehouse)
    folder, why = house.choose_run(run)
    if why != "given":
        show.say(f"run: {folder.name} ({why})")
    report = run_evaluate(house, folder, index)
    if json:
        show.emit_json(asdict(report))
    else:
        show_evaluated(report)


def run_evaluate(house: Warehouse, folder: Path, index: str) -> "EvalReport":
    """Evaluate a run, telling on one live line what is being done."""
    from trainer.evaluate import evaluate as go
    from trainer.run import open_run

    line = show.Line(every=0.0)
    try:
        return go(house, open_run(house, folder), index=index, on_stage=line.update)
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
