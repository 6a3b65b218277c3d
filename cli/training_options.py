"""What ``mmrec train`` and ``mmrec pretrain`` share: beginning, going on, watching, ending."""

import shlex
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli import console
from features.errors import UserError
from features.warehouse import Warehouse

if TYPE_CHECKING:
    from trainer.loop import TrainProgress
    from trainer.runs.run import OpenRun, TrainReport

ModelOption = Annotated[str | None, typer.Option("--model", help="See mmrec models.")]
FeaturesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--features", help="MODALITY[=BACKBONE][:LEVEL]; repeatable. Else all pooled ones."
    ),
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="KEY=VALUE of a setting; repeatable.")
]
ConfigOption = Annotated[
    Path | None, typer.Option("--config", help="TOML file with settings; --set wins.")
]
NameOption = Annotated[str | None, typer.Option("--name", help="The new run's name.")]
InitOption = Annotated[
    str | None, typer.Option("--init", help="Start from the best weights of this run.")
]
TransferOption = Annotated[
    str | None,
    typer.Option("--transfer", help="With --init: full (all), items, users, text or image."),
]
TuneOption = Annotated[
    int | None,
    typer.Option(
        "--tune-blocks", min=0, help="Train so many upper blocks of backbones on layer-K tables."
    ),
]
ResumeOption = Annotated[
    bool, typer.Option("--resume", help="Go on with --run, else with the last run.")
]
RunOption = Annotated[str | None, typer.Option("--run", help="The run to resume.")]


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What the words of the command ask for."""

    warehouse: Warehouse
    root: Path | None
    """As given."""
    stage: str
    """``pretrain``, or empty."""
    model: str | None
    datasets: list[str]
    features: list[str] | None
    settings: list[str] | None
    config: Path | None
    name: str | None
    init: str | None
    transfer: str | None
    resume: bool
    run: str | None
    json: bool

    @property
    def command(self) -> str:
        """The command's name."""
        return self.stage or "train"


def with_blocks(settings: list[str] | None, count: int | None) -> list[str] | None:
    """The settings with ``--tune-blocks`` among them."""
    return settings if count is None else [*(settings or []), f"tune_blocks={count}"]


def run_training(request: Request) -> None:
    """Begin a run or go on with one, and train it; started by ``torchrun``, one of several.

    Raises:
        UserError: Something does not fit.
        typer.Exit: Code 130, the training was interrupted.
    """
    request = _settled(request)
    from trainer.distributed import on_rank_zero, process_group, process_rank

    with process_group():
        console.err.quiet = process_rank() > 0
        mine: list[OpenRun] = []

        def begin() -> Path:
            mine.append(_resumed(request) if request.resume else _begun(request))
            return mine[0].folder

        folder = on_rank_zero(begin)
        if not mine:
            from trainer.runs.run import open_run

            mine.append(open_run(request.warehouse, folder))
        _train(request, mine[0])


def _settled(request: Request) -> Request:
    """Choose dataset or run, and refuse what can be refused before torch is loaded."""
    from trainer.config import parse_settings
    from trainer.models.registry import find_model

    if request.resume:
        fresh = (
            request.features, request.settings, request.config, request.name, request.init,
            request.transfer,
        )  # fmt: skip
        if any(fresh):
            raise UserError(
                "--resume goes on with a run as it is;"
                " leave --features, --set, --config, --name, --init, --transfer out"
            )
        folder, why = request.warehouse.choose_run(request.run)
        if why != "given":
            console.notify(f"run: {folder.name} ({why})")
        return replace(request, run=folder.name)
    if request.run is not None:
        raise UserError("--run names a run to go on with; add --resume, or give --name")
    if request.model is None:
        raise UserError("give --model (see mmrec models), or --resume")
    if request.transfer is not None and request.init is None:
        raise UserError(f"--transfer {request.transfer} takes weights of a run; name it by --init")
    find_model(request.model)
    parse_settings(request.settings or [])
    given: list[str | None] = [*request.datasets] or [None]
    chosen = [request.warehouse.choose_dataset(name) for name in given]
    for name, why in chosen:
        if why != "given":
            console.notify(f"dataset: {name} ({why})")
    return replace(request, datasets=[name for name, _ in chosen])


