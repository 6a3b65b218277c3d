"""Running a grid: each combination is one run, named by its identity, so that it is found again.

The pre-trainings of a grid are runs of the same kind, and all combinations share them.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from features.documents import write_json
from features.errors import UserError
from features.memory import free_memory, memory_errors
from features.schema import METRICS_SCHEMA
from features.signals import raise_received
from features.table_files import table_file_writer
from features.warehouse import Warehouse
from trainer.loop import EpochRow, TrainProgress
from trainer.runs.evaluate import evaluate
from trainer.runs.evaluate_cross_modal import evaluate_retrieval
from trainer.runs.folder import stored_metrics
from trainer.runs.grid_axes import RANKERS, RETRIEVAL, Combination
from trainer.runs.grid_cells import Overrides, resolve_combination, resolve_pretraining
from trainer.runs.grid_file import Grid
from trainer.runs.read import has_current_protocol
from trainer.runs.run import Run, create_run, open_run
from trainer.runs.spec import InitialWeights, RunSpec
from trainer.runs.train import TrainReport, train_run
from trainer.runs.transfer import FULL

_DONE = "grid.json"  # written last: the run is trained to its end and evaluated


@dataclass(frozen=True, kw_only=True, slots=True)
class Planned:
    """A combination that can be run."""

    combination: Combination
    spec: RunSpec
    """Description of the run; without initial weights while the pre-training has not ended."""
    pretraining: RunSpec | None = None
    """The pre-training that the run waits for; ``None`` if there is none or if it has ended."""
    retrieved: str = ""
    """Dataset whose items are retrieved by the pre-training that ``spec`` describes; empty for a
    run that ranks held-out targets."""

    @property
    def dataset(self) -> str:
        """Name of the dataset that the run is evaluated on."""
        return self.retrieved or self.spec.dataset

    @property
    def run(self) -> str:
        """Name of its run, made of everything that decides the result; empty while it waits."""
        return "" if self.pretraining is not None else run_name(self.spec)


def run_name(spec: RunSpec) -> str:
    """Return the name of a run of a grid.

    The name has the model and a hash of everything that decides the result; ``mmrec runs`` and
    ``mmrec compare`` print the settings that differ. A pre-training has a name of its own: its
    settings can be those of a run on the same dataset.
    """
    suffix = "-pretrain" if spec.is_pretraining else ""
    return f"grid-{spec.model}-{spec.digest()}{suffix}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """The end of one combination."""

    planned: Planned
    """The combination, with the initial weights of its pre-training."""
    number: int
    """Position of the combination in the grid."""
    state: str
    """``finished`` now, ``reused``, or ``failed``."""
    seconds: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)
    """The model's own rows of the evaluation, see :data:`features.schema.METRICS_SCHEMA`."""
    message: str = ""
    """The reason of a failure."""

    def cell_values(self, grid: Grid) -> dict[str, float] | None:
        """Return metric to value for the table of a grid; ``None`` if the run has none.

        Retrieval by the vectors of the backbones has none unless both sides have the same width.
        """
        if not self.planned.retrieved:
            return self.values(grid.split, grid.seen, grid.targets)
        ranker = self.planned.combination.ranker
        name = self.planned.spec.model if ranker == RANKERS[0] else ranker
        metrics = {
            row["metric"]: row["value"]
            for row in self.rows
            if (row["targets"], row["ranker"]) == (grid.targets, name)
        }
        return metrics or None

    def repeated(self, split: str) -> float | None:
        """Return the share of repeated targets of a split; ``None`` if the run failed."""
        users = {row["targets"]: row["users"] for row in self.rows if row["split"] == split}
        return users.get("repeated", 0) / users["all"] if users.get("all") else None

    def values(self, split: str, seen: str, targets: str = "all") -> dict[str, float] | None:
        """Return metric to value over a subset of a split's targets.

        ``None`` if the run failed, or if the subset is empty.
        """
        if targets == "new" and self.repeated(split) == 0:
            targets = "all"  # the same targets, stored once
        chosen = {"split": split, "seen": seen, "targets": targets}
        metrics = {
            row["metric"]: row["value"]
            for row in self.rows
            if all(row[key] == value for key, value in chosen.items())
        }
        return metrics or None


class Stopped(Exception):  # noqa: N818 - not an error
    """A run was interrupted; it is saved."""


def plan_grid(
    warehouse: Warehouse, grid: Grid, overrides: Overrides | None = None
) -> list[Planned]:
    """Describe the run of every combination, before the first one is started.

    Args:
        warehouse: Warehouse with the datasets and the runs.
        grid: The grid.
        overrides: What the command changes in every run.

    Raises:
        UserError: A combination cannot be run; the line names the file and the combination.
    """
    overrides = overrides or Overrides()
    planned = []
    for combination in grid.combinations:
        try:
            plan = _plan_retrieval if grid.protocol == RETRIEVAL else _plan
            planned.append(plan(warehouse, combination, overrides))
        except UserError as error:
            raise UserError(f"{grid.path}, {combination.label}: {error}") from None
    overrides.check(grid.combinations)
    return planned


