"""Run random command lines, settings files and raw tables, and look for errors of the program.

    python -m tests.fuzz [--inputs N] [--commands N] [--seed SEED] [--only REGEX]

Every input runs in a folder with a small prepared warehouse, trained runs and odd files. The folder
is restored when an input has changed it. ``--inputs`` run in this process by Typer's runner,
``--commands`` as processes of their own. An input is at fault if a command

* ends with an exception that is no ``SystemExit``, prints a traceback, or is killed by a signal,
* fails without exactly one line that begins with ``error:`` as its last message,
* prints a character that a terminal obeys, or
* takes over 60 s and does not train.

A training is interrupted after some seconds, as by Ctrl-C. Hypothesis makes the inputs and
shortens the first input of each fault; faults are told apart by the exception and the deepest frame
in mmrec. The script prints a table and exits with 1 if there is a fault.
"""

import argparse
import faulthandler
import importlib
import os
import pkgutil
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Flaky
from hypothesis.internal.conjecture import engine
from typer.testing import CliRunner

import cli
import features
import pipeline
import retrieval
import trainer
from cli.app import app
from features.signals import handle_signals
from tests.fuzz_inputs import FuzzInput, command_lines, settings_files
from tests.fuzz_tables import raw_tables
from tests.fuzz_world import World

REPOSITORY = Path(__file__).parents[1]
PACKAGES = ("cli", "pipeline", "trainer", "retrieval", "features")
INPUTS = {
    "command lines": command_lines(),
    "settings files": settings_files(),
    "raw tables": raw_tables(),
}
MOST_SECONDS = 60.0
"""Limit of a command that does not train."""
TRAINING_SECONDS = 0.5
"""Time after which a training is interrupted."""
BATCH = 250
"""Inputs of one call of Hypothesis."""
ADDRESS_SPACE = 10 * 2**30
"""Bytes; huge settings must not use up the memory of the machine."""
_UNSAFE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "COLUMNS": "100",
}


class TooLongError(BaseException):
    """A command that does not train has not ended in time."""


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault of a command: faults with equal kind and place are one."""

    kind: str
    place: str
    detail: str = field(compare=False)


class FaultError(Exception):
    """An input has a fault that was not known before."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(f"{fault.kind} at {fault.place}")
        self.fault = fault


# -- one input ------------------------------------------------------------------------------


class Runner(CliRunner):
    """Typer's runner with the streams that the program has: what no encoding has is escaped."""

    @contextmanager
    def isolation(self, *words: Any, **options: Any) -> Iterator[Any]:
        """Replace the streams."""
        with super().isolation(*words, **options) as streams:
            stdout: Any = sys.stdout
            stdout.reconfigure(errors="backslashreplace")
            yield streams


def run_here(given: FuzzInput) -> Fault | None:
    """Run the commands of an input in this process; return the first fault."""
    limit = TRAINING_SECONDS if given.trains else MOST_SECONDS

    def ring(number: int, frame: FrameType | None) -> None:
        if not given.trains:
            raise TooLongError
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGALRM, ring)
    try:
        for command in given.commands:
            faulthandler.dump_traceback_later(3 * MOST_SECONDS, exit=True)
            signal.setitimer(signal.ITIMER_REAL, limit)
            try:
                with handle_signals() if given.trains else nullcontext():
                    result = Runner().invoke(app, list(command))
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
                faulthandler.cancel_dump_traceback_later()
            error = result.exception
            if error is not None and not isinstance(error, SystemExit):
                text = "".join(traceback.format_exception(error))
                return Fault(type(error).__name__, _deepest(error), text)
            fault = _judge(command, result.exit_code, result.stdout, result.stderr)
            if fault is not None or result.exit_code:
                return fault
    except KeyboardInterrupt:  # outside the command; ``main`` handles it
        pass
    except TooLongError as error:
        return Fault("over 60 s", _deepest(error), "".join(traceback.format_exception(error)))
    finally:
        signal.signal(signal.SIGALRM, before)
    return None


