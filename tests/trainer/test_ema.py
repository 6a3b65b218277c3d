import pytest
import torch
from torch import nn

from trainer.ema import ExponentialMovingAverage


def step(model: nn.Linear, value: float) -> None:
    with torch.no_grad():
        model.weight.fill_(value)


def test_the_average_by_hand() -> None:
    model = nn.Linear(1, 1, bias=False)
    step(model, 10.0)
    average = ExponentialMovingAverage(model, 0.25)
    step(model, 21.0)
    average.update(1)  # keeps 2/11 of what it was
    assert average.values["weight"].item() == pytest.approx(10 * 2 / 11 + 21 * 9 / 11)
    step(model, 3.0)
    average.update(2)  # 3/12: the same as the decay
    assert average.values["weight"].item() == pytest.approx(19 / 4 + 3 * 3 / 4)
    step(model, -1.0)
    average.update(1000)
    assert average.values["weight"].item() == pytest.approx(7 / 4 - 3 / 4)


def test_it_is_applied_inside_the_context_only() -> None:
    model = nn.Linear(1, 1, bias=False)
    step(model, 1.0)
    average = ExponentialMovingAverage(model, 0.9)
    step(model, 2.0)
    with average.applied():
        assert model.weight.item() == 1
    assert model.weight.item() == 2
    with pytest.raises(RuntimeError, match="in between"), average.applied():
        raise RuntimeError("in between")
    assert model.weight.item() == 2
    assert average.values["weight"].item() == 1


def test_frozen_parameters_are_not_averaged() -> None:
    model = nn.Linear(1, 1)
    model.bias.requires_grad_(False)
    assert list(ExponentialMovingAverage(model, 0.9).values) == ["weight"]


def test_without_a_decay_nothing_is_stored() -> None:
    model = nn.Linear(1, 1)
    average = ExponentialMovingAverage(model, 0.0)
    average.update(1)
    assert average.values == {}
    before = model.weight.item()
    with average.applied():
        assert model.weight.item() == before
    assert model.weight.item() == before