def _plan(warehouse: Warehouse, combination: Combination, overrides: Overrides) -> Planned:
    spec = resolve_combination(warehouse, combination, overrides)
    if combination.pretraining is None:
        spec.check_given_weights()
        return Planned(combination=combination, spec=spec)
    pretraining = resolve_pretraining(warehouse, combination, spec.dataset, overrides)
    planned = Planned(combination=combination, spec=spec, pretraining=pretraining)
    folder = warehouse.runs_dir / run_name(pretraining)
    return _with_weights(warehouse, planned) if (folder / _DONE).exists() else planned


def _plan_retrieval(
    warehouse: Warehouse, combination: Combination, overrides: Overrides
) -> Planned:
    """Describe the pre-training of a combination, which is evaluated itself."""
    dataset, _ = warehouse.choose_dataset(combination.dataset)
    spec = resolve_pretraining(warehouse, combination, dataset, overrides)
    return Planned(combination=combination, spec=spec, retrieved=dataset)


def _with_weights(warehouse: Warehouse, planned: Planned) -> Planned:
    """Return a combination with the initial weights of its pre-training, which has ended."""
    assert planned.pretraining is not None
    init = InitialWeights(
        run=run_name(planned.pretraining), transfer=planned.combination.transfer or FULL
    )
    spec = planned.spec.with_init(warehouse, init)
    return replace(planned, spec=spec, pretraining=None)


def next_commands(grid: Grid, outcomes: Sequence[Outcome]) -> dict[str, str]:
    """Return dataset to the command that the grid names to type next, with the names of its runs.

    Of several seeds, the first one counts. Datasets without all of the runs are left out.
    """
    runs: dict[str, dict[str, str]] = {}
    for outcome in outcomes:
        if outcome.state != "failed":
            of_dataset = runs.setdefault(outcome.planned.dataset, {})
            for value in outcome.planned.combination.keys.values():
                of_dataset.setdefault(value, outcome.planned.run)
    commands = {}
    for dataset, names in runs.items():
        command = grid.then
        for value, run in names.items():
            command = command.replace(f"{{{value}}}", run)
        if command and "{" not in command:
            commands[dataset] = command
    return commands


def is_done(warehouse: Warehouse, planned: Planned) -> bool:
    """Return True if the run has ended and has been evaluated."""
    return bool(planned.run) and (warehouse.runs_dir / planned.run / _DONE).exists()


def is_begun(warehouse: Warehouse, planned: Planned) -> bool:
    """Return True if there is such a run, ended or not."""
    return bool(planned.run) and _exists(warehouse, planned.run)


def _exists(warehouse: Warehouse, run: str) -> bool:
    return (warehouse.runs_dir / run / "config.toml").exists()


def run_grid(
    warehouse: Warehouse,
    planned: Sequence[Planned],
    *,
    on_progress: Callable[[int, TrainProgress | str], None] = lambda number, progress: None,
) -> Iterator[Outcome]:
    """Run what has not ended yet, one run after another; a failed run does not stop the others.

    Args:
        warehouse: Warehouse of the runs; finished runs of any grid are reused. Those that were
            evaluated by an earlier protocol are evaluated again.
        planned: The result of :func:`plan_grid`.
        on_progress: Called with the combination's number and its progress.

    Yields:
        An outcome for each combination, in order.

    Raises:
        Stopped: A training was interrupted; everything is saved.
        Interrupted: A signal was received between or after trainings; everything is saved.
    """
    for number, combination in enumerate(planned):
        yield _run(warehouse, number, combination, partial(on_progress, number))


def write_result(path: Path, grid: Grid, outcomes: Sequence[Outcome]) -> None:
    """Write all metrics of all runs as one table, with a column for each axis.

    The format is Parquet, CSV or JSON Lines, by the ending of ``path``.
    """
    axes = list(grid.combinations[0].keys)
    rows = [
        {
            "model": outcome.planned.spec.model,
            "dataset": outcome.planned.dataset,
            "features": outcome.planned.combination.features,
            "control": outcome.planned.spec.control.kind,
            **outcome.planned.combination.keys,
            "run": outcome.planned.run,
            **{key: row[key] for key in _MEASURED},
        }
        for outcome in outcomes
        for row in outcome.rows
    ]
    columns = ("model", "dataset", "features", "control", *axes)
    about = [(name, pa.string()) for name in dict.fromkeys(columns)]
    measured = [METRICS_SCHEMA.field(key) for key in _MEASURED]
    schema = pa.schema([*about, ("run", pa.string()), *measured])
    with table_file_writer(path, schema) as write:
        write(pa.Table.from_pylist(rows, schema=schema))


