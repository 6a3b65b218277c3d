"""The runs of ``mmrec grid``: their list, and the progress of running them."""

from typing import TYPE_CHECKING

from cli import console
from features.warehouse import Warehouse
from trainer.runs.grid_file import Grid
from trainer.runs.grid_table import metric_value

if TYPE_CHECKING:
    from trainer.loop import TrainProgress
    from trainer.runs.grid import Outcome, Planned


def run_all(
    warehouse: Warehouse, spec: Grid, planned: "list[Planned]"
) -> "tuple[list[Outcome], BaseException | None]":
    """Run all combinations; return the outcomes, and the exception that ended the grid early."""
    from trainer.runs.grid import run_grid

    outcomes: list[Outcome] = []
    with console.ProgressLine() as line:
        progress = _GridProgress(spec, planned, line)
        try:
            for outcome in run_grid(warehouse, planned, on_progress=progress.show_step):
                outcomes.append(outcome)
                progress.show_outcome(outcome)
        except (Exception, KeyboardInterrupt) as error:  # the finished runs are printed first
            return outcomes, error
    return outcomes, None


class _GridProgress:
    """Progress of a grid: one live line, and one line that stays for each run that ended."""

    def __init__(self, spec: Grid, planned: "list[Planned]", line: console.ProgressLine) -> None:
        self._spec = spec
        self._planned = planned
        self._line = line
        self._durations: list[float] = []

    def show_step(self, number: int, step: "TrainProgress | str") -> None:
        """Show the state of the current run."""
        if not isinstance(step, str):
            step = f"epoch {step.epoch}/{step.epochs}  loss {step.loss:.4f}"
        self._line.update(f"{self._prefix(number)}: {step}", share=number / len(self._planned))

    def show_outcome(self, outcome: "Outcome") -> None:
        """Print the metrics of a run that ended and the estimated time left."""
        number = outcome.number
        if outcome.state == "failed":
            self._line.update(f"{self._prefix(number)}: failed: {outcome.message}", keep=True)
            return
        spec = self._spec
        values = outcome.cell_values(spec)
        figures = f"no {spec.targets} targets"
        if values is not None:
            figures = " ".join(
                f"{metric} {metric_value(values, metric) or 0:.4f}" for metric in spec.metrics
            )
        duration = "reused"
        if outcome.state == "finished":
            self._durations.append(outcome.seconds)
            mean = sum(self._durations) / len(self._durations)
            left = console.format_duration((len(self._planned) - number - 1) * mean)
            duration = f"{console.format_duration(outcome.seconds)}, {left} left"
        self._line.update(f"{self._prefix(number)}: {figures} ({duration})", keep=True)

    def _prefix(self, number: int) -> str:
        return f"{number + 1}/{len(self._planned)} {self._planned[number].combination.label}"


def list_runs(warehouse: Warehouse, spec: Grid, planned: "list[Planned]", json: bool) -> None:
    """Print the runs of a grid and their states."""
    from trainer.runs.grid import is_begun, is_done, run_name

    states = []
    for entry in planned:
        unfinished = "begun" if is_begun(warehouse, entry) else "new"
        if entry.pretraining is not None:
            unfinished = f"after {run_name(entry.pretraining)}"
        states.append("finished" if is_done(warehouse, entry) else unfinished)
    if json:
        runs = [
            {**entry.combination.keys, "run": entry.run, "state": state}
            for entry, state in zip(planned, states, strict=True)
        ]
        console.emit_json({"grid": str(spec.path), "runs": runs})
        return
    console.table(
        [*spec.combinations[0].keys, "run", "state"],
        [
            [*entry.combination.keys.values(), entry.run, state]
            for entry, state in zip(planned, states, strict=True)
        ],
    )
    console.notify(
        f"{len(planned)} runs, {states.count('finished')} of them finished; nothing was run"
    )
