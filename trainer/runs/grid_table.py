"""The table of a grid: means over seeds, arranged in rows and columns.

This module does not import torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from retrieval.list_metrics import LIST_METRICS
from retrieval.metrics import single_best
from trainer.runs.grid_file import Grid, Improvement

IMPROVEMENT = "Improv."
"""Name of the row or column with the relative improvement, as in the papers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One figure of the table: the mean over seeds."""

    value: float
    spread: float | None
    """Standard deviation over seeds; ``None`` for a single seed."""
    best: bool
    """True if every other row has a lower value in this column, or every other column in this row
    where metrics are rows. False for values that are printed as equal, and for metrics of the
    recommended items, of which more is not always better."""
    is_improvement: bool = False
    """True if the value is a relative improvement, 0.05 for 5%."""


Key = tuple[str, ...]
Place = tuple[Key, Key, str]
"""Row, column and metric of a cell."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pivot:
    """The table of a grid: rows x (columns x metrics)."""

    row_keys: list[Key]
    column_keys: list[Key]
    cells: dict[Place, Cell]
    """(row, column, metric) -> the figure; absent if no run has ended."""


def pivot(grid: Grid, values: Sequence[Mapping[str, float] | None]) -> Pivot:
    """Arrange the values of the runs as a table.

    Args:
        grid: The grid.
        values: For each combination metric -> value; ``None`` if its run has not ended.
    """
    places = [
        (
            tuple(combination.keys[key] for key in grid.rows),
            tuple(combination.keys[key] for key in grid.columns),
        )
        for combination in grid.combinations
    ]
    figures: dict[Place, list[float]] = {}
    for (row, column), run_values in zip(places, values, strict=True):
        for metric in grid.metrics:
            value = None if run_values is None else metric_value(run_values, metric)
            if value is not None:
                figures.setdefault((row, column, metric), []).append(value)
    means = {place: float(np.mean(seeds)) for place, seeds in figures.items()}
    lines: dict[tuple[tuple[str, ...], str], list[Place]] = {}  # of each row, or of each column
    for row, column, metric in means:
        line = (row if grid.metric_rows else column), metric
        lines.setdefault(line, []).append((row, column, metric))
    marked = {
        line[best]
        for line in lines.values()
        if (best := single_best([means[place] for place in line])) is not None
    }
    cells = {
        (row, column, metric): Cell(
            value=means[row, column, metric],
            spread=float(np.std(seeds, ddof=1)) if len(seeds) > 1 else None,
            best=metric not in LIST_METRICS and (row, column, metric) in marked,
        )
        for (row, column, metric), seeds in figures.items()
    }
    table = Pivot(
        row_keys=list(dict.fromkeys(row for row, _ in places)),
        column_keys=list(dict.fromkeys(column for _, column in places)),
        cells=cells,
    )
    return table if grid.improvement is None else _with_improvement(grid, grid.improvement, table)


def metric_value(values: Mapping[str, float], metric: str) -> float | None:
    """Return the value of a metric; ``Recall@k`` of held-out targets is stored as ``HR@k``."""
    return values.get(metric, values.get(metric.replace("Recall@", "HR@")))


def _with_improvement(grid: Grid, improvement: Improvement, table: Pivot) -> Pivot:
    """Return the table with a row or a column of relative improvements."""
    in_columns = improvement.axis in grid.columns
    position = (grid.columns if in_columns else grid.rows).index(improvement.axis)

    def renamed(key: Key) -> Key:
        return (*key[:position], IMPROVEMENT, *key[position + 1 :])

    best: dict[Place, dict[str, float]] = {}
    for (row, column, metric), cell in table.cells.items():
        key = column if in_columns else row
        place = (row, renamed(key), metric) if in_columns else (renamed(key), column, metric)
        for name, group in (("of", improvement.of), ("over", improvement.over)):
            if key[position] in group:
                values = best.setdefault(place, {})
                values[name] = max(cell.value, values.get(name, cell.value))
    added = {
        place: Cell(
            value=values["of"] / values["over"] - 1, spread=None, best=False, is_improvement=True
        )
        for place, values in best.items()
        if "of" in values and values.get("over", 0.0) > 0
    }
    keys = table.column_keys if in_columns else table.row_keys
    keys = list(dict.fromkeys([*keys, *map(renamed, keys)]))
    return Pivot(
        row_keys=table.row_keys if in_columns else keys,
        column_keys=keys if in_columns else table.column_keys,
        cells={**table.cells, **added},
    )
