"""Kill commands at random instants, continue them, and compare the results.

    python -m tests.kills [--kills N] [--seed SEED] [--only REGEX]

The commands are ``extract``, ``train``, ``pretrain`` and ``eval``. A trial starts a command in a
forked process, sends SIGKILL or SIGTERM after a random time, up to three times, and then lets the
command end. The resulting warehouse must have the same files as after an uninterrupted command.
Feature tables, weights, states and predictions must have equal bytes, metrics must be equal but for
seconds. The parts of a feature table are compared as one table in the order of items, because a
kill divides a table into more parts.

The trials use the demo with the backbone ``hashed`` and tiny models. The script prints a table and
exits with 1 if a result differs.
"""

import argparse
import hashlib
import importlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch._dynamo  # the first step of AdamW imports it: forked processes have it at once

from cli import app
from features.atomic_files import read_table
from pipeline.datasets.demo import make_demo
from pipeline.extraction import table_writer

USERS, ITEMS = 60, 192
MOST_KILLS = 3
"""Largest number of kills of one trial."""
MOST_SECONDS = 120.0
SECONDS_PER_PART = 0.02
SETTINGS = ("dim=8", "hidden=8", "length=8", "epochs=3", "batch_size=16", "device=cpu")
RUN = "killed"


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A command that is killed."""

    name: str
    command: tuple[str, ...]
    again: tuple[str, ...] = ()
    """Command that continues a run which has a configuration; empty: the same command."""
    then: tuple[str, ...] = ()
    """Command that runs after the killed one; its results are compared too."""
    needs: tuple[str, ...] = ()
    """Names of the jobs whose results the command reads."""

    def next_command(self, warehouse: Path) -> tuple[str, ...]:
        """Return the command that starts or continues the work in a warehouse."""
        is_begun = (warehouse / "runs" / RUN / "config.toml").exists()
        return self.again if self.again and is_begun else self.command


@dataclass(kw_only=True, slots=True)
class Count:
    """Results of the trials of one job."""

    trials: int = 0
    kills: dict[int, int] = field(default_factory=lambda: {signal.SIGKILL: 0, signal.SIGTERM: 0})
    """Kills of a running command, by signal."""
    late: int = 0
    """Signals that were sent after the end of the command."""
    faults: list[str] = field(default_factory=list)


def all_jobs() -> list[Job]:
    """Return the jobs; a job comes after the jobs whose results it reads."""
    extract = ("extract", "--dataset", "demo")
    jobs = [
        Job(name=name, command=(*extract, *options.split()))
        for name, options in (
            ("extract images", "--image hashed"),
            ("extract texts", "--text hashed"),
            ("extract tokens", "--text hashed --level tokens"),
            ("extract videos", "--video hashed"),
        )
    ]
    needs = tuple(job.name for job in jobs)
    evaluate = ("eval", "--run", RUN)
    for name, heads, then in (
        ("train sasrec", "heads", evaluate),
        ("train mmsr", "fusion_heads", evaluate),
        ("train mmsrec", "heads", evaluate),
        ("pretrain mmsrec", "heads", (*evaluate, "--protocol", "retrieval")),
        ("pretrain pmmrec", "fusion_heads", ()),
    ):
        word, model = name.split()
        pairs = [option for pair in (*SETTINGS, f"{heads}=2") for option in ("--set", pair)]
        command = (word, "--dataset", "demo", "--model", model, "--name", RUN, *pairs)
        again = (word, "--resume", "--run", RUN)
        reads = () if model == "sasrec" else needs
        jobs.append(Job(name=name, command=command, again=again, then=then, needs=reads))
    jobs.append(Job(name="eval sasrec", command=evaluate, needs=("train sasrec",)))
    return jobs


def start(command: Sequence[str], warehouse: Path, log: Path, modules: Path | None = None) -> int:
    """Start a command in a forked process and return the id of the process.

    Args:
        command: The words after ``mmrec``.
        warehouse: The warehouse.
        log: File that the output is appended to.
        modules: File for the names of the imported modules, written at the end of the command.
    """
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.argv = ["mmrec", *command, "--warehouse", str(warehouse)]
        app.main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
        if modules is not None:
            modules.write_text(json.dumps(list(sys.modules)))
    finally:
        os._exit(code)


def wait(pid: int, seconds: float) -> int | None:
    """Return the exit code of a process; None if the process still runs after ``seconds``."""
    until = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= until:
            return None
        time.sleep(0.001)


def finish(command: Sequence[str], warehouse: Path, log: Path, modules: Path | None = None) -> str:
    """Run a command to its end; return its fault, or an empty text."""
    pid = start(command, warehouse, log, modules)
    code = wait(pid, MOST_SECONDS)
    if code is None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return f"{command[0]} does not end"
    if code:
        return f"{command[0]} ends with {code}: {log.read_text().splitlines()[-1:]}"
    return ""


def contents(warehouse: Path) -> dict[str, str]:
    """Return a digest of each file of a warehouse, of what must be equal in it.

    The parts of a table are one entry, and of its manifest it counts whether it names all parts:
    a command that is continued divides the rows into other parts. Locks have their names only.
    """
    digests: dict[str, str] = {}
    for path in sorted(warehouse.rglob("*")):
        name = str(path.relative_to(warehouse))
        if path.is_dir() or path.name.endswith("lock"):
            digests[name] = ""
        elif path.name.startswith("part-") and path.parent.parent.parent.parent.name == "features":
            digests[str(path.parent.relative_to(warehouse))] = _table_digest(path.parent)
        elif path.name == "metrics.parquet":
            rows = [row for row in read_table(path).to_pylist() if row["metric"] != "seconds"]
            digests[name] = _digest(repr(rows).encode())
        elif path.name == "config.toml":
            lines = path.read_text().splitlines()
            kept = [line for line in lines if not re.match("created =|# mmrec-crc32", line)]
            digests[name] = _digest("\n".join(kept).encode())
        elif path.suffix == ".json" and path.with_suffix("").is_dir():
            document = json.loads(path.read_text())
            recorded = set(document.pop("parts"))
            del document["checksum"]  # that of the document, which names the parts
            is_complete = recorded == {
                part.name for part in path.with_suffix("").glob("part-*.parquet")
            }
            digests[name] = _digest(repr((document, is_complete)).encode())
        else:
            digests[name] = _digest(path.read_bytes())
    return digests


def _table_digest(folder: Path) -> str:
    """Return the digest of the rows and the metadata of a feature table."""
    parts = [read_table(path) for path in sorted(folder.glob("part-*.parquet"))]
    footers = {repr(part.schema.metadata[b"mmrec"]) for part in parts}
    table = pa.concat_tables(parts).sort_by("item").combine_chunks()
    stream = pa.BufferOutputStream()
    with pq.ParquetWriter(stream, table.schema.remove_metadata()) as writer:
        writer.write_table(table.replace_schema_metadata(None))
    return _digest(stream.getvalue().to_pybytes() + repr(sorted(footers)).encode())


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def difference(expected: dict[str, str], actual: dict[str, str]) -> str:
    """Return the files that are missing, stray or different; an empty text if there are none."""
    names = sorted(expected.keys() | actual.keys())
    kinds = {
        name: "missing" if name not in actual else "stray" if name not in expected else "differs"
        for name in names
        if expected.get(name) != actual.get(name)
    }
    return ", ".join(f"{name} {kind}" for name, kind in kinds.items())


class Trials:
    """Uninterrupted results of all jobs, and the trials that are compared with them.

    Args:
        work_dir: Folder of all files.
        jobs: The jobs.

    Raises:
        SystemExit: An uninterrupted command fails.
    """

    def __init__(self, work_dir: Path, jobs: Sequence[Job]) -> None:
        self._work_dir = work_dir
        self._log = work_dir / "log.txt"
        self._before: dict[str, Path] = {}
        self._expected: dict[str, dict[str, str]] = {}
        self._seconds: dict[str, float] = {}
        raw = work_dir / "raw"
        make_demo(raw, users=USERS, items=ITEMS)
        prepared = work_dir / "prepared"
        self._must(("prepare", "--dataset", "demo", "--raw", str(raw)), prepared)
        extracted = work_dir / "extracted"
        shutil.copytree(prepared, extracted)
        needed = {name for job in jobs for name in job.needs}
        for job in jobs:
            if job.command[0] == "extract" and job.name in needed:
                self._must(job.command, extracted)
        for job in jobs:
            self._before[job.name] = extracted if job.needs else prepared
            if job.needs and job.command[0] == "eval":
                self._before[job.name] = work_dir / f"whole-{job.needs[-1]}-trained"
            self._measure(job)

    def _must(self, command: Sequence[str], warehouse: Path) -> float:
        """Run a command to its end, import its modules here, and return its seconds."""
        modules = self._work_dir / "modules.json"
        began = time.monotonic()
        fault = finish(command, warehouse, self._log, modules)
        if fault:
            raise SystemExit(f"uninterrupted: {fault}")
        seconds = time.monotonic() - began
        for name in json.loads(modules.read_text()):
            if name not in sys.modules and not name.startswith("__"):
                with suppress(Exception):
                    importlib.import_module(name)
        return seconds

    def _measure(self, job: Job) -> None:
        """Run a job without a kill, twice: imports take a part of the first time."""
        whole = self._work_dir / f"whole-{job.name}"
        for _ in range(2):
            shutil.rmtree(whole, ignore_errors=True)
            shutil.copytree(self._before[job.name], whole)
            self._seconds[job.name] = self._must(job.command, whole)
        if job.then:
            trained = whole.with_name(f"{whole.name}-trained")
            shutil.copytree(whole, trained)
            self._must(job.then, whole)
        self._expected[job.name] = contents(whole)

    def run(self, job: Job, generator: random.Random, count: Count) -> None:
        """Run one trial and add its result to ``count``."""
        count.trials += 1
        warehouse = self._work_dir / "trial"
        shutil.rmtree(warehouse, ignore_errors=True)
        shutil.copytree(self._before[job.name], warehouse)
        self._log.unlink(missing_ok=True)
        history = []
        for _ in range(generator.randint(1, MOST_KILLS)):
            number = generator.choice((signal.SIGKILL, signal.SIGTERM))
            seconds = generator.uniform(0, self._seconds[job.name])
            history.append(f"{number.name} after {seconds:.3f} s")
            pid = start(job.next_command(warehouse), warehouse, self._log)
            if wait(pid, seconds) is not None:
                count.late += 1
                continue
            os.kill(pid, number)
            code = wait(pid, MOST_SECONDS)
            if code == 0:
                count.late += 1
                continue
            count.kills[number] += 1
            if code not in (-number, 128 + number):
                count.faults.append(f"{job.name}, {history}: exit code {code}")
        fault = finish(job.next_command(warehouse), warehouse, self._log)
        if not fault and job.then:
            fault = finish(job.then, warehouse, self._log)
        fault = fault or difference(self._expected[job.name], contents(warehouse))
        if fault:
            count.faults.append(f"{job.name}, {history}: {fault}")


def run_trials(work_dir: Path, only: str, kills: int, seed: int) -> dict[str, Count]:
    """Run trials of the jobs whose name matches ``only`` in turn, until there are enough kills.

    Args:
        work_dir: Folder of all files.
        only: Regular expression.
        kills: Smallest number of kills.
        seed: Seed of signals and instants.
    """
    jobs = [job for job in all_jobs() if re.search(only, job.name)]
    needed = {name for job in jobs for name in job.needs}
    available = [job for job in all_jobs() if job in jobs or job.name in needed]
    trials, generator = Trials(work_dir, available), random.Random(seed)
    counts = {job.name: Count() for job in jobs}
    while sum(sum(count.kills.values()) for count in counts.values()) < kills:
        for job in jobs:
            trials.run(job, generator, counts[job.name])
    return counts


def main() -> None:
    """Read the command line, run the trials and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="smallest number of kills")
    parser.add_argument("--seed", type=int, default=0, help="seed of signals and instants")
    parser.add_argument("--only", default="", help="regular expression on the names of commands")
    given = parser.parse_args()
    torch.set_num_threads(1)
    table_writer.SECONDS_PER_PART = SECONDS_PER_PART
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        counts = run_trials(Path(temporary).resolve(), given.only, given.kills, given.seed)
    print("| command | trials | SIGKILL | SIGTERM | after its end | differences |")
    print("|---|---|---|---|---|---|")
    for name, count in counts.items():
        numbers = [count.trials, *count.kills.values(), count.late, len(count.faults)]
        print(f"| {name} | {' | '.join(map(str, numbers))} |")
    faults = [fault for count in counts.values() for fault in count.faults]
    total = sum(sum(count.kills.values()) for count in counts.values())
    print(f"\n{total} kills, {len(faults)} differences; {time.monotonic() - began:.0f} s")
    print("\n".join(faults))
    raise SystemExit(1 if faults else 0)


if __name__ == "__main__":
    main()
