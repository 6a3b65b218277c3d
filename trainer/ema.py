"""Exponential moving average of weights, validated and saved in place of the weights themselves.

With a constant learning rate, steps move around a minimum; the average over many of them is nearer
to it than any single one (Polyak and Juditsky, 1992).

``torch.optim.swa_utils.AveragedModel`` is not used: it copies frozen parameters and buffers too,
and its first update discards the initial weights, which are the first average here.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class ExponentialMovingAverage:
    """A moving average of the trained parameters of a model.

    Args:
        model: The model; its initial weights are the first average.
        decay: Largest share of the old average that an update keeps, 0..1 exclusive; 0 disables
            averaging, and nothing is stored.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        parameters = model.named_parameters() if decay else ()
        self._weights = {name: p.detach() for name, p in parameters if p.requires_grad}
        self.values = {name: weight.clone() for name, weight in self._weights.items()}
        """Name of a parameter -> its average, on its device; empty without a decay."""

    @torch.no_grad()
    def update(self, steps: int) -> None:
        """Update the average with the weights after a step.

        Args:
            steps: Number of steps so far, including this one. The update keeps the share
                (1 + steps) / (10 + steps) of the old average while that is less than the decay, so
                that the random initial weights are forgotten early.
        """
        if self.values:
            kept = min(self._decay, (1 + steps) / (10 + steps))
            torch._foreach_lerp_(
                list(self.values.values()), list(self._weights.values()), weight=1 - kept
            )

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the model the averaged weights inside the context, and its own weights after it."""
        own = {name: weight.clone() for name, weight in self._weights.items()}
        try:
            self._assign(self.values)
            yield
        finally:
            self._assign(own)

    def _assign(self, values: Mapping[str, Tensor]) -> None:
        for name, weight in self._weights.items():
            weight.copy_(values[name])
