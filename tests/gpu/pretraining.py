"""MMSRec's pre-training with the paper's settings, on random pairs that are held on the GPU."""

from typing import Any

import numpy as np
import torch

from features.memory import is_out_of_memory
from tests.gpu import world
from tests.gpu.parts import Report, Setup
from tests.gpu.timing import free_bytes, rounded
from trainer.models.base import Catalogue
from trainer.tasks.alignment import Alignment

PAIRS = 10_000_000
EPOCHS = 15
_HOLDOUT = 100  # pairs to validate on, and to test on; training must leave out some
_SHARE_OF_FEATURES = 0.55  # of the free memory
_LEAST_BATCH = 1_000
_SMALL = ("dim=16", "hidden=16", "heads=2")


def run(setup: Setup, report: Report) -> None:
    """Report the pairs a second in bfloat16 and in float32, and the hours of 15 epochs."""
    width = setup.size(world.WIDTH, 8)
    fitting = _SHARE_OF_FEATURES * free_bytes(setup.device) / (2 * 2 * width)
    pairs = int(min(setup.size(PAIRS, 600), fitting))
    report("pairs on the device", pairs)
    features = world.random_features(pairs, width, setup.device)
    splits = {name: np.zeros(pairs, dtype=np.bool_) for name in ("validation", "test")}
    splits["validation"][:_HOLDOUT] = splits["test"][_HOLDOUT : 2 * _HOLDOUT] = True
    catalogue = Catalogue(n_items=pairs, n_users=1, widths=features.widths)
    for number, precision in enumerate(("bf16", "float32")):
        batch_size = setup.size(48_000, 100)
        seconds = setup.seconds_left / (2 - number)
        while batch_size >= setup.size(_LEAST_BATCH, 1):
            settings = (f"precision={precision}", f"batch_size={batch_size}")
            key = f"{precision}, batches of {batch_size:,}"
            model, (config, _, align) = world.build(
                "mmsrec",
                catalogue,
                setup.device,
                settings + (_SMALL if setup.small else ()),
                is_pretraining=True,
                preset="published",
            )
            task = Alignment(model, features, splits, align)
            if setup.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            try:
                step, _ = world.time_steps(setup, task, config, 0.7 * seconds, setup.size(100, 2))
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                report(key, "out of memory")
                batch_size //= 2
            else:
                chunks = {"chunks of a step": model.chunks}
                report(key, _figures(setup, batch_size, step) | chunks)
                break
            finally:
                del model, task
                free_bytes(setup.device)


def _figures(setup: Setup, batch_size: int, step: float) -> dict[str, Any]:
    samples = batch_size / step
    return {
        "milliseconds a step": rounded(1e3 * step),
        "pairs a second": rounded(samples),
        "hours for 15 epochs of 10 million": rounded(EPOCHS * PAIRS / samples / 3600),
        "GiB at most": (
            rounded(torch.cuda.max_memory_allocated() / 2**30) if setup.device == "cuda" else None
        ),
    }
