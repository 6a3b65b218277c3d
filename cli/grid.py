"""``mmrec grid``: train and evaluate every combination of a table, and print the table."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import console
from cli.grid_progress import list_runs, run_all
from cli.grid_tables import list_recipes, show_pivot, show_speed_ups, show_statistics
from cli.options import JsonOption, WarehouseOption
from cli.training_options import FeaturesOption, SetOption
from features.errors import UserError
from features.signals import exit_code
from features.warehouse import Warehouse
from trainer.runs.grid_axes import RETRIEVAL
from trainer.runs.grid_file import Grid
from trainer.runs.grid_table import Pivot, pivot
from trainer.runs.recipes import Recipe, fill_recipe, read_recipe

if TYPE_CHECKING:
    from trainer.runs.grid import Outcome, Planned


FileArgument = Annotated[
    str | None,
    typer.Argument(help="TOML file, every list in [runs] is an axis; or a recipe of --list."),
]
ListOption = Annotated[
    bool,
    typer.Option("--list", help="List the recipes: the tables of the papers; with NAME that one."),
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
    bool, typer.Option("--quick", help="A trial run: one epoch of tiny models on a few users.")
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="List the combinations and their runs; run nothing.")
]
PlotOption = Annotated[
    Path | None,
    typer.Option("--plot", help="Draw the table or the curves into FILE.png, .svg or .pdf."),
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
    plot: PlotOption = None,
    json: JsonOption = False,
    root: WarehouseOption = None,
) -> None:
    """Train and evaluate every combination of a table; finished runs are reused."""
    if list_:
        list_recipes(file, json)
        return
    if file is None:
        raise UserError("give a TOML file or a recipe; mmrec grid --list names the recipes")
    _check_paths(out, plot)
    recipe = read_recipe(file)
    warehouse = Warehouse(root)
    if recipe.is_statistics:
        options = {"--source": source, "--features": features, "--set": set, "--plot": plot}
        for option in (name for name, value in options.items() if value):
            raise UserError(f"{file} is a table of datasets and has no runs; leave {option} out")
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
    warehouse, spec, planned = _plan(warehouse, recipe, given)
    if dry_run:
        list_runs(warehouse, spec, planned, json)
        return
    from trainer.runs.grid import write_result

    outcomes, end = run_all(warehouse, spec, planned)
    path = out or recipe.result
    write_result(path, spec, outcomes)
    place = f" --warehouse {shlex.quote(str(warehouse.root))}" if root or quick else ""
    output = _Output(path=path, plot=plot, json=json, quick=quick, place=place)
    _show(warehouse, spec, planned, outcomes, output)
    place = f" --warehouse {shlex.quote(str(root))}" if root else ""
    figure = f" --plot {shlex.quote(str(plot))}" if plot else ""
    figure += f" --out {shlex.quote(str(out))}" if out else ""
    command = f"mmrec grid {shlex.quote(file)}{place}{given.text()}{figure}"
    _conclude(planned, outcomes, end, path, command)


def _check_paths(out: Path | None, plot: Path | None) -> None:
    """Refuse names of files whose endings are unknown, before anything is run."""
    if out is not None:
        from features.table_files import check_ending  # imports pyarrow

        check_ending(out)
    if plot is not None:
        from trainer.analysis.figures import check_image_path

        check_image_path(plot)


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


def _plan(
    warehouse: Warehouse, recipe: Recipe, given: _Given
) -> "tuple[Warehouse, Grid, list[Planned]]":
    """Fill in a recipe, and describe the runs of its combinations.

    Returns:
        The warehouse of the runs, which for a trial run has small copies of the datasets; the grid;
        and its runs.
    """
    datasets = given.dataset
    if not datasets and "dataset" not in recipe.document.get("runs", {}):
        datasets = _default_datasets(warehouse, recipe)
    spec = fill_recipe(recipe, datasets, given.source, quick=given.quick)
    warehouse.require()
    if given.quick:
        warehouse, spec = _shrink(warehouse, spec)
    from trainer.runs.grid import plan_grid
    from trainer.runs.grid_cells import Overrides
    from trainer.setting_sources import SettingSources

    overrides = Overrides(
        features=[part.strip() for entry in given.features for part in entry.split(",")],
        settings=SettingSources(pairs=given.set).parsed_pairs(),
        quick=given.quick,
    )
    return warehouse, spec, plan_grid(warehouse, spec, overrides)


def _shrink(warehouse: Warehouse, spec: Grid) -> tuple[Warehouse, Grid]:
    """Return a warehouse with small copies of the datasets of a grid, and the grid on them."""
    from pipeline.datasets.small_copy import copy_small

    combinations = [
        replace(combination, dataset=warehouse.choose_dataset(combination.dataset)[0])
        for combination in spec.combinations
    ]
    names = [combination.dataset for combination in combinations if combination.dataset]
    for combination in combinations:
        names += combination.pretraining.datasets if combination.pretraining else []
    return copy_small(warehouse, names), replace(spec, combinations=combinations)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Output:
    """The files that a grid writes, and how it prints."""

    path: Path
    """File of all metrics."""
    plot: Path | None
    """File of the figure; ``None`` for none."""
    json: bool
    quick: bool
    place: str
    """The option that names the warehouse of the runs; empty for the default."""


def _show(
    warehouse: Warehouse,
    spec: Grid,
    planned: "list[Planned]",
    outcomes: "list[Outcome]",
    output: _Output,
) -> None:
    """Print the table and the speed-ups, and draw the figure."""
    from trainer.analysis.grid_plots import draw_plot, speed_up_rows
    from trainer.runs.grid import next_commands

    values = [outcome.cell_values(spec) for outcome in outcomes]
    table = pivot(spec, values + [None] * (len(planned) - len(outcomes)))
    speed_ups = speed_up_rows(warehouse, spec, outcomes) if spec.speed_up and table.cells else []
    if output.json:
        document = _document(spec, planned, outcomes, output.path)
        document |= {"speed_up": speed_ups} if spec.speed_up else {}
        document |= {"then": next_commands(spec, outcomes)} if spec.then else {}
        console.emit_json(document)
    else:
        _show_result(spec, table, planned, outcomes, quick=output.quick)
        show_speed_ups(spec, speed_ups)
        for dataset, command in next_commands(spec, outcomes).items():
            console.print_text(f"{dataset}: now type: {command}{output.place}", indent=2)
    if output.plot is not None and table.cells:
        draw_plot(output.plot, warehouse, spec, table, outcomes)
        console.notify(f"figure: {output.plot}")


def _show_result(
    spec: Grid,
    table: Pivot,
    planned: "list[Planned]",
    outcomes: "list[Outcome]",
    *,
    quick: bool,
) -> None:
    """Print the table, and what a reader must know about its figures."""
    from trainer.data.control import control_line
    from trainer.evaluation.protocol import ties_lines

    datasets = {entry.dataset: entry.spec.data for entry in planned}
    show_pivot(spec, table, list(datasets))
    notes = [control_line(kind) + _of_runs(runs, planned) for kind, runs in _controls(planned)]
    if quick:
        notes.append("quick: tiny models after one epoch, on a few users; the figures mean nothing")
    if spec.departs:
        notes.append(f"differs from the paper: {spec.departs}")
    for name, data in datasets.items() if spec.protocol != RETRIEVAL else ():
        notes += [f"{name}: {line}" for line in ties_lines(data.tied, data.ties)]
    notes += [
        f"{name}: {queries:,} items, each a query ranked among all of them; ties against the model"
        for name, queries in _queries(spec, outcomes).items()
    ]
    notes += [
        f"{name}: {share:.2%} of the {spec.split} targets are repeated; filtered, they are misses"
        for name, share in _repeated_shares(spec, outcomes).items()
    ]
    for note in notes:
        console.print_text(note, indent=2)


def _controls(planned: "Sequence[Planned]") -> "list[tuple[str, list[Planned]]]":
    """Return each kind of control with its runs."""
    from trainer.data.control import MEANINGS

    kinds = [(kind, [p for p in planned if p.spec.control.kind == kind]) for kind in MEANINGS]
    return [(kind, runs) for kind, runs in kinds if runs]


def _of_runs(runs: "Sequence[Planned]", planned: "Sequence[Planned]") -> str:
    """Return the labels of the runs; nothing if they are all runs of the grid."""
    if len(runs) == len(planned):
        return ""
    labels = dict.fromkeys(entry.combination.label for entry in runs)
    return f" (runs {'; '.join(labels)})"


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


def _queries(spec: Grid, outcomes: "Sequence[Outcome]") -> dict[str, int]:
    """Return the number of queries on each dataset, for a grid of retrieval."""
    if spec.protocol != RETRIEVAL:
        return {}
    return {
        outcome.planned.dataset: row["users"]
        for outcome in outcomes
        for row in outcome.rows
        if row["targets"] == spec.targets
    }


def _repeated_shares(spec: Grid, outcomes: "Sequence[Outcome]") -> dict[str, float]:
    """Return the share of repeated targets of each dataset."""
    shares: dict[str, float] = {}
    for outcome in outcomes:
        share = outcome.repeated(spec.split)
        if share is not None:
            shares[outcome.planned.dataset] = share
    return shares


def _document(
    spec: Grid, planned: "list[Planned]", outcomes: "list[Outcome]", path: Path
) -> dict[str, Any]:
    ended = {outcome.number: outcome for outcome in outcomes}
    runs = []
    for number, entry in enumerate(planned):
        outcome = ended.get(number)
        runs.append(
            {
                "control": entry.spec.control.kind,
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
