"""The options and the course of ``mmrec train`` and ``mmrec pretrain``."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from inspect import Parameter, Signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from cli import console
from cli.options import JsonOption, WarehouseOption, parse_size
from cli.training_lines import TrainWatch, announce, conclude
from features.errors import UserError
from features.warehouse import Warehouse
from trainer.tracking.registry import check_trackers

if TYPE_CHECKING:
    from trainer.runs.run import Run

ModelOption = Annotated[str | None, typer.Option("--model", help="Model; see mmrec models.")]
FeaturesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--features",
        help="Feature table MODALITY[=BACKBONE][:LEVEL]; repeatable. Default: all pooled tables.",
    ),
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Setting KEY=VALUE; repeatable.")
]
ConfigOption = Annotated[
    Path | None, typer.Option("--config", help="TOML file with settings; --set wins.")
]
PresetOption = Annotated[
    str | None,
    typer.Option("--preset", help="Preset of the model, see mmrec models MODEL; --config wins."),
]
NameOption = Annotated[str | None, typer.Option("--name", help="Name of the new run.")]
InitOption = Annotated[
    str | None, typer.Option("--init", help="Run whose best weights are the initial weights.")
]
TransferOption = Annotated[
    str | None,
    typer.Option(
        "--transfer",
        help="With --init: full (all weights), items, users, text, image or video.",
    ),
]
TuneOption = Annotated[
    str | None,
    typer.Option(
        "--tune-blocks",
        metavar="N|all",
        help="Upper blocks of backbones to train, on layer-K tables; all: those above the table.",
    ),
]
ControlOption = Annotated[
    str | None,
    typer.Option(
        "--control",
        help="Train a control without content: permute the rows of features, or random ones.",
    ),
]
ResumeOption = Annotated[
    bool, typer.Option("--resume", help="Continue --run, by default the last run.")
]
TrackOption = Annotated[
    list[str] | None,
    typer.Option(
        "--track",
        help="Show the training in tensorboard, wandb (offline) or mlflow (local); repeatable.",
    ),
]
RunOption = Annotated[str | None, typer.Option("--run", help="Run to resume.")]
MemoryOption = Annotated[
    str | None,
    typer.Option(
        "--memory",
        metavar="SIZE",
        help="Most memory of the training, such as 8GB; default: what is free.",
    ),
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Print what the training takes, and train nothing.")
]


@dataclass(frozen=True, kw_only=True, slots=True)
class NewRun:
    """The options that describe a new run; with ``--resume`` none of them is given."""

    features: FeaturesOption = None
    set: SetOption = None
    config: ConfigOption = None
    preset: PresetOption = None
    name: NameOption = None
    init: InitOption = None
    transfer: TransferOption = None
    tune_blocks: TuneOption = None
    control: ControlOption = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainOutput:
    """The options on how a training is checked and shown; they do not change it."""

    track: list[str]
    """Names of trackers."""
    json: bool
    memory: int | None = None
    """Most bytes that the training may take; ``None``: what is free."""
    is_dry_run: bool = False
    """Build the model, print the estimate, and stop."""

    def announce(self, run: "Run") -> None:
        """Print what is trained and what it takes; see :func:`cli.training_lines.announce`."""
        announce(run, memory=self.memory, is_dry_run=self.is_dry_run, json=self.json)


def training_command(
    summary: str, dataset_option: Any, *, is_pretraining: bool
) -> Callable[..., None]:
    """Return the function of ``mmrec train`` or ``mmrec pretrain``, with the options of both.

    Args:
        summary: Help text of the command.
        dataset_option: Annotation of ``--dataset``, of one dataset or of several.
        is_pretraining: True for ``mmrec pretrain``.
    """
    new_run = get_type_hints(NewRun, include_extras=True)

    def command(
        *,
        model: str | None,
        dataset: str | list[str] | None,
        resume: bool,
        run: str | None,
        track: list[str] | None,
        memory: str | None,
        dry_run: bool,
        json: bool,
        root: Path | None,
        **options: Any,
    ) -> None:
        new = NewRun(**options)
        datasets = [dataset] if isinstance(dataset, str) else dataset or []
        output = TrainOutput(
            track=track or [],
            json=json,
            memory=None if memory is None else parse_size(memory),
            is_dry_run=dry_run,
        )
        check_trackers(output.track)
        if resume:
            resume_training(
                root, run, model, datasets, new, is_pretraining=is_pretraining, output=output
            )
        else:
            check_no_run(run)
            start_training(root, model, datasets, new, is_pretraining=is_pretraining, output=output)

    annotations = {
        "model": ModelOption,
        "dataset": dataset_option,
        **new_run,
        "resume": ResumeOption,
        "run": RunOption,
        "track": TrackOption,
        "memory": MemoryOption,
        "dry_run": DryRunOption,
        "json": JsonOption,
        "root": WarehouseOption,
    }
    # Typer reads the options from the signature and its annotations.
    command.__doc__ = summary
    command.__annotations__ = annotations
    command.__dict__["__signature__"] = _signature(annotations)
    return command


def _signature(annotations: Mapping[str, Any]) -> Signature:
    """Return the signature of a command: optional options, given by name."""
    flags = ("resume", "dry_run", "json")
    return Signature(
        [
            Parameter(
                name,
                Parameter.KEYWORD_ONLY,
                default=False if name in flags else None,
                annotation=annotation,
            )
            for name, annotation in annotations.items()
        ]
    )


def start_training(
    root: Path | None,
    model: str | None,
    datasets: list[str],
    new: NewRun,
    *,
    is_pretraining: bool,
    output: TrainOutput,
) -> None:
    """Create a run and train it.

    Raises:
        UserError: An option does not fit.
        typer.Exit: Code 130 if the training was interrupted.
    """
    from trainer.models.registry import MODELS
    from trainer.setting_sources import SettingSources

    if model is None:
        raise UserError("give --model (see mmrec models), or --resume")
    if new.transfer is not None and new.init is None:
        raise UserError(f"--transfer {new.transfer} takes weights of a run; name it by --init")
    MODELS.find(model)
    pairs = list(new.set or [])
    if new.tune_blocks is not None:
        pairs.append(f"tune_blocks={new.tune_blocks}")
    if new.control is not None:
        pairs.append(f"control={new.control}")
    sources = SettingSources(preset=new.preset, file=new.config, pairs=pairs)
    sources.parsed_pairs()
    warehouse = Warehouse(root)
    wanted: list[str | None] = [*datasets]
    names = [_choose_dataset(warehouse, name) for name in wanted or [None]]

    def create() -> "Run":
        from trainer.runs.run import create_run, plan_run
        from trainer.runs.spec import InitialWeights, RunSpec
        from trainer.runs.transfer import FULL

        init = None
        if new.init is not None:
            init = InitialWeights(run=new.init, transfer=new.transfer or FULL)
        spec = RunSpec.resolve(
            warehouse,
            model,
            names,
            is_pretraining=is_pretraining,
            features=new.features,
            sources=sources,
            init=init,
        )
        if output.is_dry_run:
            run = plan_run(warehouse, spec)
            output.announce(run)
            return run
        return create_run(warehouse, spec, name=new.name, check=lambda run: output.announce(run))

    _train(warehouse, root, create, resume=False, output=output)


def resume_training(
    root: Path | None,
    name: str | None,
    model: str | None,
    datasets: list[str],
    new: NewRun,
    *,
    is_pretraining: bool,
    output: TrainOutput,
) -> None:
    """Continue a run.

    Raises:
        UserError: An option does not fit, or the run cannot be resumed.
        typer.Exit: Code 130 if the training was interrupted.
    """
    if new != NewRun():
        raise UserError(
            "--resume continues a run as it is;"
            " leave --features, --set, --config, --preset, --name, --init, --transfer,"
            " --tune-blocks, --control out"
        )
    warehouse = Warehouse(root)
    folder, reason = warehouse.choose_run(name)
    if reason != "given":
        console.notify(f"run: {folder.name} ({reason})")

    def reopen() -> "Run":
        from trainer.runs.run import open_run

        run = open_run(warehouse, folder)
        if run.spec.is_pretraining != is_pretraining:
            kind, command = ("pre-training", "pretrain") if run.spec.is_pretraining else (
                "training", "train"
            )  # fmt: skip
            raise UserError(
                f"run {folder.name!r} is a {kind}; continue it by:"
                f" mmrec {command} --resume --run {folder.name}"
            )
        dataset = "+".join(datasets) or None
        for given, own in ((model, run.spec.model), (dataset, run.spec.dataset)):
            if given is not None and given != own:
                raise UserError(
                    f"run {folder.name!r} is of {own!r}, not {given!r}; choose by --run"
                )
        output.announce(run)
        return run

    _train(warehouse, root, reopen, resume=True, output=output)


def check_no_run(run: str | None) -> None:
    """Refuse ``--run`` without ``--resume``."""
    if run is not None:
        raise UserError("--run names a run to resume; add --resume, or give --name")


def _choose_dataset(warehouse: Warehouse, name: str | None) -> str:
    chosen, reason = warehouse.choose_dataset(name)
    if reason != "given":
        console.notify(f"dataset: {chosen} ({reason})")
    return chosen


def _train(
    warehouse: Warehouse,
    root: Path | None,
    open_first: Any,
    *,
    resume: bool,
    output: TrainOutput,
) -> None:
    """Open a run in the first process and then in the others, and train it."""
    from trainer.distributed import on_rank_zero, process_group, process_rank
    from trainer.runs.run import open_run
    from trainer.runs.track import Tracking
    from trainer.runs.train import train_run

    with process_group():
        is_first = process_rank() == 0
        console.err.quiet = not is_first
        opened: list[Run] = []

        def first() -> Path:
            opened.append(open_first())
            return opened[0].folder

        folder = on_rank_zero(first)
        run = opened[0] if opened else open_run(warehouse, folder)
        if output.is_dry_run:
            return
        watch = TrainWatch()
        tracking = Tracking(run, output.track if is_first else [], console.notify)
        report = None
        try:
            report = train_run(run, resume=resume, on_epoch=tracking.log, on_progress=watch)
        finally:
            watch.line.close()
            tracking.finish(report)
        if output.json and is_first:
            console.emit_json(asdict(report))
        conclude(run, report, root, was_trained=watch.called)
