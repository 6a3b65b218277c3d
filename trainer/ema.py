"""The exponential moving average of weights: validated and saved while others are trained.

Steps of a constant learning rate walk around a minimum; the mean over many of them lies nearer to
it than any one (Polyak and Juditsky, 1992).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Average:
    """A running mean of what a model trains.

    Args:
        model: Its trained parameters are averaged; where it starts is the first mean.
        decay: Most of the old mean that a step keeps, 0..1 exclusive; 0: nothing is averaged, and
            nothing held.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        held = model.named_parameters() if decay else ()
        self._weights = {name: p.detach() for name, p in held if p.requires_grad}
        self.values = {name: weight.clone() for name, weight in self._weights.items()}
        """Name of a parameter -> its mean, on the device; empty without a decay."""

    @torch.no_grad()
    def update(self, steps: int) -> None:
        """Take the weights in after a step.

        Args:
            steps: Steps so far, this one included. Of the old mean (1 + steps) / (10 + steps) is
                kept while that is less than the decay: a young mean forgets the random start.
        """
        if self.values:
            kept = min(self._decay, (1 + steps) / (10 + steps))
            torch._foreach_lerp_(
                list(self.values.values()), list(self._weights.values()), weight=1 - kept
            )

    @contextmanager
    def used(self) -> Iterator[None]:
        """The model holds the means inside, its own weights again after."""
        trained = {name: weight.clone() for name, weight in self._weights.items()}
        try:
            self._put(self.values)
            yield
        finally:
            self._put(trained)

    def _put(self, values: dict[str, Tensor]) -> None:
        for name, weight in self._weights.items():
            weight.copy_(values[name])
