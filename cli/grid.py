"""``mmrec grid``: a table of combinations, run one by one and printed as papers print them."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from cli import console
from cli.options import JsonOption, WarehouseOption
from features.warehouse import Warehouse
from trainer.runs.grid_file import Grid, Pivot, pivot, read_grid

if TYPE_CHECKING:
    from trainer.loop import TrainProgress
    from trainer.runs.grid import Outcome, Planned

_GAP = "  "


def grid(
    file: Annotated[Path, typer.Argument(help="TOML file; a list in [runs] is an axis.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only list the combinations and their runs.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="Parquet of all metrics; else beside FILE.")
    ] = None,
    json: JsonOption = False,
    root: WarehouseOption = None,
) -> None:
    """Train and evaluate every combination of a table; what has ended is not run again."""
    asked = read_grid(file)
    warehouse = Warehouse(root)
    warehouse.require()
    from trainer.runs.grid import Stopped, plan_grid, run_grid, write_result

    planned = plan_grid(warehouse, asked)
    if dry_run:
        _list(warehouse, asked, planned, json)
        return
    watch = _Watch(planned)
    outcomes: list[Outcome] = []
    stopped = False
    try:
        for outcome in run_grid(warehouse, planned, on_tick=watch.tick):
            outcomes.append(outcome)
            watch.ended(outcome, asked)
    except (Stopped, KeyboardInterrupt):
        stopped = True
    finally:
        watch.line.close()
    path = out or file.with_suffix(".parquet")
    write_result(path, asked, outcomes)
    values = [one.values(asked.split, asked.seen) for one in outcomes]
    values += [None] * (len(planned) - len(outcomes))
    if json:
        console.emit_json(_document(asked, planned, outcomes, path))
    else:
        names = dict.fromkeys(one.dataset for one in planned)
        show_pivot(asked, pivot(asked, values), list(names))
    failed = sum(one.state == "failed" for one in outcomes)
    if stopped:
        here = f" --warehouse {shlex.quote(str(warehouse))}" if warehouse else ""
        console.notify(
            f"stopped: {len(outcomes)} of {len(planned)} ended, all is kept;"
            f" go on with: mmrec grid {shlex.quote(str(file))}{here}"
        )
        raise typer.Exit(130)
    console.notify(f"all metrics of {len(outcomes) - failed} runs: {path}")
    if failed:
        console.notify(f"error: {failed} of {len(planned)} runs failed; the reasons stand above")
        raise typer.Exit(2)


class _Watch:
    """The live line of a grid; each run that ends leaves a line."""

    def __init__(self, planned: "list[Planned]") -> None:
        self.planned = planned
        self.line = console.Line()
        self.spent: list[float] = []

    def tick(self, number: int, tick: "TrainProgress | str") -> None:
        """Show what the run is doing."""
        what = tick
        if not isinstance(tick, str):
            what = f"epoch {tick.epoch}/{tick.epochs}  loss {tick.loss:.4f}"
        self.line.update(f"{self._where(number)}: {what}")

    def ended(self, outcome: "Outcome", asked: Grid) -> None:
        """Print the metrics of a finished run and the estimated time left."""
        number = self.planned.index(outcome.planned)
        if outcome.state == "failed":
            self.line.update(f"{self._where(number)}: failed: {outcome.message}", keep=True)
            return
        values = outcome.values(asked.split, asked.seen) or {}
        figures = " ".join(f"{metric} {values[metric]:.4f}" for metric in asked.metrics)
        took = "reused"
        if outcome.state == "finished":
            self.spent.append(outcome.seconds)
            rest = (len(self.planned) - number - 1) * sum(self.spent) / len(self.spent)
            took = f"{console.seconds(outcome.seconds)}, {console.seconds(rest)} left"
        self.line.update(f"{self._where(number)}: {figures} ({took})", keep=True)

    def _where(self, number: int) -> str:
        return f"{number + 1}/{len(self.planned)} {self.planned[number].combination.label}"


def show_pivot(asked: Grid, table: Pivot, datasets: Sequence[str]) -> None:
    """Print the table; where it is wider than the terminal, its columns in several pieces."""
    seen = "out of" if asked.seen == "filtered" else "left in"
    seeds = ", mean ± deviation over seeds" if any(c.spread for c in table.cells.values()) else ""
    where = "" if "dataset" in (*asked.rows, *asked.columns) else f"{', '.join(datasets)}, "
    title = f"{where}{asked.split} split, {asked.seen}: seen items are {seen} the ranking{seeds}"
    console.out.print(title, style="bold", markup=False)
    labels = _labels(asked, table)
    pieces: list[list[list[Text]]] = [list(labels)]
    for column in table.column_keys:
        group = _group(asked, table, column)
        if len(pieces[-1]) > len(labels) and _width([*pieces[-1], *group]) > console.out.width:
            pieces.append(list(labels))
        pieces[-1] += group
    for index, piece in enumerate(pieces):
        if index:
            console.out.print()
        _print(piece, len(labels))


def _labels(asked: Grid, table: Pivot) -> list[list[Text]]:
    """The columns that name the rows; what stands in the row above is not repeated."""
    labels = []
    for index, key in enumerate(asked.rows):
        column = [Text(""), Text(key, "bold")]
        above: tuple[str, ...] = ()
        for row in table.row_keys:
            repeated = row[: index + 1] == above and index < len(asked.rows) - 1
            column.append(Text("" if repeated else row[index]))
            above = row[: index + 1]
        labels.append(column)
    return labels


def _group(asked: Grid, table: Pivot, column: tuple[str, ...]) -> list[list[Text]]:
    """The columns of one column key, a column for each metric."""
    group = []
    for index, metric in enumerate(asked.metrics):
        cells = [Text(" ".join(column) if index == 0 else "", "bold"), Text(metric, "bold")]
        for row in table.row_keys:
            cell = table.cells.get((row, column, metric))
            if cell is None:
                cells.append(Text("-"))
                continue
            spread = "" if cell.spread is None else f"±{cell.spread:.4f}".replace("0.", ".")
            # Without a terminal there is no bold: the best one is marked by a star.
            star = "*" if cell.best and not console.out.is_terminal else ""
            cells.append(Text(f"{star}{cell.value:.4f}{spread}", "bold" if cell.best else ""))
        group.append(cells)
    return group


def _width(columns: list[list[Text]]) -> int:
    widths = [max(cell.cell_len for cell in column) for column in columns]
    return sum(widths) + len(_GAP) * (len(columns) - 1)


def _print(columns: list[list[Text]], labels: int) -> None:
    for cells in zip(*columns, strict=True):
        line = Text()
        for index, (cell, column) in enumerate(zip(cells, columns, strict=True)):
            space = Text(" " * (max(one.cell_len for one in column) - cell.cell_len))
            line += cell + space if index < labels else space + cell
            line += Text(_GAP if index < len(columns) - 1 else "")
        line.rstrip()
        if line.plain:
            console.out.print(line)


def _list(warehouse: Warehouse, asked: Grid, planned: "list[Planned]", json: bool) -> None:
    from trainer.runs.grid import is_begun, is_done

    rows = []
    for one in planned:
        begun = "begun" if is_begun(warehouse, one) else "new"
        rows.append((one, "finished" if is_done(warehouse, one) else begun))
    if json:
        found = [{**one.combination.keys, "run": one.run, "state": state} for one, state in rows]
        console.emit_json({"grid": str(asked.path), "runs": found})
        return
    keys = list(asked.combinations[0].keys)
    console.table(
        [*keys, "run", "state"],
        [[*one.combination.keys.values(), one.run, state] for one, state in rows],
    )
    ended = sum(state == "finished" for _, state in rows)
    console.notify(f"{len(planned)} runs, {ended} of them finished; nothing was run")


def _document(
    asked: Grid, planned: "list[Planned]", outcomes: "list[Outcome]", path: Path
) -> dict[str, Any]:
    ended = {outcome.planned.run: outcome for outcome in outcomes}
    runs = []
    for one in planned:
        outcome = ended.get(one.run)
        values = outcome.values(asked.split, asked.seen) if outcome else None
        runs.append(
            {
                **one.combination.keys,
                "run": one.run,
                "state": outcome.state if outcome else "left",
                "message": (outcome.message if outcome else "") or None,
                "metrics": values,
            }
        )
    return {
        "grid": str(asked.path),
        "split": asked.split,
        "seen": asked.seen,
        "rows": asked.rows,
        "columns": asked.columns,
        "result": str(path),
        "runs": runs,
    }
