"""Running a grid: each combination is one run, named by its identity, so that it is found again."""

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from features.atomic_files import lock, write_json, write_table
from features.dataset import load_dataset
from features.errors import UserError
from features.schema import METRICS_SCHEMA
from features.store import FeatureStore, FeatureTable
from features.warehouse import Warehouse
from trainer.config import build
from trainer.data.feature_tables import choose_tables
from trainer.identity import RunIdentity
from trainer.loop import TrainProgress
from trainer.models.registry import find_model
from trainer.runs.evaluate import evaluate
from trainer.runs.folder import held_metrics
from trainer.runs.grid_file import Combination, Grid, text
from trainer.runs.run import open_run, start_run, train
from trainer.runs.transfer import FULL, check_source, check_transfer, hash_tensors, read_source

_DONE = "grid.json"  # written last: trained to the end, and evaluated


@dataclass(frozen=True, kw_only=True, slots=True)
class Planned:
    """A combination that can be run, and the name of its run."""

    combination: Combination
    dataset: str
    features: list[str] | None
    settings: list[str]
    weights: str | None
    """Hash of those that it starts from."""
    run: str
    """Made of all that decides the result: model, settings, dataset, content of the features, and
    the weights that it starts from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What became of one combination."""

    planned: Planned
    state: str
    """``finished`` now, ``reused``, or ``failed``."""
    seconds: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Of its evaluation, see :data:`features.schema.METRICS_SCHEMA`; only the model's own."""
    message: str = ""
    """Why it failed."""

    def values(self, split: str, seen: str) -> dict[str, float] | None:
        """Metric -> value over all targets of a split; nothing if it failed."""
        chosen = {"split": split, "seen": seen, "targets": "all"}
        found = {
            row["metric"]: row["value"]
            for row in self.rows
            if all(row[key] == value for key, value in chosen.items())
        }
        return found or None


class Stopped(Exception):  # noqa: N818 - it is no error
    """A run was interrupted; it is saved."""


def plan_grid(warehouse: Warehouse, grid: Grid) -> list[Planned]:
    """Check every combination before the first one is run, and name the runs.

    Raises:
        UserError: One cannot be run; the line names the file and the combination.
    """
    known = _Known(warehouse)
    planned = []
    for one in grid.combinations:
        try:
            planned.append(_plan(warehouse, one, known))
        except UserError as error:
            raise UserError(f"{grid.path}, {one.label}: {error}") from None
    return planned


def is_done(warehouse: Warehouse, planned: Planned) -> bool:
    """Whether the run has ended and has been evaluated."""
    return (warehouse.runs_dir / planned.run / _DONE).exists()


def is_begun(warehouse: Warehouse, planned: Planned) -> bool:
    """Whether there is such a run, ended or not."""
    return (warehouse.runs_dir / planned.run / "config.toml").exists()


def run_grid(
    warehouse: Warehouse,
    planned: Sequence[Planned],
    *,
    on_tick: Callable[[int, TrainProgress | str], None] = lambda number, tick: None,
) -> Iterator[Outcome]:
    """Run what has not ended yet, one after another; a run that fails does not stop the others.

    Args:
        warehouse: Where runs go; finished ones of any grid are reused.
        planned: What :func:`plan_grid` gave.
        on_tick: Told the combination's number and what is being done.

    Yields:
        An outcome for each combination, in order.

    Raises:
        Stopped: A training was interrupted; all is kept.
    """
    for number, one in enumerate(planned):
        yield _run(warehouse, one, partial(on_tick, number))


