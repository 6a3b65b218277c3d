"""The folder of a run: its name, its lock, its configuration file and its metrics table."""

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from features.atomic_files import (
    lock,
    read_errors,
    remove_leftovers,
    require_path,
    write_table,
)
from features.documents import read_toml
from features.errors import DamagedError, UserError
from features.result_tables import read_metrics_table
from features.schema import METRICS_SCHEMA
from features.warehouse import Warehouse

if TYPE_CHECKING:
    from trainer.loop import EpochRow

SECONDS = "seconds"
"""Name of the metric that holds the duration of an epoch."""
FORMAT = 2
"""Version of run folders: names of settings, weights and columns. mmrec 0.1 wrote none."""
_ABOUT: dict[str, type] = {"model": str, "dataset": str, "features": list, "fingerprint": str}


_RESULTS = ("model.safetensors", "resume.safetensors", "metrics.parquet", "predictions.parquet")
"""Files that are written after ``config.toml``. A folder that holds one of them is not one of a
process that was killed while it created the run."""
PRIOR = "prior.json"
"""File of the weight and eps of a prior, in a run's folder."""
LATER = "later"
"""Folder of the evaluations on later preparations, in a run's folder."""
_LOCK = ".lock"
_NEW_SECONDS = 1.0


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold the lock that every process holds while it writes into a run's folder.

    Temporary files that a killed process left in the folder are removed.

    Raises:
        UserError: Another process holds the lock, or the folder was removed before or in the body.
    """
    require_path(folder)
    with lock(folder / _LOCK, f"run {folder.name}"):
        remove_leftovers(folder)
        yield
        require_path(folder / "config.toml")


@contextmanager
def create_run_dir(runs: Path, name: str | None, stamp: datetime, title: str) -> Iterator[Path]:
    """Create and lock the folder of a new run; it is removed if the body fails.

    Folders of other runs that were killed before they were complete are removed.

    Only one process can create a folder, so two runs never share one. A folder of the name that a
    killed process left before its run was complete is used again.

    Args:
        runs: The folder of all runs.
        name: Name of the run; ``None``: ``stamp`` and ``title``.
        stamp: Start of the run. If the folder of this second exists, the time now is taken.
        title: Dataset and model.

    Raises:
        UserError: The given name is taken.
    """
    _remove_abandoned(runs)
    folder = runs / (name if name is not None else f"{stamp:%Y%m%d-%H%M%S}-{title}")
    while True:
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:
            if name is not None:
                if _is_incomplete(folder):
                    break
                raise _taken(folder) from None
            folder = runs / f"{datetime.now(UTC):%Y%m%d-%H%M%S-%f}-{title}"
    with lock(folder / _LOCK, f"run {folder.name}"):
        if not _is_incomplete(folder):
            raise _taken(folder)  # another process was faster
        try:
            _clear(folder)
            yield folder
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


def delete_runs(warehouse: Warehouse, names: Sequence[str]) -> dict[str, int]:
    """Delete the folders of runs.

    Returns:
        Name of each run -> its size in bytes.

    Raises:
        UserError: There is no such run, or another process trains or evaluates one of them; then
            nothing is deleted.
    """
    with ExitStack() as stack:
        sizes = {}
        for name in dict.fromkeys(names):
            folder, _ = warehouse.choose_run(name)
            stack.enter_context(lock(folder / _LOCK, f"run {name}"))
            files = [path for path in folder.rglob("*") if path.is_file()]
            sizes[name] = sum(path.stat().st_size for path in files)
    for name in sizes:
        shutil.rmtree(warehouse.runs_dir / name)
    return sizes


def _remove_abandoned(runs: Path) -> None:
    """Remove the folders of runs that were killed before they were complete.

    A folder stays if a process holds its lock, or if its lock file is new: another process may be
    about to lock it.
    """
    for path in runs.glob(f"*/{_LOCK}"):
        folder = path.parent
        with suppress(UserError, OSError):  # locked or removed by another process
            if time.time() - path.stat().st_mtime < _NEW_SECONDS or not _is_incomplete(folder):
                continue
            with lock(path, f"run {folder.name}") as folder_lock:
                folder_lock.check()
                if _is_incomplete(folder):
                    shutil.rmtree(folder)


def _is_incomplete(folder: Path) -> bool:
    """Return True if a folder holds nothing but what is written before a run is complete."""
    names = {path.name for path in folder.iterdir()}
    is_ours = _LOCK in names or not names
    return is_ours and not names & {"config.toml", *_RESULTS}


def _clear(folder: Path) -> None:
    """Remove what a killed process left in the folder; the lock file stays."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != _LOCK:
            path.unlink()


