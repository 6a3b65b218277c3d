"""The training loop: optimizer steps, validation, checkpoints and early stopping."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from features.errors import UserError
from features.memory import trim_heap
from trainer.checkpoint import TrainState, load_state, save_state, save_weights
from trainer.config import TrainConfig
from trainer.data.batches import Shard, combine_seeds
from trainer.distributed import any_process, on_all_ranks, process_rank, world_size
from trainer.ema import ExponentialMovingAverage
from trainer.interruption import Abandoned, Interruption, handle_interruption
from trainer.optimizer import Optimizer
from trainer.step_losses import StepLosses
from trainer.step_memory import StepMemory
from trainer.tasks.base import Task, Validation

_SECONDS_BETWEEN_SAVES = 300.0  # a killed run loses at most this much training
_SECONDS_BETWEEN_TRIMS = 10.0  # free memory can grow for this long


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainProgress:
    """Progress of the training, for a live display."""

    epoch: int
    """Number of the epoch, from 1."""
    epochs: int
    """Largest number of epochs."""
    step: int
    """Finished steps of this epoch."""
    steps: int
    """All steps of this epoch."""
    loss: float
    """Mean loss over the steps of the epoch whose losses are read, see
    :class:`trainer.step_losses.StepLosses`."""
    loss_terms: dict[str, float]
    """The same means of the terms of the loss, by name; empty if the loss has a single term."""
    unit: str
    """Unit of ``rate``: windows or items."""
    rate: float
    """Units per second in this epoch, over all processes."""
    seconds_left: float
    """Estimated seconds until the end of this epoch, without validation."""
    metrics: dict[str, float]
    """Validation metrics, at the end of an epoch that was validated."""
    best_epoch: int
    """Epoch with the best validation, from 1; -1 before the first validation."""
    chunks: int = 1
    """Chunks in which a step is computed: more than 1 after a step that ran out of memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EpochRow:
    """The values of an epoch that the run's metrics table stores."""

    epoch: int
    """Number of the epoch, from 1."""
    losses: dict[str, float]
    """Means over the epoch, by name; ``loss`` is the minimised one."""
    metrics: dict[tuple[str, str], float]
    """As in :class:`trainer.tasks.base.Validation`; empty if the epoch was not validated."""
    users: int
    """Number of users, or of queries, that the metrics are means over."""
    is_last: bool = False
    """True for the last planned epoch."""
    rates: dict[str, float] = field(default_factory=dict)
    """Learning rates of the last step, see :attr:`trainer.optimizer.Optimizer.rates`."""
    seconds: float = field(default=0.0, compare=False)
    """Wall time of training and validation. For a resumed epoch it is extrapolated from the steps
    after the resume, and 0 if there was no such step."""


