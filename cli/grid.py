"""``mmrec grid``: train and evaluate every combination of a table, and print the table."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import console
from cli.grid_tables import list_recipes, show_pivot, show_statistics
from cli.options import JsonOption, WarehouseOption
from cli.training_options import FeaturesOption, SetOption
from features.errors import UserError
from features.signals import exit_code
from features.warehouse import Warehouse
from trainer.runs.grid_axes import RETRIEVAL
from trainer.runs.grid_file import Grid
from trainer.runs.grid_table import metric_value, pivot
from trainer.runs.recipes import Recipe, fill_recipe, read_recipe

if TYPE_CHECKING:
    from trainer.loop import TrainProgress
    from trainer.runs.grid import Outcome, Planned


FileArgument = Annotated[
    str | None,
    typer.Argument(help="TOML file, every list in [runs] is an axis; or a recipe of --list."),
]
ListOption = Annotated[
    bool, typer.Option("--list", help="List the recipes: the tables of the papers.")
]
DatasetsOption = Annotated[
    list[str] | None,
    typer.Option("--dataset", help="Dataset of a recipe; repeatable where it is an axis."),
]
SourceOption = Annotated[
    list[str] | None,
    typer.Option("--source", help="Dataset to pre-train on; repeatable; default: --dataset."),
]
QuickOption = Annotated[
    bool, typer.Option("--quick", help="One epoch, tiny widths and one seed: a trial run.")
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="List the combinations and their runs; run nothing.")
]
OutOption = Annotated[
    Path | None, typer.Option("--out", help="File of all metrics; default: FILE with .parquet.")
]


def grid(
    file: FileArgument = None,
    list_: ListOption = False,
    dataset: DatasetsOption = None,
    source: SourceOption = None,
    features: FeaturesOption = None,
    set: SetOption = None,
    quick: QuickOption = False,
    dry_run: DryRunOption = False,
    out: OutOption = None,
    json: JsonOption = False,
    root: WarehouseOption = None,
) -> None:
    """Train and evaluate every combination of a table; finished runs are reused."""
    if list_:
        list_recipes(json)
        return
    if file is None:
        raise UserError("give a TOML file or a recipe; mmrec grid --list names the recipes")
    if out is not None:
        from features.table_files import check_ending  # imports pyarrow

        check_ending(out)
    recipe = read_recipe(file)
    warehouse = Warehouse(root)
    if recipe.is_statistics:
        warehouse.require()
        show_statistics(warehouse, recipe, dataset or [], json)
        return
    given = _Given(
        dataset=dataset or [],
        source=source or [],
        features=features or [],
        set=set or [],
        quick=quick,
    )
    spec, planned = _plan(warehouse, recipe, given)
    if dry_run:
        _list_runs(warehouse, spec, planned, json)
        return
    from trainer.runs.grid import write_result

    outcomes, end = _run_all(warehouse, spec, planned)
    path = out or recipe.result
    write_result(path, spec, outcomes)
    if json:
        console.emit_json(_document(spec, planned, outcomes, path))
    else:
        _show_result(spec, planned, outcomes, quick=quick)
    place = f" --warehouse {shlex.quote(str(root))}" if root else ""
    command = f"mmrec grid {shlex.quote(file)}{place}{given.text()}"
    _conclude(planned, outcomes, end, path, command)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Given:
    """The options that decide which runs a grid has."""

    dataset: list[str]
    source: list[str]
    features: list[str]
    set: list[str]
    quick: bool

    def text(self) -> str:
        """Return the options as a user types them."""
        options = {
            "--dataset": self.dataset,
            "--source": self.source,
            "--features": self.features,
            "--set": self.set,
        }
        text = "".join(
            f" {name} {shlex.quote(value)}" for name, values in options.items() for value in values
        )
        return text + (" --quick" if self.quick else "")


def _plan(warehouse: Warehouse, recipe: Recipe, given: _Given) -> "tuple[Grid, list[Planned]]":
    """Fill in a recipe, and describe the runs of its combinations."""
    datasets = given.dataset
    if not datasets and "dataset" not in recipe.document.get("runs", {}):
        datasets = _default_datasets(warehouse, recipe)
    spec = fill_recipe(recipe, datasets, given.source, quick=given.quick)
    warehouse.require()
    from trainer.config import SettingSources
    from trainer.runs.grid import plan_grid
    from trainer.runs.grid_cells import Overrides

    overrides = Overrides(
        features=[part.strip() for entry in given.features for part in entry.split(",")],
        settings=SettingSources(pairs=given.set).parsed_pairs(),
        quick=given.quick,
    )
    return spec, plan_grid(warehouse, spec, overrides)


def _show_result(
    spec: Grid, planned: "list[Planned]", outcomes: "list[Outcome]", *, quick: bool
) -> None:
    """Print the table, and what a reader must know about its figures."""
    from trainer.evaluation.protocol import ties_lines

    values = [outcome.cell_values(spec) for outcome in outcomes]
    values += [None] * (len(planned) - len(outcomes))
    datasets = {entry.dataset: entry.spec.data for entry in planned}
    show_pivot(spec, pivot(spec, values), list(datasets))
    notes = []
    if quick:
        notes.append("quick: tiny models after one epoch; the figures mean nothing")
    if spec.departs:
        notes.append(f"differs from the paper: {spec.departs}")
    for name, data in datasets.items() if spec.protocol != RETRIEVAL else ():
        notes += [f"{name}: {line}" for line in ties_lines(data.tied, data.ties)]
    notes += [
        f"{name}: {share:.2%} of the {spec.split} targets are repeated; filtered, they are misses"
        for name, share in _repeated_shares(spec, outcomes).items()
    ]
    for note in notes:
        console.print_text(note, indent=2)


def _conclude(
    planned: "list[Planned]",
    outcomes: "list[Outcome]",
    end: BaseException | None,
    path: Path,
    command: str,
) -> None:
    """Print where the metrics are, and end with an exit code if runs failed or were stopped.

    Args:
        planned: All runs of the grid.
        outcomes: The runs that ended.
        end: The exception that ended the grid early.
        path: File of the metrics.
        command: The command that resumes the grid.
    """
    from trainer.runs.grid import Stopped

    if end is not None and not isinstance(end, Stopped | KeyboardInterrupt):
        raise end
    if end is not None:
        console.notify(
            f"stopped: {len(outcomes)} of {len(planned)} runs ended, and everything is saved;"
            f" resume with: {command}"
        )
        raise typer.Exit(exit_code())
    failed = sum(outcome.state == "failed" for outcome in outcomes)
    console.notify(f"all metrics of {len(outcomes) - failed} runs: {path}")
    if failed:
        console.notify(f"error: {failed} of {len(planned)} runs failed; see the reasons above")
        raise typer.Exit(2)


def _default_datasets(warehouse: Warehouse, recipe: Recipe) -> list[str]:
    """Return the dataset that every command would choose, where the recipe needs its name."""
    document = recipe.document
    fields = [field for key in ("rows", "columns") for field in _as_list(document.get(key))]
    if "dataset" not in fields and not document.get("pretrain"):
        return []
    name, reason = warehouse.choose_dataset(None)
    console.notify(f"dataset: {name} ({reason})")
    return [name]


def _as_list(value: object) -> list[object]:
    """Return a list of a document, or an empty list for what is refused later."""
    return value if isinstance(value, list) else []


def _repeated_shares(spec: Grid, outcomes: "Sequence[Outcome]") -> dict[str, float]:
    """Return the share of repeated targets of each dataset."""
    shares: dict[str, float] = {}
    for outcome in outcomes:
        share = outcome.repeated(spec.split)
        if share is not None:
            shares[outcome.planned.dataset] = share
    return shares


def _run_all(
    warehouse: Warehouse, spec: Grid, planned: "list[Planned]"
) -> "tuple[list[Outcome], BaseException | None]":
    """Run all combinations; return the outcomes, and the exception that ended the grid early."""
    from trainer.runs.grid import run_grid

    outcomes: list[Outcome] = []
    with console.ProgressLine() as line:
        progress = _GridProgress(spec, planned, line)
        try:
            for outcome in run_grid(warehouse, planned, on_progress=progress.show_step):
                outcomes.append(outcome)
                progress.show_outcome(outcome)
        except (Exception, KeyboardInterrupt) as error:  # the finished runs are printed first
            return outcomes, error
    return outcomes, None


class _GridProgress:
    """Progress of a grid: one live line, and one line that stays for each run that ended."""

    def __init__(self, spec: Grid, planned: "list[Planned]", line: console.ProgressLine) -> None:
        self._spec = spec
        self._planned = planned
        self._line = line
        self._durations: list[float] = []

    def show_step(self, number: int, step: "TrainProgress | str") -> None:
        """Show the state of the current run."""
        if not isinstance(step, str):
            step = f"epoch {step.epoch}/{step.epochs}  loss {step.loss:.4f}"
        self._line.update(f"{self._prefix(number)}: {step}", share=number / len(self._planned))

    def show_outcome(self, outcome: "Outcome") -> None:
        """Print the metrics of a run that ended and the estimated time left."""
        number = outcome.number
        if outcome.state == "failed":
            self._line.update(f"{self._prefix(number)}: failed: {outcome.message}", keep=True)
            return
        spec = self._spec
        values = outcome.cell_values(spec)
        figures = f"no {spec.targets} targets"
        if values is not None:
            figures = " ".join(
                f"{metric} {metric_value(values, metric) or 0:.4f}" for metric in spec.metrics
            )
        duration = "reused"
        if outcome.state == "finished":
            self._durations.append(outcome.seconds)
            mean = sum(self._durations) / len(self._durations)
            left = console.format_duration((len(self._planned) - number - 1) * mean)
            duration = f"{console.format_duration(outcome.seconds)}, {left} left"
        self._line.update(f"{self._prefix(number)}: {figures} ({duration})", keep=True)

    def _prefix(self, number: int) -> str:
        return f"{number + 1}/{len(self._planned)} {self._planned[number].combination.label}"


def _list_runs(warehouse: Warehouse, spec: Grid, planned: "list[Planned]", json: bool) -> None:
    """Print the runs of a grid and their states."""
    from trainer.runs.grid import is_begun, is_done, run_name

    states = []
    for entry in planned:
        unfinished = "begun" if is_begun(warehouse, entry) else "new"
        if entry.pretraining is not None:
            unfinished = f"after {run_name(entry.pretraining)}"
        states.append("finished" if is_done(warehouse, entry) else unfinished)
    if json:
        runs = [
            {**entry.combination.keys, "run": entry.run, "state": state}
            for entry, state in zip(planned, states, strict=True)
        ]
        console.emit_json({"grid": str(spec.path), "runs": runs})
        return
    console.table(
        [*spec.combinations[0].keys, "run", "state"],
        [
            [*entry.combination.keys.values(), entry.run, state]
            for entry, state in zip(planned, states, strict=True)
        ],
    )
    console.notify(
        f"{len(planned)} runs, {states.count('finished')} of them finished; nothing was run"
    )


def _document(
    spec: Grid, planned: "list[Planned]", outcomes: "list[Outcome]", path: Path
) -> dict[str, Any]:
    ended = {outcome.number: outcome for outcome in outcomes}
    runs = []
    for number, entry in enumerate(planned):
        outcome = ended.get(number)
        runs.append(
            {
                **entry.combination.keys,
                "run": outcome.planned.run if outcome else entry.run,
                "state": outcome.state if outcome else "left",
                "message": (outcome.message if outcome else "") or None,
                "metrics": outcome.cell_values(spec) if outcome else None,
            }
        )
    return {
        "grid": str(spec.path),
        "split": spec.split,
        "seen": spec.seen,
        "targets": spec.targets,
        "rows": spec.rows,
        "columns": spec.columns,
        "result": str(path),
        "runs": runs,
    }