def _begun(request: Request) -> "OpenRun":
    assert request.model is not None
    from trainer.runs.run import start_run

    features = request.features
    return start_run(
        request.warehouse,
        request.model,
        request.datasets,
        stage=request.stage,
        features=[part for entry in features for part in entry.split(",")] if features else None,
        file=request.config,
        settings=request.settings or [],
        name=request.name,
        init=request.init,
        transfer=request.transfer or "full",
    )


def _resumed(request: Request) -> "OpenRun":
    from trainer.runs.run import open_run

    folder, _ = request.warehouse.choose_run(request.run)
    opened = open_run(request.warehouse, folder)
    if opened.stage != request.stage:
        raise UserError(
            f"run {folder.name!r} is a {opened.stage or 'training'}; go on with it:"
            f" mmrec {opened.stage or 'train'} --resume --run {folder.name}"
        )
    dataset = "+".join(request.datasets) or None
    for given, held in ((request.model, opened.model_name), (dataset, opened.dataset)):
        if given is not None and given != held:
            raise UserError(f"run {folder.name!r} is of {held!r}, not {given!r}; choose by --run")
    return opened


def _describe(run: "OpenRun") -> None:
    """Say what is trained on what, how many items it knows by nothing, and where it began."""
    reads = f" with {', '.join(run.tables)}" if run.tables else ""
    console.notify(
        f"run {run.folder.name}: {run.model_name} on {run.dataset}{reads},"
        f" {run.parameters:,} parameters, {run.data.device}"
    )
    if run.tables:
        counts, bare = run.data.features.coverage()
        have = ", ".join(f"{modality} {count:,}" for modality, count in counts.items())
        console.notify(f"of {run.data.features.n_items:,} items: {have}, none of these {bare:,}")
    if run.stage:
        console.notify(f"validated on {run.task.split(run.config)}")
    if run.taken:
        for line in run.taken.lines():
            console.notify(line)


def _train(request: Request, run: "OpenRun") -> None:
    from trainer.distributed import process_rank
    from trainer.runs.run import train

    _describe(run)
    watch = TrainWatch()
    try:
        report = train(run, resume=request.resume, on_tick=watch)
    finally:
        watch.line.close()
    if request.json and process_rank() == 0:
        console.emit_json(asdict(report))
    if report.finished and not watch.called:
        console.notify(f"run {report.run} is finished already; nothing was trained{_best(report)}")
    elif report.finished:
        console.notify(f"finished: {_trained(report)}")
        if request.stage:
            console.notify(f"start from it: mmrec train --model {report.model} --init {report.run}")
    else:
        given = request.root
        here = f" --warehouse {shlex.quote(str(given))}" if given else ""
        console.notify(
            f"stopped: {_trained(report)};"
            f" go on with: mmrec {request.command} --resume --run {report.run}{here}"
        )
        raise typer.Exit(130)


class TrainWatch:
    """The live line of a training: losses, rate, time left; each validated epoch stays."""

    def __init__(self) -> None:
        self.line = console.ProgressLine()
        self.called = False

    def __call__(self, tick: "TrainProgress") -> None:
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
            left = console.format_duration(tick.left)
            self.line.update(f"{text}  step {tick.step}/{tick.steps}, {left} left in this epoch")


def _trained(report: "TrainReport") -> str:
    epochs = "1 epoch" if report.epochs == 1 else f"{report.epochs} epochs"
    return f"{epochs} in {console.format_duration(report.seconds)}{_best(report)}"


def _best(report: "TrainReport") -> str:
    if report.best_epoch < 0:
        return ", none validated yet"
    return f", best epoch {report.best_epoch} with {report.best:.4f} ({report.monitor})"
