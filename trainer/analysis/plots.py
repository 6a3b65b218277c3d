"""Draw the figures of a grid: bars and lines of its table, and the validation curves of its runs.

Colours and line styles are those of :mod:`trainer.analysis.figures`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from features.errors import UserError
from trainer.analysis.curves import Curve
from trainer.analysis.figures import (
    COLOURS,
    MAX_RUNS,
    RING,
    STYLE,
    WIDTH,
    label_x_axis,
    line_style,
    time_unit,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_BARS = 2 * len(COLOURS)
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_PANEL_HEIGHT, _LEGEND_LINE = 2.8, 0.25  # inches
_LEGEND_CHARACTERS = 90  # of one line of the legend
_MOST_COLUMNS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """One set of axes: a value of each series at each position of the x axis."""

    title: str
    x_label: str
    """Empty for none."""
    y_label: str
    """Empty for none."""
    positions: Sequence[str]
    """Labels of the positions, from left to right."""
    series: dict[str, list[tuple[float, float] | None]]
    """Label of the legend -> value and deviation at each position; ``None`` without a value."""


def draw_bars(panels: Sequence[Panel]) -> "Figure":
    """Draw groups of bars, one bar for each series, and one panel beside the other.

    Raises:
        UserError: There are more series than distinct bars.
    """
    return _draw_panels(panels, _plot_bars, MAX_BARS, columns=2)


def draw_lines(panels: Sequence[Panel]) -> "Figure":
    """Draw a line with markers for each series; panels of one title are in one row.

    Raises:
        UserError: There are more series than distinct lines.
    """
    columns = max(sum(other.title == panel.title for other in panels) for panel in panels)
    return _draw_panels(panels, _plot_lines, MAX_RUNS, columns=min(columns, _MOST_COLUMNS))


def _draw_panels(panels: Sequence[Panel], plot: Any, most: int, *, columns: int) -> "Figure":
    import matplotlib
    from matplotlib.figure import Figure

    labels = list(dict.fromkeys(label for panel in panels for label in panel.series))
    if len(labels) > most:
        raise UserError(
            f"{len(labels)} values do not fit into one figure ({labels[0]}, {labels[1]}, ...);"
            f" draw at most {most}"
        )
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    per_line = _labels_per_line(labels)
    with matplotlib.rc_context(STYLE):
        height = _PANEL_HEIGHT * rows + _LEGEND_LINE * -(-len(labels) // per_line)
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.flat[len(panels) :]:
            axes.set_axis_off()
        handles: dict[str, Any] = {}
        for axes, panel in zip(grid.flat, panels, strict=False):
            handles |= plot(axes, panel, labels)
            axes.set_title(panel.title, loc="left")
            axes.set_xlabel(panel.x_label)
            axes.set_ylabel(panel.y_label)
        shown = [label for label in labels if label in handles]
        figure.legend(
            [handles[label] for label in shown], shown, loc="outside upper left", ncols=per_line,
            handlelength=2.2,
        )  # fmt: skip
    return figure


def _labels_per_line(labels: Sequence[str]) -> int:
    longest = max(map(len, labels), default=1) + 6
    return max(1, min(len(labels), _LEGEND_CHARACTERS // longest))


def _plot_bars(axes: "Axes", panel: Panel, labels: Sequence[str]) -> dict[str, Any]:
    """Draw the bars of one panel; return label -> handle of the legend."""
    members = [label for label in labels if label in panel.series]
    width = 0.84 / len(members)
    handles = {}
    for place, label in enumerate(members):
        values = panel.series[label]
        x = np.arange(len(values)) + (place - (len(members) - 1) / 2) * width
        heights, deviations = _arrays(values)
        number = labels.index(label)
        handles[label] = axes.bar(
            x, heights, width * 0.92, color=COLOURS[number % len(COLOURS)],
            hatch="//" if number >= len(COLOURS) else None, edgecolor="white", linewidth=0.4,
            yerr=deviations if deviations.any() else None, error_kw={"elinewidth": 0.9},
        )  # fmt: skip
    axes.set_xticks(range(len(panel.positions)), panel.positions)
    axes.grid(visible=False, axis="x")
    axes.tick_params(axis="x", length=0)
    return handles


def _plot_lines(axes: "Axes", panel: Panel, labels: Sequence[str]) -> dict[str, Any]:
    """Draw the lines of one panel; return label -> handle of the legend."""
    handles = {}
    for label, values in panel.series.items():
        number = labels.index(label)
        heights, deviations = _arrays(values)
        handles[label] = axes.errorbar(
            np.arange(len(values)), heights, yerr=deviations if deviations.any() else None,
            linewidth=1.7, marker=_MARKERS[number % len(_MARKERS)], markersize=5, capsize=2,
            **line_style(number),
        )  # fmt: skip
    axes.set_xticks(range(len(panel.positions)), panel.positions)
    axes.set_xlim(-0.3, len(panel.positions) - 0.7)
    axes.margins(y=0.12)
    axes.set_ylim(bottom=0)
    return handles


def _arrays(values: Sequence[tuple[float, float] | None]) -> tuple[Any, Any]:
    """Return the values, NaN without one, and their deviations."""
    pairs = np.array([(np.nan, 0.0) if value is None else value for value in values])
    return pairs[:, 0], pairs[:, 1]


def draw_validation(curves: Sequence[Curve]) -> "Figure":
    """Draw the validation metric of runs by epoch and, where recorded, by training time.

    Runs of one label have one colour in the panels of all datasets. A ring marks the epoch whose
    weights are kept.

    Raises:
        UserError: There are more labels than distinct lines.
    """
    import matplotlib
    from matplotlib.figure import Figure

    labels = list(dict.fromkeys(curve.label for curve in curves))
    if len(labels) > MAX_RUNS:
        raise UserError(f"{len(labels)} curves do not fit into one figure; draw at most {MAX_RUNS}")
    datasets = list(dict.fromkeys(curve.dataset for curve in curves))
    by_times = [False, True] if all(curve.seconds is not None for curve in curves) else [False]
    per_line = _labels_per_line(labels)
    with matplotlib.rc_context(STYLE):
        height = _PANEL_HEIGHT * len(datasets) + _LEGEND_LINE * -(-len(labels) // per_line)
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        panels = figure.subplots(len(datasets), len(by_times), squeeze=False, sharey="row")
        handles = {}
        for row, dataset in enumerate(datasets):
            members = [curve for curve in curves if curve.dataset == dataset]
            for column, by_time in enumerate(by_times):
                axes = panels[row, column]
                for curve in members:
                    style = line_style(labels.index(curve.label))
                    scale = time_unit(members)[0] if by_time else 1.0
                    handles[curve.label] = _plot_validation(axes, curve, style, by_time, scale)
                label_x_axis(axes, members, by_time)
                axes.margins(y=0.08)
                axes.set_ylim(bottom=0)
            panels[row, 0].set_title(dataset, loc="left")
            panels[row, 0].set_ylabel(f"validation {members[0].metric}")
        figure.legend(
            [handles[label] for label in labels], labels, loc="outside upper left",
            ncols=per_line, handlelength=2.2,
        )  # fmt: skip
    return figure


def _plot_validation(
    axes: "Axes", curve: Curve, style: dict[str, Any], by_time: bool, scale: float
) -> Any:
    x_V = curve.at(by_time)[1] / scale
    point: dict[str, Any] = {"marker": ".", "markersize": 6} if len(x_V) == 1 else {}
    (line,) = axes.plot(x_V, curve.values, linewidth=1.7, **style, **point)
    if curve.best >= 0:
        ring = {**RING, "markeredgecolor": style["color"], "zorder": 5}
        axes.plot([x_V[curve.best]], [curve.values[curve.best]], clip_on=False, **ring)
    return line
