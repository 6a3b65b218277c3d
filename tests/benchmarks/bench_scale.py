"""Measure the commands on a catalogue of a million items.

    python -m tests.benchmarks.bench_scale make --folder FOLDER [--items 1000000]
    python -m tests.benchmarks.bench_scale train --folder FOLDER [--model sasrec]
    python -m tests.benchmarks.bench_scale use --folder FOLDER [--model sasrec]
    python -m tests.benchmarks.bench_scale interrupt --folder FOLDER [--model sasrec]

`make` plants a world and prepares it. Each item belongs to one of 1,000 groups, and its text vector
is the vector of the group and noise. Each user has three groups and draws items from them, popular
ones more often. There are 10 interactions an item, and 2 items a user. `train` trains with the
defaults of a model for one epoch, which is cut after 50 steps, validates on 1,000 users, and prints
the time and the losses of the steps. `use` evaluates the run for 5,000 users, and lists items for
the first 20,000 users. `interrupt` sends Ctrl-C at random times to a training, in steps and in the
validation.

Each command is a process of its own: CPU seconds and peak memory are those of the whole process.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

GROUPS, GROUPS_PER_USER, WIDTH = 1000, 3, 384
INTERACTIONS_PER_ITEM, ITEMS_PER_USER = 10, 2
STEPS, VALIDATED_USERS, EVALUATED_USERS, LISTED_USERS = 50, 1000, 5000, 20_000
MODELS = ("sasrec", "mmsrec", "mmsr", "pmmrec")


@dataclass(frozen=True, kw_only=True, slots=True)
class Spent:
    """What a process took."""

    cpu: float
    """CPU seconds of the process, user and system."""
    peak: float
    """Most memory that the process held, in GB."""
    code: int
    """Exit status."""


def plant(folder: Path, items: int) -> None:
    """Write the raw tables and the vectors of the items."""
    generator = np.random.default_rng(0)
    raw = folder / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    users = items // ITEMS_PER_USER
    length = items * INTERACTIONS_PER_ITEM // users
    group_N = np.arange(items) % GROUPS
    user_groups = generator.integers(0, GROUPS, (users, GROUPS_PER_USER))
    choice = generator.integers(0, GROUPS_PER_USER, (users, length))
    group = np.take_along_axis(user_groups, choice, axis=1)
    rank = (items // GROUPS * generator.random((users, length)) ** 3).astype(np.int64)
    item = group + GROUPS * rank
    table = {
        "user_id": np.repeat(np.arange(users), length),
        "item_id": item.ravel(),
        "timestamp": np.tile(np.arange(length), users) + 1_600_000_000,
    }
    pq.write_table(pa.table(table), raw / "interactions.parquet")
    names = pa.array([f"item {number} of group {number % GROUPS}" for number in range(items)])
    pq.write_table(pa.table({"item_id": np.arange(items), "title": names}), raw / "items.parquet")
    centre_GW = generator.standard_normal((GROUPS, WIDTH), dtype=np.float32)
    vectors = np.lib.format.open_memmap(
        folder / "vectors.npy", mode="w+", dtype=np.float32, shape=(items, WIDTH)
    )
    for start in range(0, items, 2**16):
        part = group_N[start : start + 2**16]
        vectors[start : start + 2**16] = centre_GW[part] + 0.5 * generator.standard_normal(
            (len(part), WIDTH), dtype=np.float32
        )
    vectors.flush()
    (folder / "ids.txt").write_text("\n".join(map(str, range(items))) + "\n")


def command(folder: Path, *words: str, log: Path | None = None) -> subprocess.Popen[bytes]:
    """Start a command of mmrec in the warehouse of the folder.

    Args:
        folder: Folder of the world.
        words: The words after ``mmrec``.
        log: File that gets a line after each training step, see :func:`cut_training`.
    """
    module = "tests.benchmarks.bench_scale"
    start = [sys.executable, "-m", module, "command", str(log or ""), *words]
    environment = {**os.environ, "MMREC_WAREHOUSE": str(folder / "warehouse")}
    return subprocess.Popen(
        start, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def wait(process: subprocess.Popen[bytes]) -> Spent:
    """Wait for a process, and print the last line of its errors if it failed."""
    assert process.stderr is not None
    errors = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in (0, 130):
        print(errors[-2000:])
    return Spent(
        cpu=usage.ru_utime + usage.ru_stime,
        peak=usage.ru_maxrss / 1e6,
        code=process.returncode,
    )


def tell(what: str, spent: Spent) -> None:
    """Print what a command took."""
    failed = f"  exit {spent.code}" if spent.code else ""
    print(f"{what:40} {spent.cpu:7.1f} CPU s  peak {spent.peak:5.2f} GB{failed}", flush=True)


def make(folder: Path, items: int) -> None:
    """Plant the world, prepare it and import its vectors."""
    planting = multiprocessing.get_context("spawn").Process(target=plant, args=(folder, items))
    planting.start()  # a child's peak memory is at least that of its parent
    planting.join()
    raw = ["--dataset", "scale", "--raw", str(folder / "raw"), "--format", "table", "--k-core", "0"]
    tell("prepare", wait(command(folder, "prepare", *raw)))
    vectors = ["--text", str(folder / "vectors.npy"), "--ids", str(folder / "ids.txt")]
    tell(
        "import-features", wait(command(folder, "import-features", "--dataset", "scale", *vectors))
    )


def training(folder: Path, model: str, name: str, log: Path) -> subprocess.Popen[bytes]:
    """Start a training with the defaults of a model, for one epoch."""
    log.unlink(missing_ok=True)
    shutil.rmtree(folder / "warehouse" / "runs" / name, ignore_errors=True)
    words = ["train", "--model", model, "--dataset", "scale", "--name", name]
    words += ["--set", "epochs=1", "--set", f"monitor_users={VALIDATED_USERS}"]
    return command(folder, *words, log=log)


def train(folder: Path, model: str) -> None:
    """Train for 50 steps, and print the time of a step and the losses."""
    log = folder / f"{model}.log"
    tell(f"train {model}", wait(training(folder, model, model, log)))
    steps = [json.loads(line) for line in log.read_text().splitlines()]
    losses = [step["loss"] for step in steps]
    cpu = [after["cpu"] - before["cpu"] for before, after in itertools.pairwise(steps)]
    peak = max(step["peak"] for step in steps)
    print(
        f"  first step after {steps[0]['cpu']:.1f} CPU s; a step {np.median(cpu):.3f} CPU s;"
        f" peak of the steps {peak:.2f} GB; loss {np.mean(losses[:10]):.4f} in the first 10 steps,"
        f" {np.mean(losses[-10:]):.4f} in the last 10 of {len(losses)}",
        flush=True,
    )


def use(folder: Path, model: str, users: int) -> None:
    """Evaluate the run for 5,000 users, and list items for the first users."""
    evaluation = command(folder, "eval", "--run", model, "--users", str(EVALUATED_USERS))
    tell(f"eval {model}", wait(evaluation))
    if not users:
        return
    out = folder / f"{model}.parquet"
    lists = command(folder, "recommend", "--run", model, "--all", "--out", str(out))
    for held in _memory_until(lists, users):
        print(f"  recommend --all, {held}", flush=True)


def _memory_until(process: subprocess.Popen[bytes], users: int) -> Iterator[str]:
    """Yield the memory of a process every 10 seconds; end it after so many users."""
    assert process.stderr is not None
    os.set_blocking(process.stderr.fileno(), False)
    while process.poll() is None:
        time.sleep(10)
        lines = (process.stderr.read() or b"").decode().replace("\r", "\n").split("\n")
        held = Path(f"/proc/{process.pid}/status").read_text()
        memory = int(held.split("VmRSS:")[1].split()[0]) / 1e6
        progress = [line.strip() for line in lines if " of " in line]
        if not progress:
            continue
        yield f"{memory:.2f} GB: {progress[-1]}"
        finished = progress[-1].split(" of ")[0].replace(",", "")
        if finished.isdigit() and int(finished) >= users:
            process.send_signal(signal.SIGINT)
            process.wait()


def interrupt(folder: Path, model: str, rounds: int) -> None:
    """Send Ctrl-C at random times, and print the seconds until the process has ended.

    Even rounds interrupt a step, odd ones the validation after the last step.
    """
    draw = random.Random(0)
    log = folder / "interrupt.log"
    for number in range(rounds):
        in_validation = number % 2 == 1
        process = training(folder, model, f"interrupt-{model}-{number}", log)
        _wait_for_steps(process, log, STEPS if in_validation else 5)
        time.sleep(draw.uniform(0, 20 if in_validation else 3))
        sent = time.monotonic()
        process.send_signal(signal.SIGINT)
        spent = wait(process)
        place = "validation" if in_validation else "a step"
        print(
            f"  Ctrl-C in {place}: {time.monotonic() - sent:.2f} s, exit {spent.code}", flush=True
        )


def _wait_for_steps(process: subprocess.Popen[bytes], log: Path, steps: int) -> None:
    while process.poll() is None:
        if log.exists() and log.read_bytes().count(b"\n") >= steps:
            return
        time.sleep(0.05)
    raise SystemExit(f"the training ended before step {steps}")


def cut_training(log: Path) -> None:
    """Make :func:`trainer.loop.fit` end each epoch after 50 steps, and log each step."""
    from trainer.loop import fit
    from trainer.runs import train as train_run
    from trainer.step_losses import StepLosses

    add = StepLosses.add

    def cut_fit(task: Any, *args: Any, **options: Any) -> Any:
        class Cut(type(task)):  # type: ignore[misc]
            def epoch(self, *args: Any, **options: Any) -> Any:
                total, batches = super().epoch(*args, **options)
                return min(total, STEPS), itertools.islice(batches, STEPS)

        task.__class__ = Cut
        return fit(task, *args, **options)

    def logged_add(self: Any, losses: Any) -> None:
        add(self, losses)
        status = Path("/proc/self/status").read_text()
        step = {
            "loss": float(losses["loss"]),
            "cpu": time.process_time(),
            "peak": int(status.split("VmHWM:")[1].split()[0]) / 1e6,
        }
        with log.open("a") as file:
            file.write(json.dumps(step) + "\n")

    mock.patch.object(train_run, "fit", cut_fit).start()
    mock.patch.object(StepLosses, "add", logged_add).start()


def run_command(log: str, words: list[str]) -> None:
    """Run a command of mmrec in this process; its training is cut if there is a log."""
    from cli.app import main as mmrec

    if log:
        cut_training(Path(log))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it
    sys.argv = ["mmrec", *words]
    mmrec()


def main() -> None:
    """Run the part that the command line names."""
    if sys.argv[1:2] == ["command"]:  # a process that :func:`command` has started
        run_command(sys.argv[2], sys.argv[3:])
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=("make", "train", "use", "interrupt"))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--model", choices=MODELS, default="sasrec")
    parser.add_argument("--users", type=int, default=LISTED_USERS, help="users of `use`")
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    if options.part == "make":
        make(options.folder, options.items)
    elif options.part == "train":
        train(options.folder, options.model)
    elif options.part == "use":
        use(options.folder, options.model, options.users)
    else:
        interrupt(options.folder, options.model, options.rounds)


if __name__ == "__main__":
    main()
