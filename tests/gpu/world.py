"""A random dataset with features on a device, and trainings on it with the project's loop."""

import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from tests.benchmarks.bench_training import histories
from tests.gpu.parts import Setup
from tests.gpu.timing import synchronize
from tests.trainer import worlds
from trainer.config import TrainConfig
from trainer.data.batches import ItemFeatures, TrainingData
from trainer.loop import TrainProgress, fit
from trainer.models.base import Catalogue, Recommender
from trainer.models.registry import MODELS
from trainer.runs.settings import resolve_automatic, resolve_settings
from trainer.setting_sources import SettingSources
from trainer.tasks.base import Task
from trainer.tasks.next_item import NextItem

WIDTH = 512  # of the features of an image and of a text, as CLIP ViT-B/32 has
SMALL_PAIRS = ("dim=16", "batch_size=8")


class _EnoughError(Exception):
    """Ends a training from its callback."""


def random_features(n_items: int, width: int, device: str) -> ItemFeatures:
    """Return random images and texts of all items, in the float16 of feature tables."""
    generator = torch.Generator(device).manual_seed(0)
    vectors, present = {}, {}
    for name in ("image", "text"):
        vectors[name] = torch.randn(
            n_items, width, device=device, dtype=torch.float16, generator=generator
        )
        present[name] = torch.ones(n_items, dtype=torch.bool, device=device)
    return ItemFeatures(n_items=n_items, vectors=vectors, present=present)


def training_data(setup: Setup) -> TrainingData:
    """Return 40,000 users with histories of at most 20 items, of 12,101 items with features.

    The number of items is that of Amazon Beauty, with which ``bench_training`` measures a CPU.
    """
    items, users = setup.size(12_101, 50), setup.size(40_000, 60)
    features = random_features(items, setup.size(WIDTH, 8), setup.device)
    world = worlds.dataset(histories(users, items, 20), items)
    return TrainingData(world, features, torch.device(setup.device))


def build(
    name: str,
    catalogue: Catalogue,
    device: str,
    pairs: tuple[str, ...] = (),
    *,
    is_pretraining: bool = False,
    preset: str | None = None,
) -> tuple[Recommender, tuple[Any, ...]]:
    """Create a model on the device.

    Args:
        name: Name of the model.
        catalogue: What it is built for.
        device: ``cuda`` or ``cpu``.
        pairs: Settings as ``--set`` takes them.
        is_pretraining: Take the defaults of the pre-training.
        preset: Name of a preset.

    Returns:
        The model, and the settings of the loop, of the model and of the task, if it has any.
    """
    recommender = MODELS.find(name).load()
    sources = SettingSources(preset=preset, pairs=pairs)
    train, settings, *others = resolve_settings(recommender, is_pretraining, sources)
    train, settings, _ = resolve_automatic(train, settings, catalogue.n_items)
    torch.manual_seed(train.seed)
    return recommender(settings, catalogue).to(device), (train, settings, *others)


def next_item(
    name: str, data: TrainingData, pairs: tuple[str, ...] = ()
) -> tuple[NextItem, TrainConfig]:
    """Return the training of a model with its defaults, and the settings of its loop."""
    is_of_ids = not MODELS.find(name).load().needs_features
    catalogue = Catalogue(
        n_items=data.features.n_items,
        n_users=len(data.dataset.offsets) - 1,
        widths={} if is_of_ids else data.features.widths,
    )
    model, (config, *_) = build(name, catalogue, data.device.type, pairs)
    model.fit_buffers(data.features, data.train)
    return NextItem(model, data), config


def train(task: Task[Any], config: TrainConfig, on_step: Callable[[int, int], bool]) -> None:
    """Train with the project's loop, until a callback has enough.

    Args:
        task: What is trained.
        config: Settings of the loop.
        on_step: Called after each step with the number of finished steps, from 1, and the number of
            steps of the epoch; it returns False to end the training.
    """

    def on_progress(progress: TrainProgress) -> None:
        if not on_step(progress.step, progress.steps):
            raise _EnoughError

    with TemporaryDirectory() as folder:
        try:
            fit(
                task, config, Path(folder), {},
                on_epoch=lambda row: None, on_progress=on_progress,
            )  # fmt: skip
        except _EnoughError:
            return


def warm_steps(setup: Setup) -> int:
    """Return the number of steps before the first one that is measured."""
    return setup.size(5, 1)


def time_steps(
    setup: Setup, task: Task[Any], config: TrainConfig, seconds: float, most: int
) -> tuple[float, int]:
    """Return the mean wall seconds of the steps after those that warm up, and their number.

    Args:
        setup: The machine.
        task: What is trained. The steps end before its first epoch does.
        config: Settings of the loop.
        seconds: Time after which no further step starts.
        most: Most steps that are measured.
    """
    began, first, last = 0.0, warm_steps(setup), 0

    def on_step(step: int, steps: int) -> bool:
        nonlocal began, last
        if step == first:
            synchronize(setup.device)
            began = time.perf_counter()
        last = step
        is_late = step > first and time.perf_counter() - began > seconds
        return not is_late and step < min(steps - 1, first + most)

    train(task, config, on_step)
    synchronize(setup.device)
    steps = max(1, last - first)
    return (time.perf_counter() - began) / steps, steps
