"""Convergence curves: loss and validation metric of several runs, by epoch and by seconds.

All is read from the runs' metrics tables. Colours are those of Okabe and Ito, which people tell
apart whatever their sight; a ring marks the epoch whose weights a run has kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from features.atomic_files import atomic_write
from features.errors import UserError, unknown
from retrieval.metrics import METRIC_NAMES
from trainer.runs.folder import SECONDS
from trainer.runs.read import Record, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PICTURES = (".png", ".svg", ".pdf")
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLES = ("-", (0, (5, 2)), (0, (1, 1.5)))
MOST_RUNS = len(_COLOURS) * len(_STYLES)
_INK, _FAINT = "#222222", "#DDDDDD"
_WIDE, _HIGH = 9.0, 2.7  # inches: the figure, and each of its rows
_FEW_EPOCHS = 5  # with fewer there is no course that the first loss could hide
_LOOK: dict[Any, Any] = {
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
    "svg.fonttype": "none",  # text stays text, for readers and searches
    "svg.hashsalt": "mmrec",  # the same runs give the same bytes
}

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """How one training went."""

    label: str
    dataset: str
    metric: str
    """What ``values`` are, for an axis."""
    loss: Floats
    """(E,) mean of each epoch, the first one's first."""
    seconds: Floats | None
    """(E,) since the beginning, at the end of each epoch; ``None``: no times were kept."""
    validated: npt.NDArray[np.int64]
    """(V,) epochs that were validated, from 1."""
    values: Floats
    """(V,) the metric on validation."""
    best: int
    """Position in ``validated`` of the epoch whose weights are kept; -1: none yet."""

    def at(self, by_time: bool) -> tuple[Floats, Floats]:
        """(E,) and (V,): where the losses and the values stand on an axis."""
        epochs = np.arange(1, len(self.loss) + 1, dtype=np.float64)
        if by_time:
            assert self.seconds is not None
            epochs = self.seconds
        return epochs, epochs[self.validated - 1]


def read_curves(
    records: Sequence[Record],
    *,
    metric: str | None = None,
    seen: str | None = None,
    labels: Sequence[str] | None = None,
) -> list[Curve]:
    """Read the curves of runs, all of one metric.

    Args:
        records: The runs.
        metric: Such as ``NDCG@10``; by default what all runs were stopped by, else ``NDCG@10``.
        seen: ``filtered`` or ``kept``; by default as the metric.
        labels: What the runs are called; by default their names.

    Raises:
        UserError: A run has no finished epoch, or the runs have no such metric in common.
    """
    if labels and len(labels) != len(records):
        raise UserError(f"{len(labels)} labels for {len(records)} runs; give one for each, or none")
    names = list(labels) if labels else [record.name for record in records]
    if metric is not None and _canonical(metric) not in METRIC_NAMES:
        raise unknown("metric", metric, list(METRIC_NAMES))
    if seen not in (None, "filtered", "kept"):
        raise unknown("ranking for --seen", str(seen), ["filtered", "kept"])
    if len(records) > MOST_RUNS:
        raise UserError(f"{len(records)} runs do not fit into one figure; give at most {MOST_RUNS}")
    common = {_monitored(record) for record in records}
    monitored = common.pop() if len(common) == 1 else ("NDCG@10", "filtered")
    asked = (metric or monitored[0], seen or monitored[1])
    curves = [_curve(record, name, *asked) for record, name in zip(records, names, strict=True)]
    for record, curve in zip(records, curves, strict=True):
        if curve.metric != curves[0].metric:
            raise UserError(
                f"run {record.name!r} was validated by {curve.metric}, run {records[0].name!r} by"
                f" {curves[0].metric}: an alignment of items has a figure of its own"
            )
    return curves


def _monitored(record: Record) -> tuple[str, str]:
    """Metric and ranking that a run was stopped by."""
    return str(record.settings.get("monitor")), str(record.settings.get("monitor_seen"))


def _canonical(metric: str) -> str:
    """Tables call it HR@k where users are ranked, and Recall@k where items are retrieved."""
    return metric.replace("Recall@", "HR@")


