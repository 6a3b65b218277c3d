"""Signals that end a training: unfinished work is abandoned, and the last whole step is saved.

A step changes nothing but the random state until the optimizer steps, and a validation changes
nothing at all. Both can be abandoned at any instant. The optimizer's step and the writing of files
are completed first.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from torch import Tensor, nn

from features.signals import Interrupted, handle_signals, raise_received

_SAME_SECONDS = 1.0  # signals within this time count as one Ctrl-C


class Abandoned(Interrupted):
    """A signal was received in work that is abandoned."""


class Interruption:
    """The first signal that ended the training; see :func:`handle_interruption`.

    Args:
        device: Device whose random state is restored when work is abandoned.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._can_abandon = False
        self._first: float | None = None

    @property
    def is_received(self) -> bool:
        """True if a signal was received."""
        return self._first is not None

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: the first one abandons work, a later one ends the process.

        ``torchrun`` forwards signals that its processes may have received from the terminal
        already, so signals within a second count as one.

        Raises:
            Abandoned: The signal is the first one, and the current work can be abandoned.
            Interrupted: The signal is a later one.
        """
        now = time.monotonic()
        if self._first is not None and now - self._first > _SAME_SECONDS:
            raise Interrupted
        self._first = now if self._first is None else self._first
        self._raise_if_abandoned()

    @contextmanager
    def abandoned_on_signal(self, can_abandon: bool = True) -> Iterator[None]:
        """Abandon the body at a signal, and restore the random state from before the body.

        Args:
            can_abandon: False: complete the body, and change nothing.

        Raises:
            Abandoned: A signal was received in the body or before it.
        """
        if not can_abandon:
            yield
            return
        random = torch.get_rng_state()
        cuda = torch.cuda.get_rng_state() if self._is_cuda else None
        try:
            self._can_abandon = True
            if self.is_received:
                self._raise_if_abandoned()
            yield
            self._can_abandon = False
        except Abandoned:
            _restore(random, cuda)
            raise
        finally:
            self._can_abandon = False

    def _raise_if_abandoned(self) -> None:
        if self._can_abandon:
            self._can_abandon = False  # another signal does not interrupt what follows
            raise Abandoned


def _restore(random: Tensor, cuda: Tensor | None) -> None:
    torch.set_rng_state(random)
    if cuda is not None:
        torch.cuda.set_rng_state(cuda)


@contextmanager
def handle_interruption(model: nn.Module, device: torch.device) -> Iterator[Interruption]:
    """Handle the signals that end a command in the body.

    The backward pass is one call of a library, and Python handles signals only between its own
    instructions. Each parameter therefore gets a hook in Python.

    Args:
        model: The trained model.
        device: Device of the model.

    Raises:
        Interrupted: A signal was received before, and a library has swallowed its exception.
    """
    raise_received()
    interruption = Interruption(device)
    hooks = [
        parameter.register_post_accumulate_grad_hook(_handle_pending_signals)
        for parameter in model.parameters()
        if parameter.requires_grad
    ]
    try:
        with handle_signals(interruption.receive):
            yield interruption
    finally:
        for hook in hooks:
            hook.remove()


def _handle_pending_signals(parameter: Tensor) -> None:
    """Do nothing: Python handles pending signals at the start of every function."""
