"""The losses of training steps, which stay on the device until several of them are read at once.

Reading a loss waits until the device has computed it. A step that reads none leaves the host free
to prepare the next step.
"""

import math
import time
from collections.abc import Mapping

import torch
from torch import Tensor

from features.errors import UserError
from trainer.checkpoint import TrainState
from trainer.distributed import all_reduce_mean, world_size

_STEPS_BETWEEN_READS = 20
_SECONDS_BETWEEN_READS = 1.0  # slow steps are read more often: the display stays current


class StepLosses:
    """The losses of an epoch; those of the last steps are not read yet.

    Args:
        state: Position in the training. :meth:`read` adds the losses to ``state.losses``.
        lr: Learning rate, for the error message.
    """

    def __init__(self, state: TrainState, lr: float) -> None:
        self._state = state
        self._lr = lr
        self._names: tuple[str, ...] = ()
        self._unread: list[Tensor] = []
        self._last_read = time.monotonic()

    def add(self, losses: Mapping[str, Tensor]) -> None:
        """Add the losses of the step that ``state`` has counted last; nothing is read.

        Args:
            losses: Scalars by name; in several processes, the shares of this process in the means.
        """
        self._names = tuple(losses)
        values = torch.stack([value.detach().float() for value in losses.values()])
        self._unread.append(all_reduce_mean(values))

    def read_if_due(self) -> bool:
        """Call :meth:`read` after steps 1, 21, 41 and so on of an epoch; return True if it was due.

        It is also due if a second has passed since the last time, unless there are several
        processes: all of them read after the same steps.
        """
        is_late = time.monotonic() - self._last_read > _SECONDS_BETWEEN_READS
        is_due = self._state.step % _STEPS_BETWEEN_READS == 1 or (is_late and world_size() == 1)
        if is_due:
            self.read()
        return is_due

    def read(self) -> None:
        """Wait for the losses that are not read, and add them to ``state.losses``.

        Raises:
            UserError: The value of ``loss`` is not finite. The message names the first such step.
        """
        state = self._state
        if not self._unread:
            return
        first = state.step - len(self._unread) + 1
        for step, values in enumerate(torch.stack(self._unread).tolist(), first):
            by_name = dict(zip(self._names, values, strict=True))
            if not math.isfinite(by_name["loss"]):
                raise UserError(
                    f"the loss is {by_name['loss']} in epoch {state.epoch + 1}, step {step};"
                    f" train again with a lower lr than {self._lr}"
                )
            for name, value in by_name.items():
                state.losses[name] = state.losses.get(name, 0.0) + value
        self._unread.clear()
        self._last_read = time.monotonic()

    @property
    def means(self) -> dict[str, float]:
        """Means by name over the steps of the epoch whose losses are read."""
        steps = max(1, self._state.step - len(self._unread))
        return {name: total / steps for name, total in self._state.losses.items()}
