"""The folder of a run: its name, its lock, its configuration file and its metrics table."""

import shutil
import tomllib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from features.atomic_files import lock, read_errors, write_table
from features.errors import UserError
from features.result_tables import read_metrics_table
from features.schema import METRICS_SCHEMA
from features.warehouse import Warehouse

if TYPE_CHECKING:
    from trainer.loop import EpochRow

SECONDS = "seconds"
"""What a metrics table calls the time that an epoch took."""
FORMAT = 2
"""Version of run folders: names of settings, weights and columns. mmrec 0.1 wrote none."""
_ABOUT: dict[str, type] = {"model": str, "dataset": str, "features": list, "fingerprint": str}


def run_lock(folder: Path) -> AbstractContextManager[None]:
    """What everybody holds who writes into a run's folder.

    Raises:
        UserError: Another process holds it.
    """
    return lock(folder / ".lock", f"run {folder.name}")


@contextmanager
def create_run_dir(runs: Path, name: str | None, stamp: datetime, what: str) -> Iterator[Path]:
    """Make a new run's folder, which two cannot do; if the body fails, it vanishes.

    Args:
        runs: The folder of all runs.
        name: The run's name; ``None``: made of ``stamp``, then of the time now, and ``what``.
        stamp: When the run began.
        what: What it trains on what.

    Raises:
        UserError: The name that was given is taken.
    """
    folder = runs / (name if name is not None else f"{stamp:%Y%m%d-%H%M%S}-{what}")
    while True:
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:
            if name is not None:
                raise _taken(folder) from None
            folder = runs / f"{datetime.now(UTC):%Y%m%d-%H%M%S-%f}-{what}"
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder)
        raise


def _taken(folder: Path) -> UserError:
    if (folder / "config.toml").exists():
        return UserError(
            f"run {folder.name!r} is there already; give another name by --name, or go on with it:"
            f" mmrec train --resume --run {folder.name}"
        )
    return UserError(
        f"{folder} is there already, and is no run: one is just beginning, or was killed when it"
        " began; give another name by --name, or remove the folder"
    )


def check_run_name(name: str) -> None:
    """Refuse a name that cannot be a folder's.

    Raises:
        UserError: Says which can.
    """
    try:
        Warehouse.check_name(name)
    except UserError:
        raise UserError(
            f"run name {name!r} cannot be a folder; use letters, digits, '.', '_', '-', at most 100"
            " of them, a letter or digit first (and neither runs nor raw)"
        ) from None


def read_about(path: Path) -> dict[str, Any]:
    """What a run's ``config.toml`` says of the run itself: model, dataset, features, fingerprint.

    Raises:
        UserError: It cannot be read, or says something that is no such thing.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); train again") from None
    about = document.get("run")
    for key, kind in _ABOUT.items():
        value = about.get(key) if isinstance(about, dict) else None
        entries = value if isinstance(value, list) else []
        if type(value) is not kind or any(type(entry) is not str for entry in entries):
            raise UserError(f"{path} is damaged ([run] has {key}={value!r}); train again")
    assert isinstance(about, dict)
    return about


def record(path: Path, model: str, row: "EpochRow") -> None:
    """Put an epoch's rows into a run's metrics table, in place of any of this epoch or later.

    What an evaluation has written goes, and its predictions with it: training is about to write
    other weights.
    """
    values: list[tuple[str, str, str, str, float, int | None]] = [
        ("train", "all", "none", name, value, None) for name, value in row.losses.items()
    ]
    if row.seconds:
        values.append(("train", "all", "none", SECONDS, row.seconds, None))
    for (kind, metric), value in row.metrics.items():
        # A direction of retrieval says what is looked for, and nothing has been seen there.
        targets, seen = ("all", kind) if kind in ("filtered", "kept") else (kind, "none")
        values.append(("validation", targets, seen, metric, value, row.users))
    rows = [
        {
            "phase": "train", "epoch": row.epoch, "split": split, "targets": targets,
            "ranker": model, "seen": seen, "metric": metric, "value": value, "users": users,
        }
        for split, targets, seen, metric, value, users in values
    ]  # fmt: skip
    path.with_name("predictions.parquet").unlink(missing_ok=True)
    replace_metrics(path, rows, lambda held: held["phase"] == "eval" or held["epoch"] >= row.epoch)


def replace_metrics(
    path: Path, rows: list[dict[str, Any]], replaced: Callable[[dict[str, Any]], bool]
) -> None:
    """Add rows to a run's metrics table; those already there for which ``replaced`` holds go."""
    rows = [row for row in held_metrics(path) if not replaced(row)] + rows
    write_table(path, pa.Table.from_pylist(rows, schema=METRICS_SCHEMA), compression="zstd")


def held_metrics(path: Path, remedy: str = "remove it") -> list[dict[str, Any]]:
    """The rows of a run's metrics table; none where there is no table yet.

    Raises:
        UserError: It is damaged, or has other columns.
    """
    if not path.exists():
        return []
    with read_errors(path, remedy):
        return list(read_metrics_table(path).to_pylist())
