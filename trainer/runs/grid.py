"""Running a grid: each combination is one run, named by its identity, so that it is found again."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from features.documents import write_json
from features.errors import UserError
from features.memory import free_memory, memory_errors
from features.schema import METRICS_SCHEMA
from features.table_files import table_file_writer
from features.warehouse import Warehouse
from trainer.config import SettingSources
from trainer.loop import TrainProgress
from trainer.runs.evaluate import evaluate
from trainer.runs.folder import stored_metrics
from trainer.runs.grid_file import Combination, Grid, setting_text
from trainer.runs.read import has_current_protocol
from trainer.runs.run import create_run, open_run, train_run
from trainer.runs.spec import InitialWeights, RunSpec
from trainer.runs.transfer import FULL

_DONE = "grid.json"  # written last: the run is trained to its end and evaluated


@dataclass(frozen=True, kw_only=True, slots=True)
class Planned:
    """A combination that can be run."""

    combination: Combination
    spec: RunSpec

    @property
    def run(self) -> str:
        """Name of its run, made of everything that decides the result."""
        return f"grid-{self.spec.digest()}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """The end of one combination."""

    planned: Planned
    state: str
    """``finished`` now, ``reused``, or ``failed``."""
    seconds: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)
    """The model's own rows of the evaluation, see :data:`features.schema.METRICS_SCHEMA`."""
    message: str = ""
    """The reason of a failure."""

    def repeated(self, split: str) -> float | None:
        """Return the share of repeated targets of a split; ``None`` if the run failed."""
        users = {row["targets"]: row["users"] for row in self.rows if row["split"] == split}
        return users.get("repeated", 0) / users["all"] if users.get("all") else None

    def values(self, split: str, seen: str) -> dict[str, float] | None:
        """Return metric to value over all targets of a split; ``None`` if the run failed."""
        chosen = {"split": split, "seen": seen, "targets": "all"}
        metrics = {
            row["metric"]: row["value"]
            for row in self.rows
            if all(row[key] == value for key, value in chosen.items())
        }
        return metrics or None


class Stopped(Exception):  # noqa: N818 - not an error
    """A run was interrupted; it is saved."""


def plan_grid(warehouse: Warehouse, grid: Grid) -> list[Planned]:
    """Describe the run of every combination, before the first one is started.

    Raises:
        UserError: A combination cannot be run; the line names the file and the combination.
    """
    planned = []
    for combination in grid.combinations:
        try:
            spec = _resolve(warehouse, combination)
        except UserError as error:
            raise UserError(f"{grid.path}, {combination.label}: {error}") from None
        planned.append(Planned(combination=combination, spec=spec))
    return planned


def is_done(warehouse: Warehouse, planned: Planned) -> bool:
    """Return True if the run has ended and has been evaluated."""
    return (warehouse.runs_dir / planned.run / _DONE).exists()


def is_begun(warehouse: Warehouse, planned: Planned) -> bool:
    """Return True if there is such a run, ended or not."""
    return (warehouse.runs_dir / planned.run / "config.toml").exists()


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
    """
    for number, combination in enumerate(planned):
        yield _run(warehouse, combination, partial(on_progress, number))


def write_result(path: Path, grid: Grid, outcomes: Sequence[Outcome]) -> None:
    """Write all metrics of all runs as one table, with a column for each axis.

    The format is Parquet, CSV or JSON Lines, by the ending of ``path``.
    """
    axes = list(grid.combinations[0].keys)
    rows = [
        {
            "model": outcome.planned.spec.model,
            "dataset": outcome.planned.spec.dataset,
            "features": outcome.planned.combination.features,
            **outcome.planned.combination.keys,
            "run": outcome.planned.run,
            **{key: row[key] for key in _MEASURED},
        }
        for outcome in outcomes
        for row in outcome.rows
    ]
    about = [(name, pa.string()) for name in dict.fromkeys(("model", "dataset", "features", *axes))]
    measured = [METRICS_SCHEMA.field(key) for key in _MEASURED]
    schema = pa.schema([*about, ("run", pa.string()), *measured])
    with table_file_writer(path, schema) as write:
        write(pa.Table.from_pylist(rows, schema=schema))


_MEASURED = ("split", "targets", "seen", "metric", "value", "low", "high", "users")


def _resolve(warehouse: Warehouse, combination: Combination) -> RunSpec:
    dataset, _ = warehouse.choose_dataset(combination.dataset)
    init = None
    if combination.init is not None:
        init = InitialWeights(run=combination.init, transfer=combination.transfer or FULL)
    pairs = [f"{key}={setting_text(value)}" for key, value in combination.settings.items()]
    return RunSpec.resolve(
        warehouse,
        combination.model,
        [dataset],
        features=None if combination.features is None else [combination.features],
        sources=SettingSources(preset=combination.preset, pairs=pairs),
        init=init,
    )


def _run(
    warehouse: Warehouse, planned: Planned, on_progress: Callable[[TrainProgress | str], None]
) -> Outcome:
    folder = warehouse.runs_dir / planned.run
    began = time.monotonic()
    if is_done(warehouse, planned) and has_current_protocol(folder):
        rows = _own_rows(folder, planned.spec.model)
        if rows:
            return Outcome(planned=planned, state="reused", rows=rows)
    try:
        with memory_errors(f"run {planned.run}", "give smaller settings, or free memory"):
            _train(warehouse, planned, folder, on_progress)
    except UserError as error:
        free_memory()  # for the next run
        return Outcome(planned=planned, state="failed", message=str(error))
    seconds = time.monotonic() - began
    return Outcome(
        planned=planned,
        state="finished",
        seconds=seconds,
        rows=_own_rows(folder, planned.spec.model),
    )


def _train(
    warehouse: Warehouse,
    planned: Planned,
    folder: Path,
    on_progress: Callable[[TrainProgress | str], None],
) -> None:
    resume = False
    if is_begun(warehouse, planned):
        run = open_run(warehouse, folder)
        resume = (folder / "resume.safetensors").exists()
    else:
        run = create_run(warehouse, planned.spec, name=planned.run)
    report = train_run(run, resume=resume, on_progress=on_progress)
    if not report.finished:
        raise Stopped
    evaluate(warehouse, run, index="faiss", on_stage=on_progress)
    write_json(folder / _DONE, planned.combination.keys)


def _own_rows(folder: Path, model: str) -> list[dict[str, Any]]:
    """Return the rows of the evaluation that are the model's own, not a reference's."""
    rows = stored_metrics(folder / "metrics.parquet", "remove the run's folder")
    return [row for row in rows if row["phase"] == "eval" and row["ranker"] == model]
