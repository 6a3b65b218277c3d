"""Signals to commands that write: the exit code, one line, and nothing lost."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from features.signals import SIGNALS
from pipeline.datasets.demo import make_demo
from tests import kills
from tests.cli.invoke import run
from tests.trainer.test_distributed import free_port

NAME = "killed"
SMALL = ("dim=8", "heads=2", "hidden=8", "epochs=2", "batch_size=16", "device=cpu")
PAIRS = [word for pair in SMALL for word in ("--set", pair)]
JOBS = {
    "prepare": ("prepare", "--dataset", "demo"),
    "train": ("train", "--model", "sasrec", "--dataset", "demo", "--name", NAME, *PAIRS),
    "pretrain": ("pretrain", "--model", "mmsrec", "--dataset", "demo", "--name", NAME, *PAIRS),
}
PLANT = """
import os, signal
real, calls = os.fsync, 0
def fsync(handle):
    global calls
    calls += 1
    if calls == AT:
        os.kill(os.getpid(), NUMBER)
    real(handle)
os.fsync = fsync
for number in (signal.SIGINT, signal.SIGHUP):  # background jobs ignore them
    signal.signal(number, signal.default_int_handler)
"""
START = "from cli.app import main; main()"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with raw data, a warehouse, and the result of each uninterrupted command."""
    folder = tmp_path_factory.mktemp("signals")
    make_demo(folder / "raw", users=60, items=192)
    root = ("--warehouse", str(folder / "warehouse"))
    run("prepare", "--dataset", "demo", "--raw", str(folder / "raw"), *root)
    run("extract", "--dataset", "demo", "--text", "hashed", "--image", "hashed", *root)
    return folder


def words(world: Path, job: str, warehouse: Path, *, again: bool = False) -> list[str]:
    """Return the words of a command, or of the one that continues it."""
    command = [*JOBS[job]]
    if job == "prepare":
        command += ["--raw", str(world / "raw")]
    if again and (warehouse / "runs" / NAME / "config.toml").exists():
        command = [job, "--resume", "--run", NAME]
    return [*command, "--warehouse", str(warehouse)]


def copy(world: Path, name: str) -> Path:
    shutil.rmtree(world / name, ignore_errors=True)
    return Path(shutil.copytree(world / "warehouse", world / name))


def expected(world: Path, job: str) -> dict[str, str]:
    """Return the files of the uninterrupted command."""
    warehouse = world / f"whole-{job}"
    if not warehouse.exists():
        copy(world, warehouse.name)
        run(*words(world, job, warehouse))
    return kills.contents(warehouse)


CASES = [
    pytest.param(job, number, at, id=f"{job}-{number.name}-{at}", marks=marks)
    for job in JOBS
    for index, number in enumerate(SIGNALS)
    for at in (1, 4)
    if at == 1 or (index % 2 and job != "pretrain")
    for marks in [pytest.mark.slow if job == "prepare" or index == 1 else pytest.mark.heavy]
]


@pytest.mark.parametrize(("job", "number", "at"), CASES)
def test_a_signal_while_a_file_is_written_loses_nothing(
    world: Path, job: str, number: signal.Signals, at: int
) -> None:
    warehouse = copy(world, "trial")
    plant = PLANT.replace("AT", str(at)).replace("NUMBER", str(int(number)))
    command = [sys.executable, "-c", plant + START, *words(world, job, warehouse)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 128 + number, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last == "interrupted" or last.startswith("stopped: "), done.stderr
    assert not list(warehouse.rglob("*.tmp"))
    run(*words(world, job, warehouse, again=True))
    assert not kills.difference(expected(world, job), kills.contents(warehouse))


def two_processes(command: Sequence[str]) -> list[subprocess.Popen[str]]:
    """Start a command twice, as ``torchrun`` does for two processes."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    return [
        subprocess.Popen(
            [sys.executable, "-c", START, *command],
            env={**os.environ, **address, "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]


@pytest.mark.heavy
def test_more_processes_than_windows_train_all_the_same(tmp_path: Path) -> None:
    pairs = [("a", "x"), ("a", "y"), ("a", "z"), ("a", "w"), ("b", "x"), ("b", "y"), ("c", "w")]
    lines = [f"{user},{item},{time}" for time, (user, item) in enumerate(pairs)]
    (tmp_path / "interactions.csv").write_text("\n".join(["user_id,item_id,timestamp", *lines]))
    (tmp_path / "items.csv").write_text("item_id,text\nx,a\ny,b\nz,c\nw,d\n")
    root = ("--warehouse", str(tmp_path / "warehouse"))
    source = ("--format", "table", "--raw", str(tmp_path), "--k-core", "0")
    run("prepare", "--dataset", "few", *source, *root)
    train = ("train", "--model", "sasrec", "--dataset", "few", "--name", NAME, *PAIRS, *root)
    processes = two_processes(train)
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert (tmp_path / "warehouse" / "runs" / NAME / "model.safetensors").exists()
