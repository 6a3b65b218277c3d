"""A small training with trackers, for the tests of each tool."""

from collections.abc import Sequence

import torch

from features.warehouse import Warehouse
from tests.trainer import worlds
from trainer.checkpoint import read_tensors
from trainer.runs.run import Run
from trainer.runs.track import Tracking
from trainer.runs.train import TrainReport, train_run

WORLD = [[0, 1, 2, 3, target, 3] for target in (0, 2) * 6]
SMALL = ["dim=8", "hidden=8", "length=5", "epochs=3", "batch_size=4", "device=cpu", "warmup=100"]
SMALL += ["lr=0.001", "schedule=constant", "monitor_seen=filtered", "monitor=HR@10"]


def train(
    warehouse: Warehouse, trackers: Sequence[str], name: str = "r", *settings: str
) -> tuple[Run, TrainReport, list[str]]:
    """Prepare a world, train `sasrec` on it, and return what was printed as well."""
    if not warehouse.dataset_dir("world").exists():
        worlds.prepare(warehouse, WORLD, 6)
    run = worlds.begin(warehouse, "sasrec", "world", settings=[*SMALL, *settings], name=name)
    lines: list[str] = []
    tracking = Tracking(run, trackers, lines.append)
    report = None
    try:
        report = train_run(run, on_epoch=tracking.log)
    finally:
        tracking.finish(report)
    return run, report, lines


def weights(run: Run) -> dict[str, torch.Tensor]:
    """Return the best weights and the state of the last epoch."""
    tensors: dict[str, torch.Tensor] = {}
    for file in ("model.safetensors", "resume.safetensors"):
        values, _ = read_tensors(run.folder / file, "train again")
        tensors |= {f"{file}/{name}": value for name, value in values.items()}
    return tensors


def stored(run: Run, split: str, metric: str, seen: str) -> list[float]:
    """Return the values of a metric by epoch, from the metrics table of the run."""
    from trainer.runs.folder import stored_metrics

    return [
        row["value"]
        for row in stored_metrics(run.folder / "metrics.parquet")
        if (row["split"], row["metric"], row["seen"]) == (split, metric, seen)
    ]
