"""The training loop, whole on one screen."""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from features.dataset import Dataset
from features.errors import UserError
from features.splits import MIN_EVALUATED
from retrieval.metrics import per_user
from retrieval.ranking import rank
from trainer.checkpoint import Progress, load_state, save_state, save_weights
from trainer.config import TrainConfig
from trainer.data import TrainingData
from trainer.recommender import Recommender
from trainer.scoring import encode, seen_by, targets_of

_SAVE_SECONDS = 300.0  # a killed run loses at most this, whatever an epoch takes


@dataclass(frozen=True, kw_only=True, slots=True)
class Tick:
    """One report of the loop to whoever shows progress."""

    epoch: int
    epochs: int
    step: int
    """Steps of this epoch that are done."""
    steps: int
    """Steps of this epoch in all."""
    loss: float
    """Mean over the epoch so far."""
    rate: float
    """Windows a second in this epoch."""
    left: float
    """Seconds that the rest of this epoch takes at this pace, its validation left out."""
    metrics: dict[str, float]
    """Validation metrics, at the end of an epoch that was validated."""
    best_epoch: int


@dataclass(frozen=True, kw_only=True, slots=True)
class EpochRow:
    """What the run's metrics table keeps of an epoch."""

    epoch: int
    loss: float
    metrics: dict[tuple[str, str], float]
    """(``masked`` | ``unmasked``, metric) -> value on validation; empty if not validated."""
    users: int


def fit(
    model: Recommender,
    data: TrainingData,
    config: TrainConfig,
    folder: Path,
    identity: dict[str, Any],
    *,
    resume: bool = False,
    on_epoch: Callable[[EpochRow], None],
    on_tick: Callable[[Tick], None],
) -> Progress:
    """Train until early stopping, the last epoch, or an interrupt.

    Args:
        model: On the device of ``data``.
        data: Training interactions and features that :func:`check_trainable` let pass;
            validation is read, test never.
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
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.lr, weight_decay=config.weight_decay
    )
    progress = Progress()
    if resume:
        progress = load_state(folder / "resume.safetensors", model, optimizer, identity)

    def save() -> None:
        save_state(folder / "resume.safetensors", model, optimizer, progress, identity)

    model.train()
    with _interrupted() as stop:
        while progress.epoch < config.epochs and not progress.finished:
            total, batches = data.epoch(
                model.plan,
                batch_size=config.batch_size,
                seed=config.seed,
                epoch=progress.epoch,
                skip=progress.step,
            )
            assert total
            clock = saved = now = time.monotonic()
            windows = done = 0
            for batch in batches:
                for group in optimizer.param_groups:
                    group["lr"] = _rate(config, progress, total)
                optimizer.zero_grad(set_to_none=True)
                loss = model.loss(batch)["loss"]
                loss.backward()
                if config.clip:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
                value = loss.item()
                if not math.isfinite(value):
                    raise UserError(
                        f"the loss is {value} in epoch {progress.epoch + 1}, step"
                        f" {progress.step + 1}; train again with a lower lr than {config.lr}"
                    )
                optimizer.step()
                progress.step += 1
                progress.steps += 1
                progress.loss_sum += value
                done += 1
                windows += len(batch.sequences.lengths_B)
                now = time.monotonic()
                on_tick(_tick(progress, config, total, windows, done, now - clock, {}))
                if stop.is_set():
                    save()
                    return progress
                if now - saved > _SAVE_SECONDS:
                    save()
                    saved = now

            row = _validate(model, data, config, progress, total)
            on_epoch(row)
            if row.metrics:
                value = row.metrics[config.monitor_seen, config.metric]
                if value > progress.best:
                    progress.best, progress.best_epoch, progress.waited = value, row.epoch, 0
                    save_weights(folder / "model.safetensors", model, identity)
                else:
                    progress.waited += 1
            shown = {
                metric: value
                for (seen, metric), value in row.metrics.items()
                if seen == config.monitor_seen
            }
            on_tick(_tick(progress, config, total, windows, done, now - clock, shown))
            progress.finished = progress.waited >= config.patience or row.epoch == config.epochs
            progress.epoch, progress.step, progress.loss_sum = progress.epoch + 1, 0, 0.0
            save()
            if stop.is_set():
                break
    return progress


def _validate(
    model: Recommender, data: TrainingData, config: TrainConfig, progress: Progress, steps: int
) -> EpochRow:
    epoch, loss = progress.epoch + 1, progress.loss_sum / steps
    if epoch % config.validate_every and epoch != config.epochs:
        return EpochRow(epoch=epoch, loss=loss, metrics={}, users=0)
    encoded = encode(model, data, "validation", config.eval_batch)
    held = encoded.held
    ranks = rank(
        encoded.queries_ED,
        encoded.items_ND,
        targets_of(data.dataset, held),
        seen_by(data.dataset, held),
    )
    metrics = {
        (seen, name): float(values.mean())
        for seen, found in (("unmasked", ranks.unmasked), ("masked", ranks.masked))
        for name, values in per_user(found).items()
    }
    return EpochRow(epoch=epoch, loss=loss, metrics=metrics, users=len(held.users))


def check_trainable(dataset: Dataset) -> None:
    """Refuse interactions that are too few, before any work is done.

    Raises:
        UserError: Nothing could be learned, or nothing evaluated.
    """
    about = f"dataset {dataset.info.name!r}"
    if not len(dataset.held("validation").users):
        raise UserError(
            f"{about}: no user has {MIN_EVALUATED} interactions, so nothing can be validated or"
            " tested; prepare it with more"
        )
    if not (dataset.train_ends() - dataset.offsets[:-1] >= 2).any():
        raise UserError(
            f"{about}: no user has two training interactions, so nothing can be learned;"
            " prepare it with more"
        )


def _rate(config: TrainConfig, progress: Progress, steps: int) -> float:
    """The learning rate of the next step: a function of where training is, so resuming keeps it."""
    rate = config.lr
    if config.warmup:
        rate *= min(1.0, (progress.steps + 1) / config.warmup)
    if config.schedule == "cosine":
        share = (progress.epoch + progress.step / steps) / config.epochs
        rate *= 0.5 * (1 + math.cos(math.pi * share))
    return rate


def _tick(
    progress: Progress,
    config: TrainConfig,
    steps: int,
    windows: int,
    done: int,
    seconds: float,
    metrics: dict[str, float],
) -> Tick:
    seconds = max(seconds, 1e-9)
    return Tick(
        epoch=progress.epoch + 1,
        epochs=config.epochs,
        step=progress.step,
        steps=steps,
        loss=progress.loss_sum / max(1, progress.step),
        rate=windows / seconds,
        left=(steps - progress.step) * seconds / max(1, done),
        metrics=metrics,
        best_epoch=progress.best_epoch,
    )


@contextmanager
def _interrupted() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into an event that is looked at between two steps; the second raises.

    A step is never torn, so what is saved is a state that the uninterrupted run went through.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event  # signals belong to the main thread
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)
