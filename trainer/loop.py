"""The training loop, whole on one screen."""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from features.errors import UserError
from trainer.checkpoint import TrainState, load_state, save_state, save_weights
from trainer.config import TrainConfig
from trainer.data.batches import Shard, combine_seeds
from trainer.distributed import all_reduce_mean, on_rank_zero, process_rank, world_size
from trainer.ema import ExponentialMovingAverage
from trainer.modules.transformer import Transformer
from trainer.optimizer import Optimizer
from trainer.tasks.next_item import Task, Validation

_ONE_INTERRUPT = 1.0  # seconds in which signals are the same Ctrl-C
_SAVE_SECONDS = 300.0  # a killed run loses at most this, whatever an epoch takes


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainProgress:
    """One report of the loop to whoever shows progress."""

    epoch: int
    epochs: int
    step: int
    """Steps of this epoch that are done."""
    steps: int
    """Steps of this epoch in all."""
    loss: float
    """Mean over the epoch so far."""
    parts: dict[str, float]
    """The same of what the loss is made of, by name; empty where it is one thing."""
    unit: str
    """What the task counts: windows, items."""
    rate: float
    """Units a second in this epoch, of all processes."""
    left: float
    """Seconds that the rest of this epoch takes at this pace, its validation left out."""
    metrics: dict[str, float]
    """Validation metrics, at the end of an epoch that was validated."""
    best_epoch: int


@dataclass(frozen=True, kw_only=True, slots=True)
class EpochRow:
    """What the run's metrics table keeps of an epoch."""

    epoch: int
    losses: dict[str, float]
    """Means over the epoch, by name; ``loss`` is what was minimised."""
    metrics: dict[tuple[str, str], float]
    """As in :class:`trainer.tasks.next_item.Validation`; empty if not validated."""
    users: int
    seconds: float = field(default=0.0, compare=False)
    """Training and validation; of an epoch that was interrupted, at the pace of its last part, and
    0 where that part had no step. Two equal trainings take different times."""


def fit(
    task: Task[Any],
    config: TrainConfig,
    folder: Path,
    identity: dict[str, Any],
    *,
    resume: bool = False,
    on_epoch: Callable[[EpochRow], None],
    on_tick: Callable[[TrainProgress], None],
) -> TrainState:
    """Train until early stopping, the last epoch, or an interrupt.

    Args:
        task: A recommender with what it learns from.
        config: The loop's settings.
        folder: Gets ``model.safetensors`` (best by validation) and ``resume.safetensors``.
        identity: What a checkpoint is for; a resumed one must be for the same.
        resume: Go on from ``resume.safetensors``.
        on_epoch: Called with each finished epoch, before its weights are saved: whatever was
            written of older weights can go while these still stand.
        on_tick: Called after each step.

    Returns:
        Where training ended; ``finished`` is false after an interrupt.

    Raises:
        UserError: The checkpoint to go on from cannot be used, or the training diverges.
    """
    model, first = task.model, process_rank() == 0
    device = next(model.parameters()).device
    optimizer = Optimizer(model, config)
    average = ExponentialMovingAverage(model, config.average)
    progress = TrainState()
    state = (folder / "resume.safetensors", model, optimizer.adamw)
    if resume:
        progress = load_state(*state, identity, average.values)
        best = folder / "model.safetensors"
        if progress.best_epoch >= 0 and not best.exists():
            raise UserError(
                f"{best} is gone: the weights of epoch {progress.best_epoch}, the best one, cannot"
                f" be had back; remove {folder} and train again"
            )
    forward = _forward(task, config)
    shard = Shard(process_rank=process_rank(), world_size=world_size())

    def save() -> None:
        if first:
            save_state(*state, progress, identity, average.values)

    model.train()
    with _interrupted() as stop:
        while progress.epoch < config.epochs and not progress.finished:
            total, batches = task.epoch(config, progress.epoch, skip=progress.step, shard=shard)
            assert total
            clock = saved = now = time.monotonic()
            units = done = 0
            for batch in batches:
                optimizer.prepare(progress, total)
                if not first:  # dropout of its own, the same after a resume: it saves no state
                    torch.manual_seed(
                        combine_seeds(config.seed, shard.process_rank, progress.steps)
                    )
                with torch.autocast(device.type, torch.bfloat16, config.precision == "bf16"):
                    losses = forward(batch)
                losses["loss"].backward()
                if config.clip:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
                values = torch.stack([value.detach().float() for value in losses.values()])
                means, stopped = all_reduce_mean(values.tolist(), stop.is_set(), device)
                named = dict(zip(losses, means, strict=True))
                value = named["loss"]
                if not math.isfinite(value):
                    raise UserError(
                        f"the loss is {value} in epoch {progress.epoch + 1}, step"
                        f" {progress.step + 1}; train again with a lower lr than {config.lr}"
                    )
                optimizer.adamw.step()
                progress.step += 1
                progress.steps += 1
                average.update(progress.steps)
                for name, value in named.items():
                    progress.losses[name] = progress.losses.get(name, 0.0) + value
                done += 1
                units += task.size(batch) * shard.world_size
                now = time.monotonic()
                if first:
                    on_tick(_tick(progress, task, config, total, units, done, now - clock, None))
                if stopped or (shard.world_size == 1 and stop.is_set()):
                    save()
                    return progress
                if now - saved > _SAVE_SECONDS:
                    save()
                    saved = now

            with average.applied():
                row, found = _validate(task, config, progress, total, done, now - clock)
            if first:
                on_epoch(row)
            if found is not None:
                if found.monitored > progress.best:
                    progress.best, progress.best_epoch = found.monitored, row.epoch
                    progress.waited = 0
                    if first:
                        with average.applied():
                            save_weights(folder / "model.safetensors", model, identity)
                else:
                    progress.waited += 1
            if first:
                on_tick(_tick(progress, task, config, total, units, done, now - clock, found))
            progress.finished = progress.waited >= config.patience or row.epoch == config.epochs
            progress.epoch, progress.step, progress.losses = progress.epoch + 1, 0, {}
            save()
            if all_reduce_mean([], stop.is_set(), device)[1]:
                break
    return progress


