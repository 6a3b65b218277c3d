"""Work is abandoned at a signal, also inside the backward pass, which is one call of a library."""

import os
import signal
import threading
import time
from contextlib import suppress

import pytest
import torch
from torch import nn

from features.signals import Interrupted, handle_signals
from trainer import interruption
from trainer.interruption import Abandoned, handle_interruption

CPU = torch.device("cpu")


class Chain(nn.Module):
    """A product of many matrices, whose backward pass is long."""

    def __init__(self) -> None:
        super().__init__()
        self.matrices = nn.ParameterList([nn.Parameter(torch.eye(600)) for _ in range(40)])

    def forward(self) -> torch.Tensor:
        product = torch.ones(600, 600)
        for matrix in self.matrices:
            product = product @ matrix
        return product.sum()


@pytest.mark.slow
def test_a_signal_in_the_backward_pass_ends_it() -> None:
    chain = Chain()
    chain().backward()
    chain.zero_grad()
    with handle_interruption(chain, CPU) as received:
        began = time.monotonic()
        chain().backward()
        seconds = time.monotonic() - began
        chain.zero_grad()
        loss = chain()
        kill = threading.Timer(seconds / 20, os.kill, (os.getpid(), signal.SIGTERM))
        kill.start()
        with pytest.raises(Abandoned), received.abandoned_on_signal():
            loss.backward()
    kill.join()
    done = sum(matrix.grad is not None for matrix in chain.matrices)
    assert done < len(chain.matrices)


def draw_and_receive() -> None:
    torch.rand(3)
    signal.raise_signal(signal.SIGHUP)


def test_only_abandoned_work_is_interrupted_and_its_random_state_restored() -> None:
    model = nn.Linear(2, 2)
    with handle_interruption(model, CPU) as received:
        with received.abandoned_on_signal():
            torch.rand(3)
        before = torch.get_rng_state()
        with pytest.raises(Abandoned), received.abandoned_on_signal():
            draw_and_receive()
        assert torch.equal(torch.get_rng_state(), before)
        signal.raise_signal(signal.SIGHUP)  # the same Ctrl-C, received twice
        with pytest.raises(Abandoned), received.abandoned_on_signal():
            raise AssertionError("work was begun after the signal")
        with received.abandoned_on_signal(can_abandon=False):
            torch.rand(3)
    assert not torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_a_signal_elsewhere_waits_and_a_second_one_raises(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    with handle_interruption(nn.Linear(2, 2), CPU) as received:
        signal.raise_signal(number)
        assert received.is_received
        monkeypatch.setattr(interruption, "_SAME_SECONDS", -1.0)
        with pytest.raises(Interrupted):
            signal.raise_signal(number)


def test_a_signal_that_a_library_swallowed_ends_the_training_before_its_first_step() -> None:
    with handle_signals():
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Interrupted), handle_interruption(nn.Linear(2, 2), CPU):
            raise AssertionError("the training began")