def run_apart(given: FuzzInput) -> Fault | None:
    """Run the commands of an input as processes; return the first fault."""
    for command in given.commands:
        program = [sys.executable, "-m", "cli.app"]
        words = [word.encode("utf-8", "surrogateescape") for word in (*program, *command)]
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        )
        is_late = False
        try:
            output = process.communicate(timeout=MOST_SECONDS)
        except subprocess.TimeoutExpired:
            is_late = not given.trains
            process.send_signal(signal.SIGINT)
            try:
                output = process.communicate(timeout=MOST_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                output, is_late = process.communicate(), True
        stdout, stderr = (stream.decode("utf-8", "replace") for stream in output)
        if is_late:
            return Fault("over 60 s", command[0], stderr)
        code = process.returncode
        if code < 0 or "Traceback (most recent call last)" in stderr:
            places = re.findall(r'File "(.*?)", line \d+, in (\w+)', stderr)
            inside = [f"{path}:{name}" for path, name in places if str(REPOSITORY) in path]
            last = stderr.strip().splitlines()[-1:] or [f"signal {-code}"]
            kind = last[0].partition(":")[0] if code >= 0 else f"signal {-code}"
            return Fault(kind, (inside or ["?"])[-1].removeprefix(f"{REPOSITORY}/"), stderr)
        fault = _judge(command, code, stdout, stderr)
        if fault is not None or code:
            return fault
    return None


def _judge(command: tuple[str, ...], code: int, stdout: str, stderr: str) -> Fault | None:
    """Return the fault of a command that has ended, by its exit code and its output."""
    place = command[0] if command else ""
    lines = stderr.splitlines()
    if "Traceback (most recent call last)" in stdout + stderr:
        return Fault("traceback", place, stderr)
    if code not in (0, 1, 2, 130):
        return Fault(f"exit code {code}", place, stderr)
    if code in (1, 2):
        errors = [line for line in lines if line.startswith("error: ")]
        if len(errors) != 1 or lines[-1] != errors[0]:
            return Fault("no one line of error", place, stderr + stdout[-500:])
        if len(errors[0]) > 5000:
            return Fault("error of over 5,000 characters", place, errors[0][:500])
    is_for_programs = any(word.startswith(("--json", "--csv")) for word in command)
    match = _UNSAFE.search(stderr) or (None if is_for_programs else _UNSAFE.search(stdout))
    if match:
        return Fault(f"prints {match.group()!r}", place, match.string[max(0, match.start() - 99) :])
    return None


def _deepest(error: BaseException) -> str:
    """Return file and function of the deepest frame in mmrec."""
    frames = traceback.extract_tb(error.__traceback__)
    folders = tuple(f"{REPOSITORY / package}/" for package in PACKAGES)
    inside = [frame for frame in frames if frame.filename.startswith(folders)]
    if not inside:
        return "?"
    return f"{Path(inside[-1].filename).relative_to(REPOSITORY)}:{inside[-1].name}"


# -- many inputs ----------------------------------------------------------------------------


@dataclass(kw_only=True, slots=True)
class Count:
    """Results of the inputs of one kind."""

    inputs: int = 0
    slowest: float = 0.0
    """Seconds of the slowest input that does not train."""
    faults: Counter[Fault] = field(default_factory=Counter)
    examples: dict[Fault, tuple[FuzzInput, str]] = field(default_factory=dict)
    """The shortest input of each fault, and the output."""


def fuzz(world: World, kind: str, inputs: int, seed: int, *, apart: bool = False) -> Count:
    """Run inputs of one kind, and collect their faults.

    Args:
        world: The working folder.
        kind: A key of ``INPUTS``.
        inputs: Number of inputs, without those that shorten a fault.
        seed: Seed of the inputs.
        apart: Run each command as a process.
    """
    count = Count()
    run = run_apart if apart else run_here
    phases = [Phase.generate] if apart else [Phase.generate, Phase.shrink]
    is_shrinking = False

    def check(given: FuzzInput) -> None:
        nonlocal is_shrinking
        world.restore()
        world.write(given.files)
        began = time.monotonic()
        fault = run(given)
        seconds = time.monotonic() - began
        if not is_shrinking:
            count.inputs += 1
            if not given.trains:
                count.slowest = max(count.slowest, seconds)
            if fault is not None:
                count.faults[fault] += 1
        if fault is not None and (is_shrinking or fault not in count.examples):
            latest[fault] = (given, fault.detail)
            if fault not in count.examples:
                if not is_shrinking:
                    print(_shown(fault, given), file=sys.stderr, flush=True)
                is_shrinking = not apart
                raise FaultError(fault)

    batch = 0
    while count.inputs < inputs:
        latest: dict[Fault, tuple[FuzzInput, str]] = {}
        test = settings(
            max_examples=min(BATCH, inputs - count.inputs),
            database=None,
            deadline=None,
            phases=phases,
            suppress_health_check=list(HealthCheck),
            report_multiple_bugs=False,
            print_blob=False,
        )(hypothesis.seed(seed * 1_000_003 + batch)(given(INPUTS[kind])(check)))
        try:
            test()
        except (FaultError, Flaky, BaseExceptionGroup):
            for fault, example in latest.items():
                count.examples.setdefault(fault, example)
        is_shrinking = False
        batch += 1
    return count


def _shown(fault: Fault, example: FuzzInput) -> str:
    return f"== {fault.kind} at {fault.place}\n{str(example)[:1500]}"


@contextmanager
def quiet_process(home: Path) -> Iterator[None]:
    """Give this process a home, an environment and limits in which no input does harm."""
    before, folder = dict(os.environ), Path.cwd()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    # A shell starts background jobs with SIGINT ignored, and then no training would be interrupted.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(_ENVIRONMENT, HOME=str(home))
    os.environ.pop("MMREC_WAREHOUSE", None)
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, limits[1]))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        signal.signal(signal.SIGINT, handler)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(before)