def _taken(folder: Path) -> UserError:
    if (folder / "config.toml").exists():
        return UserError(
            f"run {folder.name!r} exists already; give another name by --name, or resume it:"
            f" mmrec train --resume --run {folder.name}"
        )
    return UserError(
        f"{folder} exists already and is not a run; give another name by --name, or remove the"
        " folder"
    )


def check_run_name(name: str) -> None:
    """Raise a UserError unless a name can be the name of a folder."""
    try:
        Warehouse.check_name(name)
    except UserError:
        raise UserError(
            f"run name {name!r} cannot be a folder; use letters, digits, '.', '_', '-', at most 100"
            " of them, a letter or digit first (and neither runs nor raw)"
        ) from None


def read_about(path: Path) -> dict[str, Any]:
    """Read the table ``[run]`` of a run's ``config.toml``: model, dataset, features, fingerprint.

    Raises:
        UserError: The file cannot be read, or an entry has the wrong type.
    """
    document = read_toml(path, "train again")
    about = document.get("run")
    for key, kind in _ABOUT.items():
        value = about.get(key) if isinstance(about, dict) else None
        entries = value if isinstance(value, list) else []
        if type(value) is not kind or any(type(entry) is not str for entry in entries):
            raise DamagedError(f"{path} is damaged ([run] has {key}={value!r}); train again")
    assert isinstance(about, dict)
    return about


def check_format(folder: Path, about: dict[str, Any]) -> None:
    """Raise a UserError unless a run was written in the format of this version.

    Metrics and predictions of other versions are read all the same.
    """
    if about.get("format") != FORMAT:
        raise UserError(
            f"run {folder.name!r} was written by another version of mmrec, whose settings and"
            " weights have other names; train again, or use that version for it"
        )


def record(path: Path, model: str, row: "EpochRow") -> None:
    """Write an epoch's rows into a run's metrics table; rows of this epoch or later are replaced.

    The results of evaluations are removed: training is about to write other weights.
    """
    values: list[tuple[str, str, str, str, float, int | None]] = [
        ("train", "all", "none", name, value, None) for name, value in row.losses.items()
    ]
    if row.seconds:
        values.append(("train", "all", "none", SECONDS, row.seconds, None))
    for (kind, metric), value in row.metrics.items():
        # A direction of retrieval is stored in the column targets; it has no seen items.
        targets, seen = ("all", kind) if kind in ("filtered", "kept") else (kind, "none")
        values.append(("validation", targets, seen, metric, value, row.users))
    rows = [
        {
            "phase": "train", "epoch": row.epoch, "split": split, "targets": targets,
            "ranker": model, "seen": seen, "metric": metric, "value": value, "users": users,
        }
        for split, targets, seen, metric, value, users in values
    ]  # fmt: skip
    require_path(path.parent)
    for name in ("predictions.parquet", PRIOR):
        path.with_name(name).unlink(missing_ok=True)
    shutil.rmtree(path.with_name(LATER), ignore_errors=True)
    replace_metrics(path, rows, lambda old: old["phase"] == "eval" or old["epoch"] >= row.epoch)


def replace_metrics(
    path: Path, rows: list[dict[str, Any]], replaced: Callable[[dict[str, Any]], bool]
) -> None:
    """Add rows to a run's metrics table; old rows for which ``replaced`` is true are removed."""
    rows = [row for row in stored_metrics(path) if not replaced(row)] + rows
    write_table(path, pa.Table.from_pylist(rows, schema=METRICS_SCHEMA), compression="zstd")


def recorded_seconds(path: Path) -> float:
    """Return the seconds of all epochs of a run's metrics table."""
    return float(sum(row["value"] for row in stored_metrics(path) if row["metric"] == SECONDS))


def stored_metrics(path: Path, remedy: str = "remove it") -> list[dict[str, Any]]:
    """Return the rows of a run's metrics table; no rows if there is no table yet.

    Raises:
        UserError: The table is damaged, or has other columns.
    """
    if not path.exists():
        return []
    with read_errors(path, remedy):
        return list(read_metrics_table(path).to_pylist())
