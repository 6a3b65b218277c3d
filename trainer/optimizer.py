"""The optimizers with their parameter groups, and the learning rate schedule.

``torch.optim.lr_scheduler.LambdaLR`` is not used: epochs differ in their number of steps, so the
learning rate is a function of :class:`TrainState`, which a checkpoint stores, and not of a step
counter alone.
"""

import math
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import AdamW, SparseAdam

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

    With ``item_updates=rows``, the tables of ``row_tables`` get sparse gradients, and Adam changes
    only the rows that have a gradient: their moments stay as they are in steps that do not read
    them, and weights do not decay (``torch.optim.SparseAdam``).

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
        tables = _row_tables(model) if config.item_updates == "rows" else []
        for table in tables:
            table.sparse = True
        grouped = {id(parameter) for group in own_groups for parameter in group["params"]}
        grouped |= {id(table.weight) for table in tables}
        groups = [
            {**group, "params": [p for p in group["params"] if id(p) not in grouped]}
            for group in model.parameter_groups(config)
        ]
        groups += own_groups
        self._config = config
        self._parameters = list(model.parameters())
        self.adamw = AdamW(groups, fused=True)
        self.rows: SparseAdam | None = None
        """Optimizer of the tables of ``row_tables``; ``None`` without one."""
        if tables:
            self.rows = SparseAdam([table.weight for table in tables], lr=config.lr)
        self._base_rates = [group["lr"] for group in self._groups]

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return self.adamw.param_groups + ([] if self.rows is None else self.rows.param_groups)

    @property
    def rates(self) -> dict[str, float]:
        """Learning rates as set last: ``lr``, and ``lr_2`` and so on of further groups."""
        groups = enumerate(self._groups, 1)
        return {f"lr_{number}" if number > 1 else "lr": group["lr"] for number, group in groups}

    def prepare(self, state: TrainState, steps: int) -> None:
        """Set the learning rates of the next step, and clear the gradients.

        Args:
            state: Position in the training.
            steps: Number of steps of the current epoch.
        """
        for group, rate in zip(self._groups, self._base_rates, strict=True):
            group["lr"] = scheduled(rate, self._config, state, steps)
        self.adamw.zero_grad(set_to_none=True)
        if self.rows is not None:
            self.rows.zero_grad(set_to_none=True)

    @property
    def parts(self) -> dict[str, torch.optim.Optimizer]:
        """Name in checkpoints -> optimizer."""
        parts: dict[str, torch.optim.Optimizer] = {"optimizer": self.adamw}
        return parts if self.rows is None else parts | {"rows": self.rows}

    @torch.no_grad()
    def clip(self) -> None:
        """Limit the norm of the gradient of all parameters to ``clip``."""
        if not self._config.clip:
            return
        gradients = [_values(p) for p in self._parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        torch._foreach_mul_(gradients, (self._config.clip / (norm + 1e-6)).clamp_max(1.0))

    def step(self) -> None:
        """Change the weights by their gradients."""
        self.adamw.step()
        if self.rows is not None:
            self.rows.step()


def _row_tables(model: Recommender) -> list[nn.Embedding]:
    return [table for table in model.row_tables() if table.weight.requires_grad]


def _values(parameter: nn.Parameter) -> Tensor:
    """Return the gradient, or the values of a sparse gradient, one for each of its rows."""
    gradient = parameter.grad
    assert gradient is not None
    if not gradient.is_sparse:
        return gradient
    parameter.grad = gradient.coalesce()
    return parameter.grad.values()


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
