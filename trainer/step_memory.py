"""Steps that run out of memory are computed again in chunks, with the same result."""

import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from features.memory import free_memory, is_out_of_memory
from trainer.models.base import Recommender

_MOST_CHUNKS = 64


class StepMemory:
    """Compute the gradients of a step, again in more chunks each time that memory runs out.

    Losses and gradients are those of the whole step up to rounding, because each chunk is encoded
    again in the backward pass and the loss reads all of them: with in-batch negatives as well.
    Dropout draws other numbers than the whole step does.

    Args:
        model: The model; its ``chunks`` are doubled for this step and all later ones.
        is_alone: False in one of several processes, which would wait for each other.
    """

    def __init__(self, model: Recommender, *, is_alone: bool) -> None:
        self._model = model
        self._can_retry = model.takes_chunks and is_alone

    def run(self, step: Callable[[], dict[str, Tensor]], batch: Any) -> dict[str, Tensor]:
        """Return the losses of a step.

        Args:
            step: Function that computes losses and gradients.
            batch: The batch of the step; its random numbers are drawn again for each attempt.

        Raises:
            Exception: The error of a library that has no memory left, if more chunks do not help.
        """
        if not self._can_retry:
            return step()
        generator = getattr(batch, "generator", None)
        drawn = None if generator is None else generator.get_state()
        random = torch.get_rng_state()
        while True:
            try:
                return step()
            except Exception as error:
                if self._model.chunks >= _MOST_CHUNKS or not is_out_of_memory(error):
                    raise
                traceback.clear_frames(error.__traceback__)  # their variables keep tensors alive
            self._model.zero_grad(set_to_none=True)
            free_memory()
            self._model.chunks *= 2
            torch.set_rng_state(random)
            if generator is not None:
                generator.set_state(drawn)