def _validate(
    task: Task[Any],
    config: TrainConfig,
    progress: TrainState,
    steps: int,
    done: int,
    seconds: float,
) -> tuple[EpochRow, Validation | None]:
    """Validate when it is time; ``done`` steps of this epoch took ``seconds`` in this process."""
    began = time.monotonic()
    epoch = progress.epoch + 1
    losses = {name: total / steps for name, total in progress.losses.items()}
    found, metrics, users = None, {}, 0
    if epoch % config.validate_every == 0 or epoch == config.epochs:
        found = on_rank_zero(lambda: task.validate(config))
        metrics, users = found.metrics, found.users
    took = seconds * steps / done + time.monotonic() - began if done else 0.0
    row = EpochRow(epoch=epoch, losses=losses, metrics=metrics, users=users, seconds=took)
    return row, found


class _Forward(nn.Module):
    """A task's loss as a module: what DistributedDataParallel wraps."""

    def __init__(self, task: Task[Any]) -> None:
        super().__init__()
        self.model = task.model
        self._task = task

    def forward(self, batch: Any) -> dict[str, Tensor]:
        return self._task.loss(batch)


def _forward(task: Task[Any], config: TrainConfig) -> nn.Module:
    if config.compile:
        for module in task.model.modules():
            if isinstance(module, Transformer):
                module.compile()
    whole = _Forward(task)
    return DistributedDataParallel(whole) if world_size() > 1 else whole


def _tick(
    progress: TrainState,
    task: Task[Any],
    config: TrainConfig,
    steps: int,
    units: int,
    done: int,
    seconds: float,
    found: Validation | None,
) -> TrainProgress:
    seconds = max(seconds, 1e-9)
    step = max(1, progress.step)
    return TrainProgress(
        epoch=progress.epoch + 1,
        epochs=config.epochs,
        step=progress.step,
        steps=steps,
        loss=progress.losses.get("loss", 0.0) / step,
        parts={name: v / step for name, v in progress.losses.items() if name != "loss"},
        unit=task.unit,
        rate=units / seconds,
        left=(steps - progress.step) * seconds / max(1, done),
        metrics=found.shown if found else {},
        best_epoch=progress.best_epoch,
    )


@contextmanager
def _interrupted() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into an event that is looked at between two steps; the second raises.

    A step is never torn, so what is saved is a state that the uninterrupted run went through. At a
    terminal ``torchrun`` passes on what its processes have had already: within a second, it is one.
    """
    event = threading.Event()
    first = 0.0
    if threading.current_thread() is not threading.main_thread():
        yield event  # signals belong to the main thread
        return

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if event.is_set() and time.monotonic() - first > _ONE_INTERRUPT:
            raise KeyboardInterrupt
        first = first if event.is_set() else time.monotonic()
        event.set()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)