def _curve(record: Record, label: str, metric: str, seen: str) -> Curve:
    rows = [row for row in read_metrics(record) if row["phase"] == "train"]
    named: dict[str, dict[int, float]] = {}
    for row in rows:
        if row["split"] == "train":
            named.setdefault(row["metric"], {})[row["epoch"]] = row["value"]
    losses = named.get("loss", {})
    if not losses:
        raise UserError(
            f"run {record.name!r} has no finished epoch to draw; go on with it:"
            f" mmrec {record.about.get('stage') or 'train'} --resume --run {record.name}"
        )
    epochs = max(losses)
    loss = np.array([losses.get(epoch, np.nan) for epoch in range(1, epochs + 1)])
    shown = _validations(rows, metric, seen)
    if not shown:
        known = dict.fromkeys(row["metric"] for row in rows if row["split"] == "validation")
        raise UserError(
            f"run {record.name!r} has no {metric} on validation; it has: {', '.join(known)}"
        )
    kept = _validations(rows, *_monitored(record))
    best = max(kept, key=lambda epoch: (kept[epoch], -epoch), default=0)
    validated = np.array(sorted(shown))
    retrieves = any(row["seen"] == "none" for row in rows if row["split"] == "validation")
    name = f"{metric}, text to vision and back" if retrieves else f"{_canonical(metric)} ({seen})"
    return Curve(
        label=label,
        dataset=record.about["dataset"],
        metric=name,
        loss=loss,
        seconds=_elapsed(named.get(SECONDS, {}), epochs),
        validated=validated,
        values=np.array([shown[epoch] for epoch in validated.tolist()]),
        best=validated.tolist().index(best) if best in shown else -1,
    )


def _validations(rows: Sequence[dict[str, Any]], metric: str, seen: str) -> dict[int, float]:
    """Epoch -> value; of an alignment the mean of its two directions, as it was monitored."""
    found: dict[int, list[float]] = {}
    for row in rows:
        same = _canonical(row["metric"]) == _canonical(metric) and row["seen"] in (seen, "none")
        if row["split"] == "validation" and same:
            found.setdefault(row["epoch"], []).append(row["value"])
    return {epoch: sum(values) / len(values) for epoch, values in found.items()}


def _elapsed(seconds: dict[int, float], epochs: int) -> Floats | None:
    """Running sum; an epoch without a time (it was interrupted at its end) counts as the median."""
    if not seconds:
        return None
    usual = float(np.median(list(seconds.values())))
    return np.cumsum([seconds.get(epoch, usual) for epoch in range(1, epochs + 1)])


