"""The tables of ``mmrec grid``: recipes, statistics of datasets, and the results of a grid."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.text import Text

from cli import console
from features.warehouse import Warehouse
from trainer.runs.grid_axes import RETRIEVAL
from trainer.runs.grid_file import METRIC, Grid
from trainer.runs.grid_table import Cell, Pivot
from trainer.runs.recipes import Recipe, read_recipe, recipe_names

POOLED = "--features text=NAME,image=NAME --set tune_blocks=0"
"""Options that run a recipe with tuned blocks on pooled tables."""
_FORMATS = {"dataset": "{}", "sparsity": "{:.2%}", "average_length": "{:.2f}", "k_core": "{}"}
_RANKING = {
    "filtered": "seen items are filtered from the ranking",
    "kept": "seen items are kept in the ranking",
}


def list_recipes(name: str | None, json: bool) -> None:
    """Print the recipes of the package, or the named one alone."""
    recipes = [read_recipe(entry) for entry in (recipe_names() if name is None else [name])]
    if json:
        console.emit_json(
            [
                {"recipe": r.name, "title": r.title, "departs": r.departs, "first": r.first}
                for r in recipes
            ]
        )
        return
    for recipe in recipes:
        console.print_text(f"{recipe.name}: {recipe.title}")
        if recipe.departs:
            console.print_text(f"differs from the paper: {recipe.departs}", indent=4)
        for command in recipe.first:
            console.print_text(f"first: {command}", indent=4)
    console.print_text(
        "first: the feature tables that the recipe reads, of each dataset D, or of EACH dataset and"
        f" source. A recipe with --level takes pooled tables by {POOLED}, unless its rows are"
        " encoders"
    )


def show_statistics(warehouse: Warehouse, recipe: Recipe, names: list[str], json: bool) -> None:
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


def show_pivot(spec: Grid, table: Pivot, datasets: Sequence[str]) -> None:
    """Print the table of a grid; the best value of each column is marked."""
    dataset = "" if "dataset" in (*spec.rows, *spec.columns) else f"{', '.join(datasets)}, "
    is_mean = any(cell.spread is not None for cell in table.cells.values())
    seeds = ", mean and standard deviation over seeds" if is_mean else ""
    axes = f"; columns: {', '.join(spec.columns)}" if spec.columns else ""
    targets = "" if spec.targets == "all" else f", {spec.targets} targets"
    ranking = f"{spec.split} split{targets}, {spec.seen}: {_RANKING[spec.seen]}"
    if spec.protocol == RETRIEVAL:
        ranking = f"retrieval of items, {spec.targets}"
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
    if cell.is_improvement:
        return Text(f"{cell.value:+.2%}")
    spread = "" if cell.spread is None else console.format_spread(cell.spread)
    star = "*" if cell.best and not console.out.is_terminal else ""  # a file has no bold text
    return Text(f"{star}{cell.value:.4f}{spread}", "bold" if cell.best else "")


def show_speed_ups(grid: Grid, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print when each curve reaches the best value of the baseline, and the ratios."""
    if not rows:
        return

    def times(ratio: float | None) -> str:
        return "-" if ratio is None else f"{ratio:.1f}x"

    console.out.print()
    console.table(
        ["dataset", "run", "reached in epoch", "seconds", "speed-up in epochs", "in time"],
        [
            [
                row["dataset"],
                row["label"],
                row["epoch"],
                None if row["seconds"] is None else f"{row['seconds']:.1f}",
                times(row["by_epochs"]),
                times(row["by_time"]),
            ]
            for row in rows
        ],
        title=f"speed-up to the best validation {grid.metrics[0]} of {grid.speed_up}",
    )