def import_all() -> None:
    """Import every module of the program: one whose import is interrupted cannot be used again.

    Modules of trackers whose packages are not installed are left out.
    """
    for package in (cli, pipeline, trainer, retrieval, features):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            try:
                importlib.import_module(module.name)
            except ModuleNotFoundError:
                if not module.name.startswith("trainer.tracking."):
                    raise


def main() -> None:
    """Read the command line, run the inputs and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--inputs", type=int, default=10_000, help="inputs in one process")
    parser.add_argument("--commands", type=int, default=300, help="inputs as processes")
    parser.add_argument("--seed", type=int, default=0, help="seed of the inputs")
    parser.add_argument("--only", default="", help="regular expression on the kinds of inputs")
    given = parser.parse_args()
    engine.MAX_SHRINKING_SECONDS = 20
    import_all()
    kinds = [kind for kind in INPUTS if re.search(given.only, kind)]
    print("| inputs | number | slowest, no training | inputs at fault | faults |")
    print("|---|---|---|---|---|", flush=True)
    examples: dict[Fault, tuple[FuzzInput, str]] = {}
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve()
        (folder / "home").mkdir()
        with quiet_process(folder / "home"):
            world = World(folder)
            for apart, total in ((False, given.inputs), (True, given.commands)):
                for number, kind in enumerate(kinds):
                    share = (total + number) // len(kinds)
                    count = fuzz(world, kind, share, given.seed, apart=apart)
                    name = f"{kind}, as processes" if apart else kind
                    print(
                        f"| {name} | {count.inputs} | {count.slowest:.1f} s |"
                        f" {count.faults.total()} | {len(count.faults)} |",
                        flush=True,
                    )
                    examples |= count.examples
    print(f"\n{len(examples)} faults; {time.monotonic() - began:.0f} s")
    for fault, (example, detail) in examples.items():
        print(f"\n{_shown(fault, example)}\n{detail[-3000:]}")
    raise SystemExit(1 if examples else 0)


if __name__ == "__main__":
    main()
