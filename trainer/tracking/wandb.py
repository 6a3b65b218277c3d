"""Weights & Biases: an offline folder in the folder of the run, for ``wandb sync``."""

import os
import shlex
from collections.abc import Mapping

import wandb

from trainer.tracking.base import TrackedRun, Tracker


class WeightsAndBiases(Tracker):
    """Write values by epoch, the settings as the configuration, the final table as a table.

    Nothing is sent unless ``WANDB_MODE=online`` is set. ``WANDB_PROJECT`` names the project.
    """

    def __init__(self, run: TrackedRun) -> None:
        self._folder = run.folder / "wandb"
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "mmrec"),
            id=run.key,
            name=run.name,
            dir=str(run.folder),
            mode="online" if os.environ.get("WANDB_MODE") == "online" else "offline",
            resume="allow",
            reinit="create_new",
            config=dict(run.settings),
            settings=wandb.Settings(console="off", silent=True, disable_git=True, save_code=False),
        )

    @property
    def view(self) -> str:
        """Command that sends the offline folders to a server."""
        return f"wandb sync {shlex.quote(str(self._folder))}/offline-run-*"

    def log(self, epoch: int, values: Mapping[str, float]) -> None:
        """Write the values at the step of the epoch."""
        self._run.log(dict(values), step=epoch, commit=True)

    def finish(self, table: Mapping[str, float], *, is_finished: bool) -> None:
        """Write the final table as a table and as the summary, and end the run."""
        if table:
            rows = [[name, value] for name, value in table.items()]
            self._run.log({"final": wandb.Table(columns=["name", "value"], data=rows)})
            self._run.summary.update(dict(table))
        self._run.finish(exit_code=0 if is_finished else 1)
