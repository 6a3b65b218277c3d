"""Signals to commands that write: the exit code, one line, and nothing lost."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.app import app
from features.signals import SIGNALS, handle_signals
from pipeline.datasets.demo import make_demo
from tests import kills
from tests.cli.invoke import run
from tests.marks import heavy_after
from tests.trainer.test_distributed import free_port

NAME = "killed"
SMALL = ("dim=8", "heads=2", "hidden=8", "epochs=2", "batch_size=64", "device=cpu")
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
STRIDE = 4  # a test sends a signal at each fourth sync
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
    for marks in [pytest.mark.slow if index == 1 and at == 1 else pytest.mark.heavy]
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


@contextmanager
def signal_at_sync(at: int, number: signal.Signals) -> Iterator[list[int]]:
    """Send a signal to this process before the sync number ``at``; yield the handles of syncs."""
    handles: list[int] = []
    real = os.fsync

    def fsync(handle: int) -> None:
        handles.append(handle)
        if len(handles) == at:
            signal.raise_signal(number)
        real(handle)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        yield handles


@pytest.mark.slow
@pytest.mark.parametrize("job", ["train", "pretrain"])
@pytest.mark.parametrize("first", heavy_after(1, range(1, STRIDE + 1)))
def test_a_signal_at_any_sync_loses_nothing(world: Path, job: str, first: int) -> None:
    whole, faults = expected(world, job), {}
    at, is_signalled = first - STRIDE, True
    while is_signalled:
        at += STRIDE
        number = SIGNALS[at % len(SIGNALS)]
        warehouse = copy(world, "trial")
        with handle_signals(), signal_at_sync(at, number) as handles:
            result = CliRunner().invoke(app, words(world, job, warehouse))
        is_signalled = len(handles) >= at
        is_finished = "finished: " in result.output
        assert result.exit_code == (0 if is_finished else 128 + number), result.output
        if not is_finished:
            run(*words(world, job, warehouse, again=True))
        if fault := kills.difference(whole, kills.contents(warehouse)):
            faults[at] = fault
    assert not faults
    assert at > 10  # the configuration, and for each epoch the state, the metrics and the weights


GRID = """
[runs]
model = "sasrec"
dim = 8
heads = 2
hidden = 8
epochs = 1
batch_size = 64
device = "cpu"
dropout = [0.1, 0.2]
"""


@pytest.mark.heavy
@pytest.mark.parametrize("at", [3, 8, 13, 24])
def test_a_signal_to_a_grid_loses_nothing(world: Path, at: int) -> None:
    """The instants: first state, last epoch, evaluation; last epoch of the second run."""
    file = world / "grid.toml"
    file.write_text(GRID)

    def command(warehouse: Path) -> list[str]:
        return ["grid", str(file), "--out", str(warehouse / "grid.parquet"), "--warehouse",
                str(warehouse)]  # fmt: skip

    whole = world / "whole-grid"
    if not whole.exists():
        run(*command(copy(world, whole.name)))
    warehouse = copy(world, "trial")
    plant = PLANT.replace("AT", str(at)).replace("NUMBER", str(int(signal.SIGTERM)))
    stopped = subprocess.run(
        [sys.executable, "-c", plant + START, *command(warehouse)],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert stopped.returncode == 128 + signal.SIGTERM, stopped.stderr
    assert stopped.stderr.splitlines()[-1].startswith("stopped: ")
    assert "Traceback" not in stopped.stderr
    run(*command(warehouse))
    assert not kills.difference(kills.contents(whole), kills.contents(warehouse))


def two_processes(command: Sequence[str], plant: str = "") -> list[subprocess.Popen[str]]:
    """Start a command twice, as ``torchrun`` does; ``plant`` is code for the first process."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    return [
        subprocess.Popen(
            [sys.executable, "-c", (plant if rank == "0" else "") + START, *command],
            env={**os.environ, **address, "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
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


@pytest.mark.heavy
def test_a_signal_to_one_of_two_processes_stops_both_and_loses_nothing(world: Path) -> None:
    warehouses = [copy(world, name) for name in ("whole-two", "trial-two")]
    plant = PLANT.replace("AT", "3").replace("NUMBER", str(int(signal.SIGTERM)))

    def train(warehouse: Path, plant: str = "", *, again: bool = False) -> list[tuple[int, str]]:
        command = words(world, "train", warehouse, again=again)
        processes = two_processes(command, plant)
        errors = [process.communicate(timeout=120)[1] for process in processes]
        return [(p.returncode, error) for p, error in zip(processes, errors, strict=True)]

    assert [code for code, _ in train(warehouses[0])] == [0, 0]
    stopped = train(warehouses[1], plant)
    assert stopped[0][0] == 128 + signal.SIGTERM, stopped
    assert stopped[1][0] > 128, stopped
    assert not any("Traceback" in error for _, error in stopped)
    resumed = train(warehouses[1], again=True)
    assert [code for code, _ in resumed] == [0, 0], resumed
    assert not kills.difference(*map(kills.contents, warehouses))


@pytest.mark.heavy
def test_a_killed_process_ends_the_other_with_one_line(world: Path) -> None:
    plant = PLANT.replace("AT", "3").replace("NUMBER", str(int(signal.SIGKILL)))
    processes = two_processes(words(world, "train", copy(world, "trial-killed")), plant)
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [-signal.SIGKILL, 1], errors
    (line,) = errors[1].splitlines()
    assert line.startswith("error: process 0 of 2 has ended"), errors
