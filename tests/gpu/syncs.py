"""Count how often a training step waits for the GPU."""

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from tests.gpu import world
from tests.gpu.parts import Report, Setup, Skip
from trainer.config import TrainConfig
from trainer.tasks.next_item import NextItem

MODELS = ("sasrec", "mmsrec", "mmsr", "pmmrec")
_WARM, _COUNTED = 5, 40  # steps; losses are read every 20
_WARNING = "called a synchronizing CUDA operation"
_PLACES = 8  # most lines of code that are reported
_ROOT = Path(__file__).parents[2]


def run(setup: Setup, report: Report) -> None:
    """Report the waits of each model: their number in a step, and the lines that wait most."""
    data = world.training_data(setup)
    for name in MODELS:
        task, config = world.next_item(name, data, world.SMALL_PAIRS if setup.small else ())
        report(name, count_waits(setup, task, config))
    if setup.device != "cuda":
        raise Skip("no GPU: the steps have run, and nothing counts their waits")


def count_waits(setup: Setup, task: NextItem, config: TrainConfig) -> dict[str, Any]:
    """Return the steps of the training loop, and the waits that CUDA warns of."""
    is_on_gpu, finished = setup.device == "cuda", 0
    warm, counted = setup.size(_WARM, 1), setup.size(_COUNTED, 2)

    def on_step(step: int, steps: int) -> bool:
        nonlocal finished
        if step == warm and is_on_gpu:
            torch.cuda.set_sync_debug_mode("warn")
        finished = step - warm
        return step < min(warm + counted, steps - 1)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            world.train(task, config, on_step)
        finally:
            if is_on_gpu:
                torch.cuda.set_sync_debug_mode("default")
    waits = [entry for entry in caught if _WARNING in str(entry.message)]
    places = Counter(_place(entry) for entry in waits)
    return {
        "steps": finished,
        "waits a step": round(len(waits) / max(1, finished), 3) if is_on_gpu else None,
        "places": dict(places.most_common(_PLACES)),
    }


def _place(entry: warnings.WarningMessage) -> str:
    """Return the file, relative to the repository, and the line that has waited."""
    path = Path(entry.filename)
    name = path.relative_to(_ROOT) if path.is_relative_to(_ROOT) else Path(*path.parts[-3:])
    return f"{name}:{entry.lineno}"
