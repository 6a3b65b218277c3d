"""Draw convergence curves and write them as images.

The colours are those of Okabe and Ito, which stay distinct under every common colour blindness. A
ring marks the epoch whose weights a run keeps.
"""

import base64
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from features.atomic_files import atomic_write
from features.errors import UserError
from trainer.analysis.curves import Curve

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

IMAGE_SUFFIXES = (".png", ".svg", ".pdf")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLES = ("-", (0, (5, 2)), (0, (1, 1.5)))
MAX_RUNS = len(COLOURS) * len(_STYLES)
"""Runs of one figure; each has its own pair of colour and line style."""
_INK, _FAINT = "#222222", "#DDDDDD"
WIDTH, _ROW_HEIGHT, _LEGEND_LINE_HEIGHT = 9.0, 2.7, 0.22  # inches
_LEGEND_CHARACTERS = 96  # of one line of the legend
_FEW_EPOCHS = 5  # with fewer epochs the loss axis shows the first epoch too
RING: dict[str, Any] = {
    "marker": "o", "markersize": 7, "markerfacecolor": "white", "markeredgewidth": 1.8,
    "linestyle": "none",
}  # fmt: skip
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": _INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _FAINT,
    "grid.linewidth": 0.7,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "text.color": _INK,
    "legend.frameon": False,
    "text.parse_math": False,  # a $ in a label is a $
    "svg.fonttype": "none",  # text stays text: it can be searched and read aloud
    "svg.hashsalt": "mmrec",  # equal runs give equal bytes
}


