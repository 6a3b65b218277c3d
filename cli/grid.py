"""``mmrec grid``: train and evaluate every combination of a TOML file, and print one table."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from cli import console
from cli.options import JsonOption, WarehouseOption
from features.signals import exit_code
from features.warehouse import Warehouse
from trainer.runs.grid_file import Cell, Grid, Pivot, pivot, read_grid

if TYPE_CHECKING:
    from trainer.loop import TrainProgress
    from trainer.runs.grid import Outcome, Planned

_RANKING = {
    "filtered": "seen items are filtered from the ranking",
    "kept": "seen items are kept in the ranking",
}


def grid(
    file: Annotated[Path, typer.Argument(help="TOML file; every list in [runs] is an axis.")],
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
    if out is not None:
        from features.table_files import check_ending  # imports pyarrow

        check_ending(out)
    spec = read_grid(file)
    warehouse = Warehouse(root)
    warehouse.require()
    from trainer.evaluation.protocol import ties_lines
    from trainer.runs.grid import Stopped, plan_grid, write_result

    planned = plan_grid(warehouse, spec)
    if dry_run:
        _list_runs(warehouse, spec, planned, json)
        return
    outcomes, end = _run_all(warehouse, spec, planned)
    path = out or file.with_suffix(".parquet")
    write_result(path, spec, outcomes)
    if json:
        console.emit_json(_document(spec, planned, outcomes, path))
    else:
        values = [outcome.values(spec.split, spec.seen) for outcome in outcomes]
        values += [None] * (len(planned) - len(outcomes))
        datasets = dict.fromkeys(entry.spec.dataset for entry in planned)
        show_pivot(spec, pivot(spec, values), list(datasets))
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
            f" resume with: mmrec grid {shlex.quote(str(file))}{option}"
        )
        raise typer.Exit(exit_code())
    failed = sum(outcome.state == "failed" for outcome in outcomes)
    console.notify(f"all metrics of {len(outcomes) - failed} runs: {path}")
    if failed:
        console.notify(f"error: {failed} of {len(planned)} runs failed; see the reasons above")
        raise typer.Exit(2)


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
        number = self._planned.index(outcome.planned)
        if outcome.state == "failed":
            self._line.update(f"{self._prefix(number)}: failed: {outcome.message}", keep=True)
            return
        values = outcome.values(self._spec.split, self._spec.seen) or {}
        figures = " ".join(f"{metric} {values[metric]:.4f}" for metric in self._spec.metrics)
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
    title = f"{dataset}{spec.split} split, {spec.seen}: {_RANKING[spec.seen]}{seeds}{axes}"
    console.out.print(title, style="bold", soft_wrap=False)
    console.stacked_tables(
        _label_columns(spec, table),
        [_metric_columns(spec, table, key) for key in table.column_keys],
    )


def _label_columns(spec: Grid, table: Pivot) -> list[console.Column]:
    """Return the columns that name the rows; a name equal to the one above is left out."""
    columns: list[console.Column] = []
    for index, key in enumerate(spec.rows):
        cells = []
        previous: tuple[str, ...] = ()
        for row in table.row_keys:
            is_repeated = row[: index + 1] == previous and index < len(spec.rows) - 1
            cells.append(Text("" if is_repeated else row[index]))
            previous = row[: index + 1]
        columns.append((key, cells))
    return columns


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
    from trainer.runs.grid import is_begun, is_done

    states = []
    for entry in planned:
        unfinished = "begun" if is_begun(warehouse, entry) else "new"
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
    ended = {outcome.planned.run: outcome for outcome in outcomes}
    runs = []
    for entry in planned:
        outcome = ended.get(entry.run)
        runs.append(
            {
                **entry.combination.keys,
                "run": entry.run,
                "state": outcome.state if outcome else "left",
                "message": (outcome.message if outcome else "") or None,
                "metrics": outcome.values(spec.split, spec.seen) if outcome else None,
            }
        )
    return {
        "grid": str(spec.path),
        "split": spec.split,
        "seen": spec.seen,
        "rows": spec.rows,
        "columns": spec.columns,
        "result": str(path),
        "runs": runs,
    }
