"""The speed-up of trainings: how much earlier a curve reaches the best value of another one.

This is the speed-up of PMMRec's Figure 3 (arXiv:2312.09602): the training without pre-training is
the baseline of those that start from transferred weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from features.errors import UserError, unknown
from trainer.analysis.curves import Curve


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeedUp:
    """When a curve first reaches the best value of the baseline of its dataset."""

    dataset: str
    label: str
    target: float
    """Best value of the baseline."""
    epoch: int | None
    """First validated epoch that reaches it; ``None`` if no epoch does."""
    seconds: float | None
    """Training time to the end of this epoch; ``None`` if it is not recorded."""
    by_epochs: float | None
    """Epochs of the baseline for one epoch of the curve."""
    by_time: float | None
    """Seconds of the baseline for one second of the curve."""


def speed_ups(curves: Sequence[Curve], baseline: str) -> list[SpeedUp]:
    """Compare every curve with the baseline of its dataset.

    Args:
        curves: Curves of one metric.
        baseline: Label of the baseline; datasets without it are left out.

    Raises:
        UserError: No curve is the baseline.
    """
    baselines = {curve.dataset: curve for curve in curves if curve.label == baseline}
    if not baselines:
        raise unknown("baseline", baseline, list(dict.fromkeys(curve.label for curve in curves)))
    results = []
    for curve in curves:
        reference = baselines.get(curve.dataset)
        if reference is None:
            continue
        if curve.metric != reference.metric:
            raise UserError(f"{curve.label} was validated by {curve.metric}, {baseline} by others")
        target = float(reference.values.max())
        epoch, seconds = _reached(curve, target)
        first_epoch, first_seconds = _reached(reference, target)
        results.append(
            SpeedUp(
                dataset=curve.dataset,
                label=curve.label,
                target=target,
                epoch=epoch,
                seconds=seconds,
                by_epochs=_ratio(first_epoch, epoch),
                by_time=_ratio(first_seconds, seconds),
            )
        )
    return results


def _reached(curve: Curve, target: float) -> tuple[int | None, float | None]:
    """Return the first validated epoch with at least the target, and the seconds to its end."""
    indices = np.flatnonzero(curve.values >= target)
    if not len(indices):
        return None, None
    epoch = int(curve.validated[indices[0]])
    return epoch, None if curve.seconds is None else float(curve.seconds[epoch - 1])


def _ratio(reference: float | None, value: float | None) -> float | None:
    return None if reference is None or not value else reference / value
