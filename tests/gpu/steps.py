"""Steps a second of the training loop, the idle share of the GPU, and the bare products."""

from itertools import islice
from typing import Any

import torch

from tests.gpu import world
from tests.gpu.parts import Report, Setup
from tests.gpu.products import RecordedProducts
from tests.gpu.timing import best_seconds, free_bytes, rounded
from trainer.config import TrainConfig
from trainer.data.batches import Shard, TrainingData
from trainer.tasks.next_item import NextItem

MODELS = ("sasrec", "mmsrec", "pmmrec")
PRECISIONS = ("float32", "bf16")
_MOST = 64  # steps; all figures are of the same batches, whose windows differ in length


def run(setup: Setup, report: Report) -> None:
    """Report the figures of each model and precision, with the model's default settings."""
    data = world.training_data(setup)
    cases = [(name, precision) for precision in PRECISIONS for name in MODELS]
    for number, (name, precision) in enumerate(cases):
        pairs = (f"precision={precision}", *(world.SMALL_PAIRS if setup.small else ()))
        seconds = setup.seconds_left / (len(cases) - number)
        report(f"{name}, {precision}", measure(setup, data, name, pairs, 0.4 * seconds))
        free_bytes(setup.device)


def measure(
    setup: Setup, data: TrainingData, name: str, pairs: tuple[str, ...], seconds: float
) -> dict[str, Any]:
    """Return steps a second, the time of the bare products of a step, and the idle share.

    Args:
        setup: The machine.
        data: What is trained on.
        name: Name of a model.
        pairs: Its settings.
        seconds: Time for the steps.
    """
    task, config = world.next_item(name, data, pairs)
    first = world.warm_steps(setup)
    step, count = world.time_steps(setup, task, config, seconds, setup.size(_MOST, 2))
    products = _products(task, config, first, count)
    products_seconds = best_seconds(setup, products.alone(setup.device)) / count
    busy = _busy_seconds(task, config, first, count) if setup.device == "cuda" else None
    return {
        "batch size": config.batch_size,
        "steps": count,
        "chunks of a step": task.model.chunks,
        "steps a second": rounded(1 / step),
        "milliseconds a step": rounded(1e3 * step),
        "milliseconds of the bare products": rounded(1e3 * products_seconds),
        "step over products": rounded(step / products_seconds),
        "TFLOP a step": rounded(products.flops / count / 1e12),
        "idle share of the GPU": None if busy is None else rounded(max(0.0, 1 - busy / step)),
    }


def _products(task: NextItem, config: TrainConfig, first: int, count: int) -> RecordedProducts:
    """Return the products of losses and gradients, over the batches of the measured steps."""
    _, batches = task.epoch(config, 0, skip=first, shard=Shard())
    products = RecordedProducts()
    for batch in islice(batches, count):
        with products:
            with torch.autocast(task.data.device.type, torch.bfloat16, config.precision == "bf16"):
                loss = task.loss(batch)["loss"]
            loss.backward()
        task.model.zero_grad()
    return products


def _busy_seconds(task: NextItem, config: TrainConfig, first: int, count: int) -> float:
    """Return the mean seconds of a step in which the GPU computes or copies."""
    from torch.profiler import ProfilerActivity, profile

    profiler = profile(activities=[ProfilerActivity.CUDA])

    def on_step(step: int, steps: int) -> bool:
        if step == first:
            torch.cuda.synchronize()
            profiler.start()
        return step < first + count

    world.train(task, config, on_step)
    torch.cuda.synchronize()
    profiler.stop()
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events() or ()
        if str(event.device_type).endswith("CUDA")
    )
    return covered(spans) * 1e-6 / count


def covered(spans: list[tuple[float, float]]) -> float:
    """Return the length of the union of spans (start, end), which ascend by their start."""
    total, until = 0.0, float("-inf")
    for start, end in spans:
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total
