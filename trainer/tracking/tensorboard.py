"""TensorBoard: an event file in the folder of the run."""

import shlex
from collections.abc import Mapping

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from trainer.tracking.base import TrackedRun, Tracker, markdown_table


class TensorBoard(Tracker):
    """Write scalars by epoch, the settings and the final table as texts, and the HParams tab."""

    def __init__(self, run: TrackedRun) -> None:
        self._run = run
        self._writer = SummaryWriter(str(run.folder / "tensorboard"))
        self._writer.add_text("settings", markdown_table(run.settings))

    @property
    def view(self) -> str:
        """Command that shows all runs of the warehouse."""
        return f"tensorboard --logdir {shlex.quote(str(self._run.folder.parent))}"

    def log(self, epoch: int, values: Mapping[str, float]) -> None:
        """Write one scalar for each value."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, epoch)
        self._writer.flush()

    def finish(self, table: Mapping[str, float], *, is_finished: bool) -> None:
        """Write the final table, and the settings with it for the HParams tab."""
        if table:
            self._writer.add_text("final", markdown_table(table))
            file_writer = self._writer.file_writer
            assert file_writer is not None
            for summary in hparams(dict(self._run.settings), dict(table)):
                file_writer.add_summary(summary)
            for name, value in table.items():
                self._writer.add_scalar(name, value)
        self._writer.close()
