"""The optimizer's groups, and the learning rate as a function of where training is."""

import math

from torch.optim import AdamW

from trainer.checkpoint import TrainState
from trainer.config import TrainConfig
from trainer.finetune.upper_blocks import UpperBlocks
from trainer.models.base import Recommender


class Optimizer:
    """AdamW over a recommender's groups of parameters, whose rates one schedule scales.

    The blocks of a backbone are a group of their own, with ``tune_lr`` and ``tune_weight_decay``.
    """

    def __init__(self, model: Recommender, config: TrainConfig) -> None:
        groups = model.parameter_groups(config.lr, config.weight_decay)
        upper = [part for part in model.modules() if isinstance(part, UpperBlocks)]
        tuned = [parameter for part in upper for parameter in part.parameters()]
        if tuned:
            theirs = {id(parameter) for parameter in tuned}
            groups = [
                {**group, "params": [p for p in group["params"] if id(p) not in theirs]}
                for group in groups
            ]
            rates = {"lr": config.tune_lr, "weight_decay": config.tune_weight_decay}
            groups.append({"params": tuned, **rates})
        self._rates = [group["lr"] for group in groups]
        self._config = config
        self.adamw = AdamW(groups)

    def prepare(self, progress: TrainState, steps: int) -> None:
        """Make ready for the next step of an epoch of ``steps``: rates set, gradients gone."""
        for group, rate in zip(self.adamw.param_groups, self._rates, strict=True):
            group["lr"] = scheduled(rate, self._config, progress, steps)
        self.adamw.zero_grad(set_to_none=True)


def scheduled(rate: float, config: TrainConfig, progress: TrainState, steps: int) -> float:
    """The rate of the next step: a function of where training is, so that resuming keeps it.

    Args:
        rate: Of a group, before warm-up and schedule.
        config: Says which schedule.
        progress: Where training is.
        steps: Of an epoch.
    """
    if config.warmup:
        rate *= min(1.0, (progress.steps + 1) / config.warmup)
    share = (progress.epoch + progress.step / steps) / config.epochs
    if config.schedule == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * share))
    elif config.schedule == "linear":
        rate *= 1 - share
    elif config.schedule == "exponential":
        rate *= config.decay**progress.epoch
    return rate