def fit(
    task: Task[Any],
    config: TrainConfig,
    folder: Path,
    identity: dict[str, Any],
    *,
    resume: bool = False,
    on_epoch: Callable[[EpochRow], None],
    on_progress: Callable[[TrainProgress], None],
) -> TrainState:
    """Train until early stopping, the last epoch, or an interrupt.

    Args:
        task: A recommender with the data that it learns from.
        config: Settings of the loop.
        folder: Folder for ``model.safetensors`` (the best weights by validation) and
            ``resume.safetensors``.
        identity: Identity of the run; a resumed checkpoint must have the same.
        resume: Continue from ``resume.safetensors``.
        on_epoch: Called with each finished epoch, before its weights are saved. It can remove
            results of older weights while the older weights are still the saved ones.
        on_progress: Called after each step.

    Returns:
        The state at the end; ``finished`` is false after an interrupt.

    Raises:
        UserError: The checkpoint to resume from cannot be used, or the training diverges.
    """
    model, is_first = task.model, process_rank() == 0
    if not any(parameter.requires_grad for parameter in model.parameters()):
        return _fit_without_steps(task, config, folder, identity, on_epoch, on_progress)
    device = next(model.parameters()).device
    shard = Shard(process_rank=process_rank(), world_size=world_size())
    config = _with_min_steps(config, task, shard)
    optimizer = Optimizer(model, config)
    average = ExponentialMovingAverage(model, config.average)
    state = TrainState()
    checkpoint = (folder / "resume.safetensors", model, optimizer.parts)
    if resume:
        state = load_state(*checkpoint, identity, average.values)
        best = folder / "model.safetensors"
        if state.best_epoch >= 0 and not best.exists():
            raise UserError(
                f"{best} is gone: the weights of epoch {state.best_epoch}, the best one, are lost;"
                f" remove {folder} and train again"
            )
    step_losses = StepLosses(state, config.lr)
    forward = _forward(task, config)
    memory = StepMemory(model, is_alone=world_size() == 1)
    is_alone = shard.world_size == 1  # the others would wait for a process that abandons its step

    saved: tuple[int, int] | None = None

    def save() -> None:
        nonlocal saved
        step_losses.read()  # raises an error, and nothing is saved, if a loss is not finite
        if is_first:
            save_state(*checkpoint, state, identity, average.values)
        saved = (state.epoch, state.step)

    def train(interruption: Interruption) -> None:
        """Run epochs until the training is finished or ``interruption`` has received a signal.

        Each epoch has optimizer steps, then the validation. The function updates ``state`` in
        place, and saves it after each epoch, every 300 seconds, and on a signal.
        """
        while state.epoch < config.epochs and not state.finished:
            with interruption.abandoned_on_signal(is_alone):
                total, batches = task.epoch(config, state.epoch, skip=state.step, shard=shard)
            assert total
            epoch_start = last_save = last_trim = now = time.monotonic()
            units = steps_done = 0
            while True:
                with interruption.abandoned_on_signal(is_alone):
                    batch = next(batches, None)
                    if batch is None:
                        break
                    optimizer.prepare(state, total)
                    if not is_first:  # dropout differs between processes; equal after a resume
                        seed = combine_seeds(config.seed, shard.process_rank, state.steps)
                        torch.manual_seed(seed)
                    losses = memory.run(partial(_gradients, forward, batch, config), batch)
                    optimizer.clip()
                optimizer.step()
                state.step += 1
                state.steps += 1
                step_losses.add(losses)
                average.update(state.steps)
                is_read = step_losses.read_if_due()
                steps_done += 1
                units += task.size(batch) * shard.world_size
                now = time.monotonic()
                pace = _Pace(total, units, steps_done, now - epoch_start)
                if is_first:
                    on_progress(_report(state, task, config, pace, step_losses.means))
                if any_process(interruption.is_received):
                    save()
                    return
                if is_read and now - last_trim > _SECONDS_BETWEEN_TRIMS:
                    trim_heap()
                    last_trim = now
                if is_read and now - last_save > _SECONDS_BETWEEN_SAVES:
                    save()
                    last_save = now

            step_losses.read()
            trim_heap()
            now = time.monotonic()
            if not checkpoint[0].exists():  # best weights without a state could not be resumed
                save()
            pace = _Pace(total, units, steps_done, now - epoch_start)
            with average.applied():
                row, validation = _validate(task, config, state, pace, interruption)
            if is_first:
                on_epoch(replace(row, rates=optimizer.rates))
            if validation is not None and _update_best(state, validation, row.epoch) and is_first:
                with average.applied():
                    save_weights(folder / "model.safetensors", model, identity)
            if is_first:
                on_progress(_report(state, task, config, pace, step_losses.means, validation))
            state.finished = state.waited >= config.patience or row.is_last
            state.epoch, state.step, state.losses = state.epoch + 1, 0, {}
            save()
            if any_process(interruption.is_received):
                return

    model.train()
    with handle_interruption(model, device) as interruption:
        try:
            train(interruption)
        except Abandoned:
            # Without a step, the run starts again.
            if state.steps and saved != (state.epoch, state.step):
                save()
    return state


