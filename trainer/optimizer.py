"""The optimizer with its parameter groups, and the learning rate schedule.

``torch.optim.lr_scheduler.LambdaLR`` is not used: epochs differ in their number of steps, so the
learning rate is a function of :class:`TrainState`, which a checkpoint stores, and not of a step
counter alone.
"""

import math
from typing import Any, Protocol, runtime_checkable

from torch.optim import AdamW

from trainer.checkpoint import TrainState
from trainer.config import TrainConfig
from trainer.models.base import Recommender


@runtime_checkable
class HasParameterGroup(Protocol):
    """A module of a recommender whose parameters have a group of their own in the optimizer."""

    def parameter_group(self, config: TrainConfig) -> dict[str, Any]:
        """Return ``params``, and their own ``lr`` and ``weight_decay``."""


class Optimizer:
    """AdamW over the parameter groups of a recommender; one schedule scales all learning rates.

    Args:
        model: Its own groups are those of ``parameter_groups``, less the parameters of modules with
            a :class:`HasParameterGroup`, whose groups follow.
        config: Learning rate, weight decay and schedule.
    """

    def __init__(self, model: Recommender, config: TrainConfig) -> None:
        own_groups = [
            module.parameter_group(config)
            for module in model.modules()
            if isinstance(module, HasParameterGroup)
        ]
        grouped = {id(parameter) for group in own_groups for parameter in group["params"]}
        groups = [
            {**group, "params": [p for p in group["params"] if id(p) not in grouped]}
            for group in model.parameter_groups(config)
        ]
        groups += own_groups
        self._base_rates = [group["lr"] for group in groups]
        self._config = config
        self.adamw = AdamW(groups)

    @property
    def rates(self) -> dict[str, float]:
        """Learning rates as set last: ``lr``, and ``lr_2`` and so on of further groups."""
        groups = enumerate(self.adamw.param_groups, 1)
        return {f"lr_{number}" if number > 1 else "lr": group["lr"] for number, group in groups}

    def prepare(self, state: TrainState, steps: int) -> None:
        """Set the learning rates of the next step, and clear the gradients.

        Args:
            state: Position in the training.
            steps: Number of steps of the current epoch.
        """
        for group, rate in zip(self.adamw.param_groups, self._base_rates, strict=True):
            group["lr"] = scheduled(rate, self._config, state, steps)
        self.adamw.zero_grad(set_to_none=True)


def scheduled(rate: float, config: TrainConfig, state: TrainState, steps: int) -> float:
    """Return the learning rate of the next step, a function of the position in the training.

    Args:
        rate: Learning rate of a group before warm-up and schedule.
        config: Warm-up and schedule.
        state: Position in the training.
        steps: Number of steps of the current epoch.
    """
    if config.warmup:
        rate *= min(1.0, (state.steps + 1) / config.warmup)
    epochs_of_decay = max(0.0, state.epoch + state.step / steps - config.decay_from)
    share_done = epochs_of_decay / max(1, config.epochs - config.decay_from)
    if config.schedule == "cosine":
        remaining = 0.5 * (1 + math.cos(math.pi * share_done))
        rate *= config.decay_to + (1 - config.decay_to) * remaining
    elif config.schedule == "linear":
        rate *= config.decay_to + (1 - config.decay_to) * (1 - share_done)
    elif config.schedule == "exponential":
        rate *= config.decay ** max(0, state.epoch - config.decay_from)
    elif config.schedule == "step" and state.epoch >= config.decay_from:
        rate *= config.decay
    return rate
