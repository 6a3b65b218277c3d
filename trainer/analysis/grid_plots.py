"""The figures of a grid: the image of ``mmrec grid --plot``, and the speed-ups of its runs."""

from collections.abc import Sequence
from dataclasses import asdict
from itertools import takewhile
from pathlib import Path
from typing import Any

from features.errors import UserError
from features.warehouse import Warehouse
from trainer.analysis.curves import Curve, read_curves
from trainer.analysis.figures import save_figure
from trainer.analysis.plots import Panel, draw_bars, draw_lines, draw_validation
from trainer.analysis.speed_up import speed_ups
from trainer.runs.grid import Outcome
from trainer.runs.grid_axes import SEED, Combination
from trainer.runs.grid_file import Grid
from trainer.runs.grid_table import Pivot
from trainer.runs.read import read_records

_DATASET = "dataset"


def draw_plot(
    path: Path, warehouse: Warehouse, grid: Grid, table: Pivot, outcomes: Sequence[Outcome]
) -> None:
    """Draw the figure of a grid, of the kind that its file declares, into an image file.

    Raises:
        UserError: No run of the grid has ended, or there are too many values for one figure.
    """
    if grid.plot == "curves":
        save_figure(draw_validation(read_grid_curves(warehouse, grid, outcomes)), path)
        return
    if not table.cells:
        raise UserError(f"no run of {grid.path} has ended, so there is nothing to draw")
    names = list(dict.fromkeys(outcome.planned.dataset for outcome in outcomes))
    panels = _Panels(grid, table, names)
    if grid.plot == "lines":
        save_figure(draw_lines(panels.of_series(warehouse)), path)
    else:
        save_figure(draw_bars(panels.of_datasets()), path)


def read_grid_curves(warehouse: Warehouse, grid: Grid, outcomes: Sequence[Outcome]) -> list[Curve]:
    """Return the curve of the first seed of each combination, by the first metric of the table.

    Raises:
        UserError: No run has ended.
    """
    runs: dict[tuple[str, str], str] = {}
    for outcome in outcomes:
        if outcome.state != "failed":
            key = (outcome.planned.dataset, curve_label(outcome.planned.combination))
            runs.setdefault(key, outcome.planned.run)
    if not runs:
        raise UserError(f"no run of {grid.path} has ended, so there is nothing to draw")
    return read_curves(
        [record for run in runs.values() for record in read_records(warehouse, [run])],
        metric=grid.metrics[0],
        seen=grid.seen,
        labels=[label for _, label in runs],
    )


def curve_label(combination: Combination) -> str:
    """Return the values of all axes but the dataset and the seed."""
    values = [value for key, value in combination.keys.items() if key not in (_DATASET, SEED)]
    return ", ".join(values) or combination.model


def speed_up_rows(
    warehouse: Warehouse, grid: Grid, outcomes: Sequence[Outcome]
) -> list[dict[str, Any]]:
    """Return the speed-up of each curve to the best value of the curve that the grid names."""
    curves = read_grid_curves(warehouse, grid, outcomes)
    if grid.speed_up not in {curve.label for curve in curves}:
        return []  # its run has failed
    return [asdict(row) for row in speed_ups(curves, grid.speed_up)]


class _Panels:
    """The panels of a table.

    Args:
        grid: The grid.
        table: Its table; relative improvements are left out.
        datasets: Names of the datasets.
    """

    def __init__(self, grid: Grid, table: Pivot, datasets: Sequence[str]) -> None:
        self._grid = grid
        self._datasets = list(datasets)
        self._values: dict[tuple[str, str, str], tuple[float, float]] = {}
        for (row, column, metric), cell in table.cells.items():
            keys = dict(zip((*grid.rows, *grid.columns), (*row, *column), strict=True))
            dataset = keys.pop(_DATASET, self._datasets[0])
            label = ", ".join(value for key, value in keys.items() if key != SEED) or "run"
            if not cell.is_improvement:
                self._values[dataset, label, metric] = (cell.value, cell.spread or 0.0)
        self._labels = list(dict.fromkeys(label for _, label, _ in self._values))

    def of_datasets(self) -> list[Panel]:
        """Return a panel for each dataset, with a position for each metric."""
        metrics = self._grid.metrics
        return [
            Panel(
                title=dataset,
                x_label="",
                y_label="",
                positions=metrics,
                series={
                    label: [self._values.get((dataset, label, metric)) for metric in metrics]
                    for label in self._labels
                },
            )
            for dataset in self._datasets
        ]

    def of_series(self, warehouse: Warehouse) -> list[Panel]:
        """Return a panel for each metric and each raw dataset, with a position for each k-core."""
        panels = []
        for names in self._families(warehouse):
            cores = [str(warehouse.info(name).k_core) for name in names]
            are_cores = len(set(cores)) == len(cores)
            title = _common_prefix(names)
            panels += [
                Panel(
                    title=title,
                    x_label="k-core" if are_cores else _DATASET,
                    y_label=metric,
                    positions=cores if are_cores else names,
                    series={
                        label: [self._values.get((name, label, metric)) for name in names]
                        for label in self._labels
                    },
                )
                for metric in self._grid.metrics
            ]
        return panels

    def _families(self, warehouse: Warehouse) -> list[list[str]]:
        """Return the datasets of the same raw files together, those of smaller k-cores first."""
        families: dict[str, list[str]] = {}
        for name in self._datasets:
            families.setdefault(warehouse.info(name).raw, []).append(name)
        return [
            sorted(names, key=lambda name: warehouse.info(name).k_core)
            for names in families.values()
        ]


def _common_prefix(names: Sequence[str]) -> str:
    """Return the name of a family of datasets: what their names begin with."""
    same = takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    prefix = "".join(letters[0] for letters in same).rstrip("-_. ")
    return prefix or ", ".join(names)