def draw(curves: Sequence[Curve]) -> "Figure":
    """Draw loss and metric of each dataset's runs, by epoch and, where times were kept, by time."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    datasets = list(dict.fromkeys(curve.dataset for curve in curves))
    axes_of_time = [False, True] if any(c.seconds is not None for c in curves) else [False]
    with matplotlib.rc_context(_LOOK):
        rows = 2 * len(datasets)
        labels = [_label(curve) for curve in curves]
        per_row = max(1, min(len(curves), 96 // (max(map(len, labels)) + 8)))
        lines = -(-(len(curves) + 1) // per_row)
        figure = Figure(figsize=(_WIDE, _HIGH * rows + 0.22 * lines), layout="constrained")
        panels = figure.subplots(rows, len(axes_of_time), squeeze=False, sharey="row")
        handles = []
        for number, curve in enumerate(curves):
            look = _look(number)
            handles.append(Line2D([], [], linewidth=2.2, label=labels[number], **look))
            top = 2 * datasets.index(curve.dataset)
            for column, by_time in enumerate(axes_of_time):
                if not by_time or curve.seconds is not None:
                    scale = _unit(curves)[0] if by_time else 1.0
                    _plot(panels[top, column], panels[top + 1, column], curve, look, by_time, scale)
        handles.append(
            Line2D(
                [], [], linestyle="none", marker="o", markersize=7, markerfacecolor="white",
                markeredgewidth=1.8, markeredgecolor="#666666", label="best epoch: kept weights",
            )
        )  # fmt: skip
        for row in range(rows):
            dataset = datasets[row // 2]
            for column, by_time in enumerate(axes_of_time):
                _dress(panels[row, column], curves, dataset, row % 2 == 1, by_time)
            panels[row, 0].set_ylabel(
                "training loss" if row % 2 == 0 else f"validation {curves[0].metric}"
            )
            if row % 2 == 0:
                panels[row, 0].set_title(dataset, loc="left")
        figure.align_ylabels(panels[:, 0])
        figure.legend(handles=handles, loc="outside upper left", ncols=per_row, handlelength=2.2)
    return figure


def _label(curve: Curve) -> str:
    if curve.best < 0:
        return curve.label
    return f"{curve.label}: {curve.values[curve.best]:.4f} in epoch {curve.validated[curve.best]}"


def _look(number: int) -> dict[str, Any]:
    colour = _COLOURS[number % len(_COLOURS)]
    return {"color": colour, "linestyle": _STYLES[number // len(_COLOURS)]}


def _plot(
    above: "Axes", below: "Axes", curve: Curve, look: dict[str, Any], by_time: bool, scale: float
) -> None:
    """Draw one run into a panel of losses and one of metrics."""
    at_E, at_V = (x / scale for x in curve.at(by_time))
    for axes, x, y in ((above, at_E, curve.loss), (below, at_V, curve.values)):
        single: dict[str, Any] = {"marker": ".", "markersize": 6} if len(x) == 1 else {}
        axes.plot(x, y, linewidth=1.7, **look, **single)
    if curve.best >= 0:
        marked = curve.validated[curve.best] - 1
        for axes, x, y in (
            (above, at_E[marked], curve.loss[marked]),
            (below, at_V[curve.best], curve.values[curve.best]),
        ):
            axes.plot(
                [x], [y], marker="o", markersize=7, markerfacecolor="white", markeredgewidth=1.8,
                markeredgecolor=look["color"], linestyle="none", zorder=5, clip_on=axes is above,
            )  # fmt: skip


def _dress(
    axes: "Axes", curves: Sequence[Curve], dataset: str, is_metric: bool, by_time: bool
) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(f"training time, {_unit(curves)[1]}" if by_time else "epoch")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=not by_time))
    if is_metric:
        axes.margins(y=0.08)
        axes.set_ylim(bottom=0)
        return
    losses = [curve.loss for curve in curves if curve.dataset == dataset]
    every = np.concatenate(losses)
    low, high = np.nanmin(every), np.nanmax(every)
    later = np.concatenate([loss[1:] for loss in losses])
    top = np.nanmax(later) if len(later) >= _FEW_EPOCHS else high
    if high - top > (top - low) / 2:  # the first epoch alone would press all others flat
        axes.set_ylim(low - 0.08 * (top - low), top + 0.12 * (top - low))
        first = [float(loss[0]) for loss in losses if loss[0] > top]
        told = " to ".join(dict.fromkeys(f"{x:.2f}" for x in (min(first), max(first))))
        axes.annotate(
            f"epoch 1, above: {told}", (0.98, 0.94), xycoords="axes fraction", ha="right",
            fontsize=8, color="#666666",
        )  # fmt: skip


def _unit(curves: Sequence[Curve]) -> tuple[float, str]:
    """Seconds to a unit in which the longest run is a number that people can read."""
    longest = max(float(c.seconds[-1]) for c in curves if c.seconds is not None)
    if longest < 180:
        return 1.0, "seconds"
    return (60.0, "minutes") if longest < 3 * 3600 else (3600.0, "hours")


def check_picture(path: Path) -> None:
    """Refuse a file that no picture can be written into.

    Raises:
        UserError: Names the endings that are known.
    """
    if path.suffix.lower() not in PICTURES:
        raise UserError(f"{path} is no name of a picture; end it in {', '.join(PICTURES)}")


def save(figure: "Figure", path: Path) -> None:
    """Write a picture, whole or not at all.

    Raises:
        UserError: The name has another ending than those of ``PICTURES``.
    """
    check_picture(path)
    with atomic_write(path) as beside, beside.open("wb") as stream:
        write(figure, stream, path.suffix.lower()[1:])


def write(figure: "Figure", stream: BinaryIO, kind: str) -> None:
    """Write a picture: ``png``, ``svg`` or ``pdf``; equal figures give equal bytes."""
    import matplotlib

    dates = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {}}
    with matplotlib.rc_context(_LOOK):
        figure.savefig(stream, format=kind, dpi=200, metadata=dates[kind])
