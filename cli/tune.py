"""``mmrec tune``: search the settings of a model by the validation split."""

import shlex
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli import console
from cli.options import JsonOption, WarehouseOption
from features.errors import UserError
from features.extras import require_extra
from features.signals import exit_code
from features.warehouse import Warehouse
from trainer.runs.tune_file import Search, read_search, value_text

if TYPE_CHECKING:
    from trainer.loop import TrainProgress
    from trainer.runs.tune import TrialRow, Tuner


FileArgument = Annotated[
    Path, typer.Argument(help="TOML file; lists and ranges in [runs] are searched.")
]
TrialsOption = Annotated[
    int | None, typer.Option("--trials", min=1, help="Trials in all; default: those of the file.")
]
TimeoutOption = Annotated[
    float | None, typer.Option("--timeout", help="Seconds after which no other trial is started.")
]
NameOption = Annotated[
    str | None, typer.Option("--name", help="Name of the search; default: the name of the file.")
]
OutOption = Annotated[
    Path | None, typer.Option("--out", help="File of the best settings; default: FILE.best.toml.")
]


def tune(
    file: FileArgument,
    trials: TrialsOption = None,
    timeout: TimeoutOption = None,
    name: NameOption = None,
    out: OutOption = None,
    json: JsonOption = False,
    root: WarehouseOption = None,
) -> None:
    """Search settings by validation; run it again, or several times at once, to continue."""
    search = read_search(file)
    search = replace(search, trials=trials or search.trials, timeout=timeout or search.timeout)
    require_extra("mmrec tune", "optuna", "optuna", "tune")
    warehouse = Warehouse(root)
    warehouse.require()
    from trainer.runs.tune import Tuner

    place = f" --warehouse {shlex.quote(str(root))}" if root else ""
    with Tuner(warehouse, search, name or file.stem) as tuner:
        end = _run(tuner, search)
        best = tuner.best()
        if best is not None:
            path = out or file.with_suffix(".best.toml")
            command = f"{shlex.join(tuner.write_best(path, best))}{place}"
        rows = tuner.rows()
        if json:
            document = {"search": tuner.name, "storage": str(tuner.path)}
            document |= {"config": str(path), "command": command} if best is not None else {}
            trial = None if best is None else asdict(best)
            console.emit_json({**document, "best": trial, "trials": [asdict(row) for row in rows]})
        elif rows:
            _show(rows)
    ended = sum(row.state in ("finished", "pruned", "failed") for row in rows)
    if best is not None:
        console.notify(f"best of {ended} trials: {best.value:.4f} on validation, run {best.run}")
        console.notify(f"now type: {command}")
    if end is not None:
        again = f"mmrec tune {shlex.quote(str(file))}{f' --name {name}' if name else ''}{place}"
        console.notify(f"stopped: {ended} trials ended; continue with: {again}")
        raise typer.Exit(exit_code())
    if best is None:
        raise UserError(f"no trial of {ended} has finished; see the reasons above, and {file}")


def _run(tuner: "Tuner", search: Search) -> BaseException | None:
    """Run the trials of this process; return the exception of an interrupt."""
    from trainer.runs.grid import Stopped

    with console.ProgressLine() as line:

        def show(number: int, progress: "TrainProgress") -> None:
            epoch = f"epoch {progress.epoch}/{progress.epochs}  loss {progress.loss:.4f}"
            share = min(1.0, number / search.trials)
            line.update(f"trial {number} of {search.trials}: {epoch}", share=share)

        try:
            for row in tuner.run(show):
                line.update(_line(row), keep=True)
        except (Stopped, KeyboardInterrupt) as error:
            return error
    return None


def _line(row: "TrialRow") -> str:
    settings = ", ".join(f"{key}={value_text(value)}" for key, value in row.values.items())
    result = f"{row.state} after {row.epochs} epochs"
    if row.value is not None:
        result = f"{row.value:.4f}"
    elif row.message:
        result = f"failed: {row.message}"
    return f"trial {row.number}, {settings}: {result}"


def _show(rows: "list[TrialRow]") -> None:
    """Print the trials, the best first."""
    names = list(dict.fromkeys(name for row in rows for name in row.values))
    ordered = sorted(rows, key=lambda row: (row.value is None, -(row.value or 0.0), row.number))
    console.table(
        ["trial", "state", "value", "epochs", *names, "run"],
        [
            [
                row.number,
                row.state,
                row.value,
                row.epochs,
                *(value_text(row.values[name]) if name in row.values else None for name in names),
                row.run,
            ]
            for row in ordered
        ],
    )
