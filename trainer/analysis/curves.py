"""Read convergence curves: loss and validation metric of runs, by epoch and by seconds.

All values come from the runs' metrics tables; :mod:`trainer.analysis.figures` draws the curves.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from features.errors import UserError, unknown
from retrieval.metrics import METRIC_NAMES
from trainer.analysis.compare import SEEN
from trainer.data.control import marked
from trainer.runs.folder import SECONDS
from trainer.runs.read import Record, read_metrics

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """Loss and validation metric of one training."""

    label: str
    dataset: str
    metric: str
    """Name of the metric and of the ranking, as an axis shows it."""
    loss: Floats
    """(E,) mean loss of each epoch."""
    seconds: Floats | None
    """(E,) seconds from the start to the end of each epoch, or None if no times were recorded."""
    validated: npt.NDArray[np.int64]
    """(V,) numbers of the validated epochs, from 1."""
    values: Floats
    """(V,) values of the metric."""
    best: int
    """Position in ``validated`` of the epoch whose weights are kept; -1 if there is none."""

    @property
    def best_epoch(self) -> int | None:
        """Return the number of the epoch whose weights are kept."""
        return None if self.best < 0 else int(self.validated[self.best])

    @property
    def best_value(self) -> float | None:
        """Return the metric of the epoch whose weights are kept."""
        return None if self.best < 0 else float(self.values[self.best])

    def at(self, by_time: bool) -> tuple[Floats, Floats]:
        """Return the x coordinates of the losses, (E,), and of the metric's values, (V,)."""
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
        metric: Such as ``NDCG@10``. The default is the metric that stopped all runs, or
            ``NDCG@10`` if the runs were stopped by different metrics.
        seen: ``filtered`` or ``kept``. The default is chosen like the metric.
        labels: One label for each run; the default is the names of the runs.

    Raises:
        UserError: A run has no finished epoch, or the runs do not share the metric.
    """
    if labels and len(labels) != len(records):
        raise UserError(
            f"{len(labels)} labels for {len(records)} runs; give one label for each run, or none"
        )
    for label in labels or ():
        if any("\ud800" <= char <= "\udfff" for char in label):
            raise UserError(f"label {label!r} has bytes that are no UTF-8; give it in UTF-8")
    if metric is not None and _table_name(metric) not in METRIC_NAMES:
        raise unknown("metric", metric, list(METRIC_NAMES))
    if seen is not None and seen not in SEEN:
        raise unknown("ranking for --seen", seen, list(SEEN))
    monitors = {_monitor(record) for record in records}
    default_metric, default_seen = monitors.pop() if len(monitors) == 1 else ("NDCG@10", "filtered")
    curves = [
        _read_curve(record, label, metric or default_metric, seen or default_seen)
        for record, label in zip(
            records, labels or [record.name for record in records], strict=True
        )
    ]
    for record, curve in zip(records, curves, strict=True):
        if curve.metric != curves[0].metric:
            raise UserError(
                f"run {record.name!r} was validated by {curve.metric}, run {records[0].name!r} by"
                f" {curves[0].metric}; draw the two kinds of runs in separate reports"
            )
    return curves


def _monitor(record: Record) -> tuple[str, str]:
    """Return the metric and the ranking that early stopping followed."""
    return str(record.settings.get("monitor")), str(record.settings.get("monitor_seen"))


def _table_name(metric: str) -> str:
    """Return a metric's name in tables of ranked users: HR@k instead of Recall@k."""
    return metric.replace("Recall@", "HR@")


def _read_curve(record: Record, label: str, metric: str, seen: str) -> Curve:
    rows = [row for row in read_metrics(record) if row["phase"] == "train"]
    training: dict[str, dict[int, float]] = {}
    for row in rows:
        if row["split"] == "train":
            training.setdefault(row["metric"], {})[row["epoch"]] = row["value"]
    losses = training.get("loss", {})
    validation = [row for row in rows if row["split"] == "validation"]
    epochs = max((*losses, *(row["epoch"] for row in validation)), default=0)
    if not epochs:
        raise UserError(
            f"run {record.name!r} has no finished epoch to draw; resume it:"
            f" mmrec {record.about.get('stage') or 'train'} --resume --run {record.name}"
        )
    values = _values_by_epoch(validation, metric, seen)
    if not values:
        known = ", ".join(dict.fromkeys(row["metric"] for row in validation))
        raise UserError(f"run {record.name!r} has no {metric} on validation; it has: {known}")
    monitored = _values_by_epoch(validation, *_monitor(record))
    best_epoch = max(monitored, key=lambda epoch: (monitored[epoch], -epoch), default=0)
    validated = sorted(values)
    is_retrieval = any(row["seen"] == "none" for row in validation)
    return Curve(
        label=marked(label, record.control),
        dataset=record.about["dataset"],
        metric=(
            f"{metric}, text to vision and back"
            if is_retrieval
            else f"{_table_name(metric)} ({seen})"
        ),
        loss=np.array([losses.get(epoch, np.nan) for epoch in range(1, epochs + 1)]),
        seconds=_elapsed(training.get(SECONDS, {}), epochs),
        validated=np.array(validated),
        values=np.array([values[epoch] for epoch in validated]),
        best=validated.index(best_epoch) if best_epoch in values else -1,
    )


def _values_by_epoch(
    validation: Sequence[dict[str, Any]], metric: str, seen: str
) -> dict[int, float]:
    """Return epoch -> value; for an alignment task the mean of its two directions."""
    values: dict[int, list[float]] = {}
    for row in validation:
        is_metric = _table_name(row["metric"]) == _table_name(metric)
        if is_metric and row["seen"] in (seen, "none"):
            values.setdefault(row["epoch"], []).append(row["value"])
    return {epoch: sum(group) / len(group) for epoch, group in values.items()}


def _elapsed(seconds: dict[int, float], epochs: int) -> Floats | None:
    """Return the running sum of the epochs' times.

    An epoch that was interrupted at its end has no time; it counts as the median.
    """
    if not seconds:
        return None
    median = float(np.median(list(seconds.values())))
    return np.cumsum([seconds.get(epoch, median) for epoch in range(1, epochs + 1)])
