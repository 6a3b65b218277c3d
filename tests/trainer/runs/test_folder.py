"""The folder of a run: removed during the work, or left by a process that was killed."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from features.atomic_files import write_text
from features.errors import UserError
from features.warehouse import Warehouse
from tests.trainer import worlds
from trainer.loop import TrainProgress
from trainer.runs import evaluate as evaluation
from trainer.runs.evaluate import evaluate
from trainer.runs.folder import create_run_dir
from trainer.runs.run import Run
from trainer.runs.train import train_run

STAMP = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
SMALL = ["dim=8", "hidden=8", "length=5", "epochs=2", "batch_size=4", "device=cpu"]


@pytest.fixture
def warehouse(warehouse: Warehouse) -> Warehouse:
    worlds.prepare(warehouse, [[0, 1, 0, 1, target, 3] for target in (0, 2) * 6], 6)
    worlds.extract(warehouse, worlds.features(6))
    return warehouse


def begin(warehouse: Warehouse, model: str = "sasrec") -> Run:
    settings = [*SMALL, "heads=2"] if model == "mmsrec" else SMALL
    return worlds.begin(warehouse, model, settings=settings, name="r")


def remove_run(run: Run) -> None:
    shutil.rmtree(run.folder)


def replace_run(run: Run) -> None:
    """Put another folder with the same files in the place of the run's."""
    run.folder.rename(run.folder.with_name("moved"))
    shutil.copytree(run.folder.with_name("moved"), run.folder)


def remove_config(run: Run) -> None:
    (run.folder / "config.toml").unlink()


def remove_dataset(run: Run) -> None:
    shutil.rmtree(run.warehouse.dataset_dir("world"))


def remove_features(run: Run) -> None:
    shutil.rmtree(run.warehouse.dataset_dir("world") / "features")


@pytest.mark.parametrize("epoch", [1, 2])
@pytest.mark.parametrize(
    "remove", [remove_run, replace_run, remove_config, remove_dataset, remove_features]
)
def test_a_training_whose_folder_was_removed_does_not_succeed(
    warehouse: Warehouse, remove: Callable[[Run], None], epoch: int
) -> None:
    run = begin(warehouse, "mmsrec")

    def on_progress(tick: TrainProgress) -> None:
        if tick.epoch == epoch and tick.metrics:
            remove(run)

    with pytest.raises(UserError, match="removed"):
        train_run(run, on_progress=on_progress)
    if remove is remove_run:
        assert not run.folder.exists()


def test_a_run_removed_before_its_training_is_not_created_again(warehouse: Warehouse) -> None:
    run = begin(warehouse)
    shutil.rmtree(run.folder)
    with pytest.raises(UserError, match="removed"):
        train_run(run)
    assert not run.folder.exists()


@pytest.mark.parametrize("place", ["replace_metrics", "write_table", "rank_split"])
def test_an_evaluation_whose_folder_was_removed_does_not_succeed(
    warehouse: Warehouse, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    run = begin(warehouse)
    train_run(run)
    original = getattr(evaluation, place)

    def remove_first(*arguments: object, **options: object) -> object:
        shutil.rmtree(run.folder, ignore_errors=True)
        return original(*arguments, **options)

    monkeypatch.setattr(evaluation, place, remove_first)
    with pytest.raises(UserError, match="removed"):
        evaluate(warehouse, run, index="torch")


def kill(folder: Path, *names: str) -> None:
    """Leave what a process leaves that is killed before its run is complete."""
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).touch()


@pytest.mark.parametrize(
    "names", [(), (".lock",), (".lock", ".config.toml.0a1b2c3d.tmp", "blocks.json")]
)
def test_a_run_killed_before_it_was_complete_does_not_block_its_name(
    warehouse: Warehouse, names: tuple[str, ...]
) -> None:
    kill(warehouse.runs_dir / "r", *names)
    assert train_run(begin(warehouse)).finished
    kept = {".lock", "config.toml", "items.parquet", "learned_interactions.parquet"}
    kept |= {"metrics.parquet", "model.safetensors", "resume.safetensors"}
    assert {path.name for path in (warehouse.runs_dir / "r").iterdir()} == kept


@pytest.mark.parametrize("names", [("notes.txt",), (".lock", "model.safetensors")])
def test_a_folder_with_other_files_keeps_its_name(
    warehouse: Warehouse, names: tuple[str, ...]
) -> None:
    kill(warehouse.runs_dir / "r", *names)
    with pytest.raises(UserError, match="is not a run"):
        begin(warehouse)
    assert sorted(path.name for path in (warehouse.runs_dir / "r").iterdir()) == sorted(names)


def test_a_run_that_is_being_created_keeps_its_name(warehouse: Warehouse) -> None:
    with create_run_dir(warehouse.runs_dir, "r", STAMP, "d-m") as folder:
        with pytest.raises(UserError, match="another process"):
            begin(warehouse)
        write_text(folder / "config.toml", "")


@pytest.mark.parametrize("work", ["train", "eval"])
def test_leftovers_go_with_the_next_command_that_owns_the_folder(
    warehouse: Warehouse, work: str
) -> None:
    run = begin(warehouse)
    train_run(run)
    leftover = run.folder / ".model.safetensors.0a1b2c3d.tmp"
    leftover.touch()
    if work == "train":
        train_run(run, resume=True)
    else:
        evaluate(warehouse, run, index="torch")
    assert not leftover.exists()


def age(folder: Path) -> None:
    os.utime(folder / ".lock", (1.7e9, 1.7e9))


@pytest.mark.parametrize("name", ["20260102-030405-world-sasrec", "named"])
@pytest.mark.parametrize("names", [(".lock",), (".lock", ".config.toml.0a1b2c3d.tmp", "blocks")])
def test_the_folder_of_a_killed_run_is_removed_by_the_next_run(
    warehouse: Warehouse, name: str, names: tuple[str, ...]
) -> None:
    kill(warehouse.runs_dir / name, *names)
    age(warehouse.runs_dir / name)
    begin(warehouse)
    assert [path.name for path in warehouse.runs_dir.iterdir()] == ["r"]


@pytest.mark.parametrize(
    "names",
    [
        (".lock", "config.toml"), (".lock", "metrics.parquet"), (".lock", "model.safetensors"),
        ("notes.txt",), (),
    ],
)  # fmt: skip
def test_a_folder_that_may_be_a_run_or_anything_else_stays(
    warehouse: Warehouse, names: tuple[str, ...]
) -> None:
    folder = warehouse.runs_dir / "20260102-030405-world-sasrec"
    kill(folder, *names)
    if ".lock" in names:
        age(folder)
    begin(warehouse)
    assert {path.name for path in folder.iterdir()} == set(names)


def test_the_folder_of_a_run_that_another_process_creates_stays(warehouse: Warehouse) -> None:
    folder = warehouse.runs_dir / "20260102-030405-world-sasrec"
    kill(folder, ".lock")
    age(folder)
    code = "import fcntl, sys; file = open(sys.argv[1], 'r+'); fcntl.flock(file, fcntl.LOCK_EX)"
    command = [sys.executable, "-c", f"{code}; print(flush=True); input()", str(folder / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        age(folder)
        begin(warehouse)
        assert folder.exists()
        process.communicate(b"\n")
    age(folder)
    worlds.begin(warehouse, "sasrec", settings=SMALL, name="r2")
    assert not folder.exists()