def write_result(path: Path, grid: Grid, outcomes: Sequence[Outcome]) -> None:
    """Write all metrics of all runs as one Parquet table, a column for each axis."""
    axes = list(grid.combinations[0].keys)
    rows = [
        {
            "model": outcome.planned.combination.model,
            "dataset": outcome.planned.dataset,
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
    write_table(path, pa.Table.from_pylist(rows, schema=schema), compression="zstd")


_MEASURED = ("split", "targets", "seen", "metric", "value", "low", "high", "users")


class _Known:
    """What many combinations share, read once."""

    def __init__(self, warehouse: Warehouse) -> None:
        self.warehouse = warehouse
        self.interactions: dict[str, str] = {}
        self.tables: dict[Path, dict[str, Any]] = {}
        self.weights: dict[Path, str] = {}

    def digest(self, dataset: str) -> str:
        if dataset not in self.interactions:
            self.interactions[dataset] = load_dataset(self.warehouse, dataset).digest()
        return self.interactions[dataset]

    def content(self, table: FeatureTable) -> dict[str, Any]:
        if table.path not in self.tables:
            info = self.warehouse.info(table.dataset)
            table.check(info.fingerprint, info.inputs_of(table.modality))
            made = table.provenance()
            identity = {} if made is None else made.identity()
            self.tables[table.path] = {**identity, "content": table.digest()}
        return self.tables[table.path]

    def start(self, one: Combination) -> dict[str, str]:
        """The run whose weights a combination starts from, and what these are."""
        source, _ = self.warehouse.choose_run(one.init)
        transfer = one.transfer or FULL
        check_transfer(transfer, find_model(one.model).load()[1])
        check_source(source, one.model)
        if source not in self.weights:
            self.weights[source] = hash_tensors(read_source(source)[0])
        return {"run": source.name, "transfer": transfer, "weights": self.weights[source]}


def _plan(warehouse: Warehouse, one: Combination, known: _Known) -> Planned:
    entry = find_model(one.model)
    dataset, _ = warehouse.choose_dataset(one.dataset)
    settings = [f"{key}={text(value)}" for key, value in one.settings.items()]
    config_class, _ = entry.load()
    configs = build(config_class, None, settings, entry.train)
    features = None
    if one.features is not None and entry.needs_features:
        features = [name.strip() for name in one.features.split(",")]
    tables = []
    if entry.needs_features:
        tables = choose_tables(FeatureStore(warehouse), dataset, features)
    start = None if one.init is None else known.start(one)
    identity = RunIdentity(
        recommender=one.model,
        dataset=dataset,
        items=warehouse.info(dataset).fingerprint,
        interactions=known.digest(dataset),
        features=[known.content(table) for table in tables],
        configs=configs,
        init=start,
    )
    return Planned(
        combination=one,
        dataset=dataset,
        features=[table.label for table in tables] if entry.needs_features else None,
        settings=settings,
        weights=None if start is None else start["weights"],
        run=f"grid-{identity.digest()}",
    )


def _run(
    warehouse: Warehouse, one: Planned, on_tick: Callable[[TrainProgress | str], None]
) -> Outcome:
    folder = warehouse.runs_dir / one.run
    began = time.monotonic()
    if is_done(warehouse, one):
        rows = _evaluated(folder)
        if rows:
            return Outcome(planned=one, state="reused", rows=rows)
    beside = warehouse.runs_dir / f".{one.run}.lock"
    try:
        with lock(beside, f"run {one.run}"):
            if folder.exists() and not is_begun(warehouse, one):
                shutil.rmtree(folder)  # killed when it began: nobody else holds the lock
            _train(warehouse, one, folder, on_tick)
            beside.unlink(missing_ok=True)
    except UserError as error:
        return Outcome(planned=one, state="failed", message=str(error))
    seconds = time.monotonic() - began
    return Outcome(planned=one, state="finished", seconds=seconds, rows=_evaluated(folder))


def _train(
    warehouse: Warehouse, one: Planned, folder: Path, on_tick: Callable[[TrainProgress | str], None]
) -> None:
    resume = False
    if is_begun(warehouse, one):
        run = open_run(warehouse, folder)
        resume = (folder / "resume.safetensors").exists()
    else:
        run = start_run(
            warehouse,
            one.combination.model,
            one.dataset,
            features=one.features,
            settings=one.settings,
            name=one.run,
            init=one.combination.init,
            transfer=one.combination.transfer or FULL,
            weights=one.weights,
        )
    report = train(run, resume=resume, on_tick=on_tick)
    if not report.finished:
        raise Stopped
    evaluate(warehouse, run, index="faiss", on_stage=on_tick)
    write_json(folder / _DONE, one.combination.keys)


def _evaluated(folder: Path) -> list[dict[str, Any]]:
    rows = held_metrics(folder / "metrics.parquet", "remove the run's folder")
    return [row for row in rows if row["phase"] == "eval" and row["ranker"] != "popularity"]
