import math

import pytest
import torch
from torch import Tensor

from features.errors import UserError
from trainer import step_losses
from trainer.checkpoint import TrainState
from trainer.step_losses import StepLosses


def run(values: list[float], monkeypatch: pytest.MonkeyPatch) -> tuple[TrainState, list[int]]:
    """Add a loss in each step; return the state and the steps after which losses were read."""
    state = TrainState()
    losses, read_after = StepLosses(state, lr=0.5), []
    for value in values:
        state.step += 1
        losses.add({"loss": torch.tensor(value), "term": torch.tensor(2 * value)})
        if losses.read_if_due():
            read_after.append(state.step)
            total = math.fsum(values[: state.step])
            assert losses.means["loss"] == pytest.approx(total / state.step)
    losses.read()
    return state, read_after


def test_losses_are_read_after_the_first_step_and_every_twenty(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(step_losses, "_SECONDS_BETWEEN_READS", math.inf)
    state, read_after = run([0.1 * number for number in range(45)], monkeypatch)
    assert read_after == [1, 21, 41]
    total = 0.0
    for number in range(45):
        total += float(torch.tensor(0.1 * number))
    assert state.losses == {"loss": total, "term": pytest.approx(2 * total)}


def test_losses_of_slow_steps_are_read_after_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_losses, "_SECONDS_BETWEEN_READS", -1.0)
    assert run([1.0, 2.0, 3.0], monkeypatch)[1] == [1, 2, 3]


@pytest.mark.parametrize("step", [1, 5, 20, 21, 22, 30])
def test_the_first_step_whose_loss_is_not_finite_is_named(
    step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_losses, "_SECONDS_BETWEEN_READS", math.inf)
    values = [1.0] * (step - 1) + [math.inf] * 20
    with pytest.raises(UserError, match=f"inf in epoch 1, step {step}; .* lr than 0.5"):
        run(values, monkeypatch)


def test_a_step_waits_for_no_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_losses, "_SECONDS_BETWEEN_READS", math.inf)
    reads = []
    tolist = Tensor.tolist

    def spy(self: Tensor) -> object:
        reads.append(self.shape)
        return tolist(self)

    monkeypatch.setattr(Tensor, "tolist", spy)
    run([1.0] * 45, monkeypatch)
    assert reads == [(1, 2), (20, 2), (20, 2), (4, 2)]
