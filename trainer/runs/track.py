"""Show a training in trackers: the values of each epoch, and the final table."""

import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from trainer.loop import EpochRow
from trainer.runs.folder import SECONDS, read_about, stored_metrics
from trainer.runs.run import Run
from trainer.runs.train import TrainReport
from trainer.setting_sources import settings_tables
from trainer.tracking.base import Scalar, TrackedRun
from trainer.tracking.registry import TRACKERS

if TYPE_CHECKING:
    from trainer.tracking.base import Tracker


class Tracking:
    """The trackers of one training.

    A tracker that raises an exception is left out from then on, and the training goes on. Trackers
    do not change the training: the state of torch's random numbers on the CPU is restored.

    Args:
        run: The run.
        names: Names in :data:`trainer.tracking.registry.TRACKERS`; their packages are imported.
        notify: Called with each line for the user.
    """

    def __init__(self, run: Run, names: Sequence[str], notify: Callable[[str], None]) -> None:
        self._run = run
        self._notify = notify
        self._trackers: dict[str, Tracker] = {}
        if not names:
            return
        tracked = _tracked_run(run)
        for name in names:
            with self._isolated(name):
                self._trackers[name] = TRACKERS.find(name).load()(tracked)

    def log(self, row: EpochRow) -> None:
        """Write the values of an epoch."""
        if not self._trackers:
            return
        values = _epoch_values(row)
        for name, tracker in list(self._trackers.items()):
            with self._isolated(name):
                tracker.log(row.epoch, values)

    def finish(self, report: TrainReport | None) -> None:
        """Write the final table, close all trackers, and notify of where the values are.

        Args:
            report: The result of the training; ``None`` if it failed.
        """
        if not self._trackers:
            return
        table = {} if report is None else self._final_table(report)
        for name, tracker in list(self._trackers.items()):
            with self._isolated(name):
                tracker.finish(table, is_finished=report is not None and report.finished)
                self._notify(f"tracked by {name}: {tracker.view}")

    @contextmanager
    def _isolated(self, name: str) -> Iterator[None]:
        """Leave a tracker out if the body fails."""
        try:
            with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
                warnings.simplefilter("ignore")
                yield
        except Exception as error:
            self._trackers.pop(name, None)
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            self._notify(f"{name} tracks no longer ({reason}); the training is not affected")

    def _final_table(self, report: TrainReport) -> dict[str, float]:
        table = {
            f"best/{row['seen']}/{row['metric']}"
            if row["targets"] == "all"
            else f"best/{row['targets']}/{row['metric']}": row["value"]
            for row in stored_metrics(self._run.folder / "metrics.parquet")
            if (row["phase"], row["split"]) == ("train", "validation")
            and row["epoch"] == report.best_epoch
        }
        return {
            **table,
            "best/epoch": report.best_epoch,
            "final/epochs": report.epochs,
            "final/seconds": report.seconds,
            "final/parameters": report.parameters,
        }


def _epoch_values(row: EpochRow) -> dict[str, float]:
    """Return the values of an epoch by the names that trackers show."""
    return {
        **{f"train/{name}": value for name, value in row.losses.items()},
        **({f"train/{SECONDS}": row.seconds} if row.seconds else {}),
        **{f"rate/{name}": value for name, value in row.rates.items()},
        **{f"validation/{kind}/{metric}": value for (kind, metric), value in row.metrics.items()},
    }


def _tracked_run(run: Run) -> TrackedRun:
    spec = run.spec
    settings: dict[str, Scalar] = {
        "model": spec.model,
        "dataset": spec.dataset,
        "features": ",".join(spec.features),
        "init": "" if spec.init is None else spec.init.run,
    }
    for table in settings_tables(spec.train, spec.settings, spec.task_settings).values():
        settings |= {
            name: value if isinstance(value, Scalar) else str(value)
            for name, value in table.items()
        }
    created = read_about(run.folder / "config.toml").get("created", "")
    digest = hashlib.sha256(f"{run.name} {created}".encode()).hexdigest()[:8]
    return TrackedRun(
        name=run.name,
        key=f"{run.name}-{digest}",
        folder=run.folder,
        shared=run.warehouse.root,
        settings=settings,
    )