_MEASURED = ("split", "targets", "seen", "metric", "value", "low", "high", "users")


def _run(
    warehouse: Warehouse,
    number: int,
    planned: Planned,
    on_progress: Callable[[TrainProgress | str], None],
) -> Outcome:
    began = time.monotonic()
    try:
        with memory_errors(
            f"run {number + 1} of the grid", "give smaller settings, or free memory"
        ):
            if planned.retrieved:
                return _retrieve(warehouse, number, planned, on_progress)
            if planned.pretraining is not None:
                _pretrain(warehouse, planned.pretraining, on_progress)
                planned = _with_weights(warehouse, planned)
            folder = warehouse.runs_dir / planned.run
            if is_done(warehouse, planned) and has_current_protocol(folder):
                rows = _own_rows(folder, planned.spec.model)
                if rows:
                    return Outcome(planned=planned, number=number, state="reused", rows=rows)
            _train(warehouse, planned, folder, on_progress)
    except UserError as error:
        free_memory()  # for the next run
        return Outcome(planned=planned, number=number, state="failed", message=str(error))
    return Outcome(
        planned=planned,
        number=number,
        state="finished",
        seconds=time.monotonic() - began,
        rows=_own_rows(folder, planned.spec.model),
    )


def _retrieve(
    warehouse: Warehouse,
    number: int,
    planned: Planned,
    on_progress: Callable[[TrainProgress | str], None],
) -> Outcome:
    """Pre-train once, and evaluate the pre-training by retrieval; nothing is stored of it.

    On the dataset of the pre-training, the items are those that it holds out.
    """
    began = time.monotonic()
    is_reused = is_done(warehouse, planned)
    _pretrain(warehouse, planned.spec, on_progress)
    run = open_run(warehouse, warehouse.runs_dir / planned.run)
    is_own = planned.spec.datasets == (planned.retrieved,)
    dataset = None if is_own else planned.retrieved
    report = evaluate_retrieval(warehouse, run, dataset=dataset, on_stage=on_progress)
    return Outcome(
        planned=planned,
        number=number,
        state="reused" if is_reused else "finished",
        seconds=time.monotonic() - began,
        rows=[row for row in report.rows if row["split"] != "validation"],
    )


def _pretrain(
    warehouse: Warehouse, spec: RunSpec, on_progress: Callable[[TrainProgress | str], None]
) -> None:
    """Pre-train once; an ended pre-training is reused."""
    folder = warehouse.runs_dir / run_name(spec)
    if not (folder / _DONE).exists():
        on_progress(f"pre-training on {spec.dataset}")
        train_to_end(warehouse, spec, folder, on_progress=on_progress)
        write_json(folder / _DONE, {"pretrain": spec.dataset})


def _train(
    warehouse: Warehouse,
    planned: Planned,
    folder: Path,
    on_progress: Callable[[TrainProgress | str], None],
) -> None:
    run, _ = train_to_end(warehouse, planned.spec, folder, on_progress=on_progress)
    evaluate(warehouse, run, index="faiss", on_stage=on_progress)
    write_json(folder / _DONE, planned.combination.keys)


def train_to_end(
    warehouse: Warehouse,
    spec: RunSpec,
    folder: Path,
    *,
    on_epoch: Callable[[EpochRow], None] = lambda row: None,
    on_progress: Callable[[TrainProgress], None],
) -> tuple[Run, TrainReport]:
    """Create a run, or continue it, and train it to its end.

    Args:
        warehouse: Warehouse of the run.
        spec: The run.
        folder: Its folder, which may exist.
        on_epoch: Called with each finished epoch, see :func:`trainer.runs.train.train_run`.
        on_progress: Called after each step.

    Raises:
        Stopped: The training was interrupted.
        Interrupted: A signal was received, and the training ended all the same.
    """
    resume = False
    if _exists(warehouse, folder.name):
        run = open_run(warehouse, folder)
        resume = (folder / "resume.safetensors").exists()
    else:
        run = create_run(warehouse, spec, name=folder.name)
    report = train_run(run, resume=resume, on_epoch=on_epoch, on_progress=on_progress)
    if not report.finished:
        raise Stopped
    raise_received()  # a signal while the last epoch is saved does not stop the training
    return run, report


def _own_rows(folder: Path, model: str) -> list[dict[str, Any]]:
    """Return the rows of the evaluation that are the model's own, not a reference's."""
    rows = stored_metrics(folder / "metrics.parquet", "remove the run's folder")
    return [row for row in rows if row["phase"] == "eval" and row["ranker"] == model]