def _with_min_steps(config: TrainConfig, task: Task[Any], shard: Shard) -> TrainConfig:
    """Return the settings with as many epochs as ``min_steps`` needs."""
    if not config.min_steps:
        return config
    steps, _ = task.epoch(config, 0, skip=0, shard=shard)
    return replace(config, epochs=max(config.epochs, -(-config.min_steps // steps)))


def _fit_without_steps(
    task: Task[Any],
    config: TrainConfig,
    folder: Path,
    identity: dict[str, Any],
    on_epoch: Callable[[EpochRow], None],
    on_progress: Callable[[TrainProgress], None],
) -> TrainState:
    """Validate and save a model that learns nothing by gradients."""
    state, pace = TrainState(), _Pace(0, 0, 0, 0.0)
    row, validation = _validate(task, replace(config, validate_every=1), state, pace, None)
    assert validation is not None
    _update_best(state, validation, row.epoch)
    if process_rank() == 0:
        on_epoch(row)
        save_weights(folder / "model.safetensors", task.model, identity)
        on_progress(_report(state, task, config, pace, {}, validation))
    state.epoch, state.finished = 1, True
    return state


def _update_best(state: TrainState, validation: Validation, epoch: int) -> bool:
    """Store a new best value or count a validation without one; return True if it is the best."""
    if validation.monitored > state.best:
        state.best, state.best_epoch, state.waited = validation.monitored, epoch, 0
        return True
    state.waited += 1
    return False


@dataclass(frozen=True, slots=True)
class _Pace:
    """The progress of an epoch since it started or was resumed."""

    steps: int
    """All steps of the epoch."""
    units: int
    """Finished units, over all processes."""
    steps_done: int
    """Finished steps."""
    seconds: float
    """Elapsed wall time."""


def _validate(
    task: Task[Any],
    config: TrainConfig,
    state: TrainState,
    pace: _Pace,
    interruption: Interruption | None,
) -> tuple[EpochRow, Validation | None]:
    """Return the values of the epoch, and the validation if this epoch is validated."""

    def measure() -> Any:
        with interruption.abandoned_on_signal() if interruption else nullcontext():
            return task.measure(config, shard)

    def join(measures: list[Any]) -> Validation:
        return task.join_measures(config, measures)

    began = time.monotonic()
    shard = Shard(process_rank=process_rank(), world_size=world_size())
    epoch = state.epoch + 1
    losses = {name: total / pace.steps for name, total in state.losses.items()}
    validation, metrics, users = None, {}, 0
    is_last = epoch == config.epochs
    if epoch % config.validate_every == 0 or is_last:
        validation = on_all_ranks(measure, join)
        metrics, users = validation.metrics, validation.users
    seconds = 0.0
    if pace.steps_done:
        seconds = pace.seconds * pace.steps / pace.steps_done + time.monotonic() - began
    row = EpochRow(
        epoch=epoch,
        losses=losses,
        metrics=metrics,
        users=users,
        is_last=is_last,
        seconds=seconds,
    )
    return row, validation


class _Forward(nn.Module):
    """Module that computes the loss of a task, for DistributedDataParallel."""

    def __init__(self, task: Task[Any]) -> None:
        super().__init__()
        self.model = task.model
        self._task = task

    def forward(self, batch: Any) -> dict[str, Tensor]:
        return self._task.loss(batch)


def _forward(task: Task[Any], config: TrainConfig) -> nn.Module:
    if config.compile:
        for module in task.model.compiled_parts():
            module.compile()
    forward = _Forward(task)
    return DistributedDataParallel(forward) if world_size() > 1 else forward


def _gradients(forward: nn.Module, batch: Any, config: TrainConfig) -> dict[str, Tensor]:
    """Return the losses of a step, and compute the gradients."""
    device = next(forward.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, config.precision == "bf16"):
        losses: dict[str, Tensor] = forward(batch)
    losses["loss"].backward()
    return losses


def _report(
    state: TrainState,
    task: Task[Any],
    config: TrainConfig,
    pace: _Pace,
    losses: dict[str, float],
    validation: Validation | None = None,
) -> TrainProgress:
    seconds = max(pace.seconds, 1e-9)
    return TrainProgress(
        epoch=state.epoch + 1,
        epochs=config.epochs,
        step=state.step,
        steps=pace.steps,
        loss=losses.get("loss", 0.0),
        loss_terms={name: mean for name, mean in losses.items() if name != "loss"},
        unit=task.unit,
        rate=pace.units / seconds,
        seconds_left=(pace.steps - state.step) * seconds / max(1, pace.steps_done),
        metrics=validation.shown if validation else {},
        best_epoch=state.best_epoch,
        chunks=task.model.chunks,
    )
