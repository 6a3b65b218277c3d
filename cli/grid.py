"""``mmrec grid``: train and evaluate every combination of a table, and print the table."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from cli import console
from cli.options import JsonOption, WarehouseOption
from cli.training_options import FeaturesOption, SetOption
from features.errors import UserError
from features.signals import exit_code
from features.warehouse import Warehouse
from trainer.runs.grid_file import METRIC, Cell, Grid, Pivot, pivot
from trainer.runs.recipes import Recipe, fill_recipe, read_recipe, recipe_names

if TYPE_CHECKING:
    from trainer.loop import TrainProgress
    from trainer.runs.grid import Outcome, Planned

_RANKING = {
    "filtered": "seen items are filtered from the ranking",
    "kept": "seen items are kept in the ranking",
}


def grid(
    file: Annotated[
        str | None,
        typer.Argument(help="TOML file, every list in [runs] is an axis; or a recipe of --list."),
    ] = None,
    list_: Annotated[
        bool, typer.Option("--list", help="List the recipes: the tables of the papers.")
    ] = False,
    dataset: Annotated[
        list[str] | None,
        typer.Option("--dataset", help="Dataset of a recipe; repeatable where it is an axis."),
    ] = None,
    source: Annotated[
        list[str] | None,
        typer.Option("--source", help="Dataset to pre-train on; repeatable; default: --dataset."),
    ] = None,
    features: FeaturesOption = None,
    set: SetOption = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="One epoch, tiny widths and one seed: a trial run.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the combinations and their runs; run nothing.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="File of all metrics; default: FILE with .parquet."),
    ] = None,
    json: JsonOption = False,
    root: WarehouseOption = None,
) -> None:
    """Train and evaluate every combination of a table; finished runs are reused."""
    if list_:
        _list_recipes(json)
        return
    if file is None:
        raise UserError("give a TOML file or a recipe; mmrec grid --list names the recipes")
    if out is not None:
        from features.table_files import check_ending  # imports pyarrow

        check_ending(out)
    recipe = read_recipe(file)
    if recipe.is_statistics:
        warehouse = Warehouse(root)
        warehouse.require()
        _show_statistics(warehouse, recipe, dataset or [], json)
        return
    warehouse = Warehouse(root)
    datasets = dataset or []
    if not datasets and "dataset" not in recipe.document.get("runs", {}):
        datasets = _default_datasets(warehouse, recipe)
    spec = fill_recipe(recipe, datasets, source or [], quick=quick)
    warehouse.require()
    from trainer.config import SettingSources
    from trainer.evaluation.protocol import ties_lines
    from trainer.runs.grid import Stopped, plan_grid, write_result
    from trainer.runs.grid_cells import Overrides

    overrides = Overrides(
        features=[part.strip() for entry in features or [] for part in entry.split(",")],
        settings=SettingSources(pairs=set or []).parsed_pairs(),
        quick=quick,
    )
    planned = plan_grid(warehouse, spec, overrides)
    if dry_run:
        _list_runs(warehouse, spec, planned, json)
        return
    outcomes, end = _run_all(warehouse, spec, planned)
    path = out or recipe.result
    write_result(path, spec, outcomes)
    if json:
        console.emit_json(_document(spec, planned, outcomes, path))
    else:
        values = [outcome.values(spec.split, spec.seen, spec.targets) for outcome in outcomes]
        values += [None] * (len(planned) - len(outcomes))
        names = dict.fromkeys(entry.spec.dataset for entry in planned)
        show_pivot(spec, pivot(spec, values), list(names))
        if quick:
            console.print_text(
                "quick: tiny models after one epoch; the figures mean nothing", indent=2
            )
        if spec.departs:
            console.print_text(f"differs from the paper: {spec.departs}", indent=2)
        for name, data in {entry.spec.dataset: entry.spec.data for entry in planned}.items():
            for line in ties_lines(data.tied, data.ties):
                console.print_text(f"{name}: {line}", indent=2)
        for name, share in _repeated_shares(spec, outcomes).items():
            console.print_text(
                f"{name}: {share:.2%} of the {spec.split} targets are repeated; filtered, they are"
                " misses",
                indent=2,
            )
    if end is not None and not isinstance(end, Stopped | KeyboardInterrupt):
        raise end
    if end is not None:
        option = f" --warehouse {shlex.quote(str(root))}" if root else ""
        console.notify(
            f"stopped: {len(outcomes)} of {len(planned)} runs ended, and everything is saved;"
            f" resume with: mmrec grid {shlex.quote(file)}{option}"
            f"{_given_options(dataset, source, features, set, quick)}"
        )
        raise typer.Exit(exit_code())
    failed = sum(outcome.state == "failed" for outcome in outcomes)
    console.notify(f"all metrics of {len(outcomes) - failed} runs: {path}")
    if failed:
        console.notify(f"error: {failed} of {len(planned)} runs failed; see the reasons above")
        raise typer.Exit(2)


def _given_options(
    dataset: list[str] | None,
    source: list[str] | None,
    features: list[str] | None,
    set: list[str] | None,
    quick: bool,
) -> str:
    """Return the options that decide which runs a grid has, as a user types them."""
    options = {"--dataset": dataset, "--source": source, "--features": features, "--set": set}
    text = "".join(
        f" {name} {shlex.quote(value)}"
        for name, values in options.items()
        for value in values or []
    )
    return text + (" --quick" if quick else "")


def _default_datasets(warehouse: Warehouse, recipe: Recipe) -> list[str]:
    """Return the dataset that every command would choose, where the recipe needs its name."""
    document = recipe.document
    if "dataset" not in (*document.get("rows", []), *document.get("columns", [])) and not (
        document.get("pretrain")
    ):
        return []
    name, reason = warehouse.choose_dataset(None)
    console.notify(f"dataset: {name} ({reason})")
    return [name]


def _list_recipes(json: bool) -> None:
    """Print the recipes of the package."""
    recipes = [read_recipe(name) for name in recipe_names()]
    if json:
        console.emit_json(
            [{"recipe": r.name, "title": r.title, "departs": r.departs} for r in recipes]
        )
        return
    for recipe in recipes:
        console.print_text(f"{recipe.name}: {recipe.title}")
        if recipe.departs:
            console.print_text(f"differs from the paper: {recipe.departs}", indent=4)


def _show_statistics(warehouse: Warehouse, recipe: Recipe, names: list[str], json: bool) -> None:
    """Print the table of a recipe about datasets."""
    from features.dataset import cold_counts, load_dataset

    rows = []
    for name in names or [warehouse.choose_dataset(None)[0]]:
        data = load_dataset(warehouse, name)
        held_out, occurrences = cold_counts(data)
        rows.append(
            {**data.info.summary(), "cold_targets": held_out, "cold_occurrences": occurrences}
        )
    if json:
        console.emit_json(rows)
        return
    columns: dict[str, str] = recipe.document["columns"]
    console.table(
        list(columns),
        [[_FORMATS.get(key, "{:,}").format(row[key]) for key in columns.values()] for row in rows],
        title=recipe.title,
    )
    if recipe.departs:
        console.print_text(f"differs from the paper: {recipe.departs}", indent=2)


_FORMATS = {"dataset": "{}", "sparsity": "{:.2%}", "average_length": "{:.2f}", "k_core": "{}"}


def _repeated_shares(spec: Grid, outcomes: "Sequence[Outcome]") -> dict[str, float]:
    """Return the share of repeated targets of each dataset."""
    shares: dict[str, float] = {}
    for outcome in outcomes:
        share = outcome.repeated(spec.split)
        if share is not None:
            shares[outcome.planned.spec.dataset] = share
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
        values = outcome.values(spec.split, spec.seen, spec.targets)
        figures = f"no {spec.targets} targets"
        if values is not None:
            figures = " ".join(f"{metric} {values[metric]:.4f}" for metric in spec.metrics)
        duration = "reused"
        if outcome.state == "finished":
            self._durations.append(outcome.seconds)
            mean = sum(self._durations) / len(self._durations)
            left = console.format_duration((len(self._planned) - number - 1) * mean)
            duration = f"{console.format_duration(outcome.seconds)}, {left} left"
        self._line.update(f"{self._prefix(number)}: {figures} ({duration})", keep=True)

    def _prefix(self, number: int) -> str:
        return f"{number + 1}/{len(self._planned)} {self._planned[number].combination.label}"


def show_pivot(spec: Grid, table: Pivot, datasets: Sequence[str]) -> None:
    """Print the table of a grid; the best value of each column is marked."""
    dataset = "" if "dataset" in (*spec.rows, *spec.columns) else f"{', '.join(datasets)}, "
    is_mean = any(cell.spread is not None for cell in table.cells.values())
    seeds = ", mean and standard deviation over seeds" if is_mean else ""
    axes = f"; columns: {', '.join(spec.columns)}" if spec.columns else ""
    targets = "" if spec.targets == "all" else f", {spec.targets} targets"
    ranking = f"{spec.split} split{targets}, {spec.seen}: {_RANKING[spec.seen]}"
    if spec.title:
        console.out.print(spec.title, style="bold", soft_wrap=False)
    console.out.print(f"{dataset}{ranking}{seeds}{axes}", style="bold", soft_wrap=False)
    if spec.metric_rows:
        columns = [[_value_column(spec, table, key)] for key in table.column_keys]
    else:
        columns = [_metric_columns(spec, table, key) for key in table.column_keys]
    console.stacked_tables(_label_columns(spec, table), columns)


def _label_columns(spec: Grid, table: Pivot) -> list[console.Column]:
    """Return the columns that name the rows; a name equal to the one above is left out."""
    names, rows = list(spec.rows), list(table.row_keys)
    if spec.metric_rows:
        names.append(METRIC)
        rows = [(*row, metric) for row in rows for metric in spec.metrics]
    columns: list[console.Column] = []
    for index, key in enumerate(names):
        cells = []
        previous: tuple[str, ...] = ()
        for row in rows:
            is_repeated = row[: index + 1] == previous and index < len(names) - 1
            cells.append(Text("" if is_repeated else row[index]))
            previous = row[: index + 1]
        columns.append((key, cells))
    return columns


def _value_column(spec: Grid, table: Pivot, key: tuple[str, ...]) -> console.Column:
    """Return the column of one column key where each metric is a row."""
    cells = [
        _metric_cell(table.cells.get((row, key, metric)))
        for row in table.row_keys
        for metric in spec.metrics
    ]
    return " ".join(key), cells


def _metric_columns(spec: Grid, table: Pivot, key: tuple[str, ...]) -> list[console.Column]:
    """Return the columns of one column key, one for each metric; the first one names the key."""
    columns: list[console.Column] = []
    for index, metric in enumerate(spec.metrics):
        cells = [_metric_cell(table.cells.get((row, key, metric))) for row in table.row_keys]
        name = " ".join(key) if index == 0 else ""
        columns.append((f"{name}\n{metric}" if name else metric, cells))
    return columns


def _metric_cell(cell: Cell | None) -> Text:
    if cell is None:
        return Text("-")
    spread = "" if cell.spread is None else console.format_spread(cell.spread)
    star = "*" if cell.best and not console.out.is_terminal else ""  # a file has no bold text
    return Text(f"{star}{cell.value:.4f}{spread}", "bold" if cell.best else "")


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
                "metrics": outcome.values(spec.split, spec.seen, spec.targets) if outcome else None,
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
