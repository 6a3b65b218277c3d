"""The speed-up of curves, on values that are worked by hand."""

from collections.abc import Sequence

import numpy as np
import pytest

from features.errors import UserError
from trainer.analysis.curves import Curve
from trainer.analysis.speed_up import speed_ups


def curve(
    label: str,
    values: Sequence[float],
    *,
    dataset: str = "d",
    every: int = 1,
    seconds_per_epoch: float | None = 2.0,
) -> Curve:
    validated = np.arange(1, len(values) + 1) * every
    epochs = int(validated[-1])
    seconds = None
    if seconds_per_epoch is not None:
        seconds = np.arange(1, epochs + 1, dtype=np.float64) * seconds_per_epoch
    return Curve(
        label=label,
        dataset=dataset,
        metric="HR@10 (filtered)",
        loss=np.ones(epochs),
        seconds=seconds,
        validated=validated,
        values=np.array(values),
        best=int(np.argmax(values)),
    )


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        # The baseline is best, 0.4, in epoch 4 and after 8 seconds.
        (curve("t", [0.1, 0.4, 0.2]), (2, 4.0, 2.0, 2.0)),
        (curve("t", [0.5, 0.1, 0.9], seconds_per_epoch=4.0), (1, 4.0, 4.0, 2.0)),
        (curve("t", [0.3, 0.5], every=5, seconds_per_epoch=1.0), (10, 10.0, 0.4, 0.8)),
        (curve("t", [0.3, 0.3]), (None, None, None, None)),
        (curve("t", [0.3, 0.5], seconds_per_epoch=None), (2, None, 2.0, None)),
    ],
)
def test_the_speed_up_is_the_ratio_of_the_epochs_that_reach_the_best_value(
    other: Curve, expected: tuple[float | None, ...]
) -> None:
    baseline = curve("w/o PT", [0.1, 0.2, 0.3, 0.4, 0.4])
    first, second = speed_ups([baseline, other], "w/o PT")
    assert (first.target, first.epoch, first.by_epochs, first.by_time) == (0.4, 4, 1.0, 1.0)
    assert (second.epoch, second.seconds, second.by_epochs, second.by_time) == expected


def test_each_dataset_has_its_own_baseline() -> None:
    curves = [
        curve("a", [0.1, 0.2], dataset="d"),
        curve("b", [0.2, 0.3], dataset="d"),
        curve("a", [0.5, 0.6, 0.7], dataset="e"),
        curve("b", [0.7], dataset="e"),
        curve("b", [0.7], dataset="f"),
    ]
    rows = {(row.dataset, row.label): row.by_epochs for row in speed_ups(curves, "a")}
    assert rows == {("d", "a"): 1.0, ("d", "b"): 2.0, ("e", "a"): 1.0, ("e", "b"): 3.0}


def test_a_baseline_that_is_no_curve_is_refused() -> None:
    with pytest.raises(UserError, match="unknown baseline 'x'; known: a"):
        speed_ups([curve("a", [0.1])], "x")