def draw_curves(curves: Sequence[Curve]) -> "Figure":
    """Draw loss and metric of each dataset's runs, by epoch and, where recorded, by time.

    Raises:
        UserError: There are more runs than distinct lines.
    """
    import matplotlib
    from matplotlib.figure import Figure

    if len(curves) > MAX_RUNS:
        raise UserError(f"{len(curves)} runs do not fit into one figure; give at most {MAX_RUNS}")
    datasets = list(dict.fromkeys(curve.dataset for curve in curves))
    axes_by_time = [False, True] if any(c.seconds is not None for c in curves) else [False]
    rows = 2 * len(datasets)
    labels = [_legend_label(curve) for curve in curves]
    per_line = max(1, min(len(curves), _LEGEND_CHARACTERS // (max(map(len, labels)) + 8)))
    legend_lines = -(-(len(curves) + 1) // per_line)
    with matplotlib.rc_context(STYLE):
        size = (WIDTH, _ROW_HEIGHT * rows + _LEGEND_LINE_HEIGHT * legend_lines)
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(rows, len(axes_by_time), squeeze=False, sharey="row")
        for number, curve in enumerate(curves):
            row = 2 * datasets.index(curve.dataset)
            for column, by_time in enumerate(axes_by_time):
                if not by_time or curve.seconds is not None:
                    scale = time_unit(curves)[0] if by_time else 1.0
                    pair = (panels[row, column], panels[row + 1, column])
                    _plot_run(pair, curve, line_style(number), by_time, scale)
        for row in range(rows):
            is_loss = row % 2 == 0
            for column, by_time in enumerate(axes_by_time):
                label_x_axis(panels[row, column], curves, by_time)
                if not is_loss:
                    panels[row, column].margins(y=0.08)
                    panels[row, column].set_ylim(bottom=0)
                else:
                    members = [c for c in curves if c.dataset == datasets[row // 2]]
                    _limit_loss_axis(panels[row, column], members)
            name = "training loss" if is_loss else f"validation {curves[0].metric}"
            panels[row, 0].set_ylabel(name)
            if is_loss:
                panels[row, 0].set_title(datasets[row // 2], loc="left")
        figure.align_ylabels(panels[:, 0])
        handles = _legend_handles(labels)
        figure.legend(handles=handles, loc="outside upper left", ncols=per_line, handlelength=2.2)
    return figure


def _legend_label(curve: Curve) -> str:
    if curve.best < 0:
        return curve.label
    return f"{curve.label}: {curve.best_value:.4f} in epoch {curve.best_epoch}"


def _legend_handles(labels: Sequence[str]) -> "list[Artist]":
    from matplotlib.lines import Line2D

    handles: list[Artist] = [
        Line2D([], [], linewidth=2.2, label=label, **line_style(number))
        for number, label in enumerate(labels)
    ]
    ring = Line2D([], [], markeredgecolor="#666666", label="best epoch: kept weights", **RING)
    return [*handles, ring]


def line_style(number: int) -> dict[str, Any]:
    """Return colour and style of the line of a run; both are distinct for :data:`MAX_RUNS` runs."""
    colour = COLOURS[number % len(COLOURS)]
    return {"color": colour, "linestyle": _STYLES[number // len(COLOURS)]}


def _plot_run(
    panels: "tuple[Axes, Axes]", curve: Curve, style: dict[str, Any], by_time: bool, scale: float
) -> None:
    """Draw one run into a panel of losses and a panel of metrics."""
    loss_axes, metric_axes = panels
    x_loss_E, x_metric_V = (x / scale for x in curve.at(by_time))
    for axes, x, y in (
        (loss_axes, x_loss_E, curve.loss), (metric_axes, x_metric_V, curve.values)
    ):  # fmt: skip
        point: dict[str, Any] = {"marker": ".", "markersize": 6} if len(x) == 1 else {}
        axes.plot(x, y, linewidth=1.7, **style, **point)
    if curve.best_epoch is None:
        return
    index = curve.best_epoch - 1
    ring = {**RING, "markeredgecolor": style["color"], "zorder": 5}
    loss_axes.plot([x_loss_E[index]], [curve.loss[index]], clip_on=True, **ring)
    metric_axes.plot([x_metric_V[curve.best]], [curve.values[curve.best]], clip_on=False, **ring)


def label_x_axis(axes: "Axes", curves: Sequence[Curve], by_time: bool) -> None:
    """Label an axis of epochs, or of training time in the unit of :func:`time_unit`."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(f"training time, {time_unit(curves)[1]}" if by_time else "epoch")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=not by_time))


def _limit_loss_axis(axes: "Axes", curves: Sequence[Curve]) -> None:
    """Leave the first epoch out of the axis where its loss would flatten all later ones."""
    curves = [curve for curve in curves if not np.isnan(curve.loss).all()]
    if not curves:  # models that learn nothing by gradients have no loss
        return
    all_losses = np.concatenate([curve.loss for curve in curves])
    later_losses = np.concatenate([curve.loss[1:] for curve in curves])
    low, high = np.nanmin(all_losses), np.nanmax(all_losses)
    top = np.nanmax(later_losses) if len(later_losses) >= _FEW_EPOCHS else high
    if high - top <= (top - low) / 2:
        return
    axes.set_ylim(low - 0.08 * (top - low), top + 0.12 * (top - low))
    hidden = [float(curve.loss[0]) for curve in curves if curve.loss[0] > top]
    bounds = " to ".join(dict.fromkeys(f"{loss:.2f}" for loss in (min(hidden), max(hidden))))
    axes.annotate(
        f"epoch 1, above: {bounds}", (0.98, 0.94), xycoords="axes fraction", ha="right",
        fontsize=8, color="#666666",
    )  # fmt: skip


def time_unit(curves: Sequence[Curve]) -> tuple[float, str]:
    """Return the unit of a time axis: its seconds and its name."""
    longest = max(float(c.seconds[-1]) for c in curves if c.seconds is not None)
    if longest < 180:
        return 1.0, "seconds"
    return (60.0, "minutes") if longest < 3 * 3600 else (3600.0, "hours")


def check_image_path(path: Path) -> None:
    """Refuse a file name whose ending is not in :data:`IMAGE_SUFFIXES`.

    Raises:
        UserError: The message lists the known endings.
    """
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        raise UserError(f"{path} is not an image file; end it in {', '.join(IMAGE_SUFFIXES)}")


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a figure as an image file; the file is whole or absent.

    Raises:
        UserError: The file name has an unknown ending.
    """
    check_image_path(path)
    with atomic_write(path) as part, part.open("wb") as stream:
        write_figure(figure, stream, path.suffix.lower()[1:])


def write_figure(figure: "Figure", stream: BinaryIO, kind: str) -> None:
    """Write a figure as ``png``, ``svg`` or ``pdf``; equal figures give equal bytes."""
    import matplotlib

    without_dates = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {}}
    with matplotlib.rc_context(STYLE):
        figure.savefig(stream, format=kind, dpi=200, metadata=without_dates[kind])


def inline_svg(figure: "Figure", description: str) -> str:
    """Return a figure as SVG for use inside HTML.

    Args:
        figure: The figure.
        description: What the figure shows, for readers who hear the page.
    """
    stream = io.BytesIO()
    write_figure(figure, stream, "svg")
    text = stream.getvalue().decode("utf-8")
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    attributes = (
        'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" role="img"'
        f' aria-label="{description}"'
    )
    # The width and height of the figure are those of paper; here the page decides.
    opening = r'^<svg [^>]*?(viewBox="[^"]*")[^>]*>'
    return re.sub(opening, rf"<svg \1 {attributes}>", text, count=1)


def image_data(figure: "Figure") -> str:
    """Return a figure as PNG in a ``data:`` address, for the source of an image in HTML."""
    stream = io.BytesIO()
    write_figure(figure, stream, "png")
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"
