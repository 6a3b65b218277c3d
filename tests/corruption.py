"""Damage the files of a warehouse, run the commands that read them, compare with whole files.

    python -m tests.corruption [--flips N] [--truncations N] [--seed SEED] [--only REGEX]

A trial copies a warehouse, flips one bit of one file or cuts the file off at a random length, and
runs a command that reads files of this kind in a forked process. A third of the flips are in the
checksum that the file contains. The outcomes:

=========  =========================================================================================
equal      The output and the written files are those of the undamaged warehouse.
rebuilt    The same, and the damaged file has its first bytes again.
refused    One line names the file and the remedy, and the exit code is not 0.
named      One line names the file and the remedy, the rest of the output follows, and the exit code
           is not 0.
fault      Anything else: another result without a word, a traceback, a signal, no end.
=========  =========================================================================================

The warehouse has the demo with the backbone ``hashed``, a table whose images are in a Parquet file,
and runs of tiny models. The script prints a table and exits with 1 if there is a fault.
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
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch._dynamo  # the first step of AdamW imports it: forked processes have it at once

from cli import app
from features.store import FeatureStore
from features.warehouse import Warehouse
from pipeline.datasets.demo import make_demo
from tests.corruption_jobs import Job, all_jobs, pretrain_command, train_command
from tests.kills import ITEMS, USERS, contents, difference, wait

MOST_SECONDS = 120.0
OUTCOMES = ("refused", "named", "rebuilt", "equal", "fault")
_MARK = b"mmrec-crc32:"
_MARK_BYTES = len(_MARK) + 8
_SECONDS = re.compile(r"\d[\d.,:]* ?(s|ms|min|items/s|/s)\b|\"(seconds|rate)\": [\d.e-]+")


def build_warehouse(work_dir: Path) -> Path:
    """Make the warehouse whose files are damaged.

    Raises:
        SystemExit: A command fails.
    """
    raw, base = work_dir / "raw", work_dir / "base"
    make_demo(raw, users=USERS, items=ITEMS)
    _make_image_column(raw / "images", work_dir / "own")
    (work_dir / "out").mkdir()
    (work_dir / "grid.toml").write_text(
        '[runs]\nmodel = "sasrec"\ndataset = "demo"\nseed = [1, 2]\nepochs = 1\n'
        'dim = 8\nhidden = 8\nlength = 8\nheads = 2\ndevice = "cpu"\n'
    )
    extract = ("extract", "--dataset")
    for command in (
        ("prepare", "--dataset", "demo", "--raw", str(raw)),
        ("prepare", "--dataset", "demo", "--name", "cut", "--raw", str(raw)),
        ("prepare", "--dataset", "own", "--format", "table", "--raw", str(work_dir / "own")),
        *((*extract, "demo", f"--{modality}", "hashed") for modality in ("image", "text", "video")),
        (*extract, "demo", "--text", "hashed", "--level", "tokens"),
        (*extract, "cut", "--text", "hashed"),
        train_command("sasrec", "first"),
        train_command("mmsr", "mixed"),
        ("eval", "--run", "first"),
        ("eval", "--run", "mixed"),
        train_command("mmsr", "long", "--features", "text=hashed:tokens"),
        ("grid", str(work_dir / "grid.toml"), "--out", str(work_dir / "out" / "grid.csv")),
        pretrain_command("mmsrec", "aligned"),
    ):
        _must(run_command(command, base, work_dir))
    for command in (train_command("sasrec", "half"), pretrain_command("mmsrec", "stopped")):
        run_command(command, base, work_dir, before=_stop_at_second_state)
    _must(run_command(train_command("sasrec", "last"), base, work_dir))
    table = FeatureStore(Warehouse(base)).table("cut", "hashed", "text")
    for part in table.parts():  # half of the rows: an extraction that was stopped
        item = table.rows(part)["item"].to_numpy()
        table.rewrite(part, item % 2 == 0, item)
    return base


def _make_image_column(images: Path, folder: Path) -> None:
    """Write raw tables whose images are bytes in a Parquet file."""
    paths = sorted(path for path in images.rglob("*") if path.is_file())[:12]
    ids = [f"i{index}" for index in range(len(paths))]
    folder.mkdir()
    data = pa.array([path.read_bytes() for path in paths], pa.binary())
    pq.write_table(
        pa.table({"item_id": ids, "title": ids, "image": data}), folder / "items.parquet"
    )
    pairs = [f"u{user},{item}" for user in range(4) for item in ids[user:]]
    (folder / "interactions.csv").write_text("\n".join(["user_id,item_id", *pairs, ""]))


def _stop_at_second_state() -> None:
    """End this process when a training is about to save its second state."""
    from trainer import loop

    save: Callable[..., None] = vars(loop)["save_state"]
    n_states = 0

    def stop(*arguments: object) -> None:
        nonlocal n_states
        n_states += 1
        if n_states == 2:
            os._exit(1)
        save(*arguments)

    vars(loop)["save_state"] = stop


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """The end of a command."""

    code: int | None
    """Exit code, the negative number of a signal, or None if the command does not end."""
    output: str
    errors: str

    def notices(self) -> list[str]:
        """Return the lines about damage on standard error."""
        return [
            line
            for line in self.errors.splitlines()
            if re.match(r"error|left out|dataset .* cannot be used|\d+/\d+ .*: failed: ", line)
        ]


def run_command(
    command: Sequence[str],
    warehouse: Path,
    work_dir: Path,
    before: Callable[[], None] | None = None,
) -> Result:
    """Run a command in a forked process, and import here the modules that it imports.

    Args:
        command: The words after ``mmrec``.
        warehouse: The warehouse.
        work_dir: Folder of the files of the output.
        before: Called in the forked process before the command.
    """
    paths = [work_dir / name for name in ("stdout", "stderr", "modules.json")]
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            for number, path in enumerate(paths[:2], 1):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            if before is not None:
                before()
            sys.argv = ["mmrec", *command, "--warehouse", str(warehouse)]
            app.main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            paths[2].write_text(json.dumps(list(sys.modules)))
            os._exit(code)
    exit_code = wait(pid, MOST_SECONDS)
    if exit_code is None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    elif exit_code == 0:
        for name in json.loads(paths[2].read_text()):
            if name not in sys.modules and not name.startswith("__"):
                with suppress(Exception):
                    importlib.import_module(name)
    output, errors = (path.read_text(errors="replace") for path in paths[:2])
    return Result(code=exit_code, output=_SECONDS.sub("", output), errors=errors)


def _must(result: Result) -> None:
    if result.code:
        raise SystemExit(f"undamaged: exit code {result.code}: {result.errors[-500:]}")


@dataclass(kw_only=True, slots=True)
class Damage:
    """A flip or a cut of one file."""

    path: Path
    is_cut: bool
    generator: random.Random
    text: str = ""
    """Description of the damage, once it is done."""
    _before: bytes = b""
    _after: bytes = b""

    def apply(self) -> None:
        """Write the damaged bytes to a new file of the same name."""
        self._before = data = self.path.read_bytes()
        if self.is_cut:
            # Half of the cuts are near the end, where metadata and checksums are.
            least = self.generator.choice((0, max(0, len(data) - 64)))
            size = self.generator.randrange(least, len(data))
            self._after, self.text = data[:size], f"cut at {size} of {len(data)}"
        else:
            mark = data.rfind(_MARK)
            place = self.generator.randrange(len(data))
            if mark >= 0 and self.generator.random() < 1 / 3:
                place = mark + self.generator.randrange(_MARK_BYTES)
            changed = bytearray(data)
            changed[place] ^= 1 << self.generator.randrange(8)
            self._after, self.text = bytes(changed), f"byte {place} of {len(data)}"
            if mark <= place < mark + _MARK_BYTES:
                self.text += ", in the checksum"
        self._replace(self._after)

    def undo(self) -> bool:
        """Restore the file unless the command changed or removed it; return True if it did."""
        if not self.path.exists() or self.path.read_bytes() != self._after:
            return True
        self._replace(self._before)
        return False

    def _replace(self, data: bytes) -> None:
        self.path.unlink()
        self.path.write_bytes(data)


class Trials:
    """The undamaged results of all commands, and trials that are compared with them.

    Args:
        work_dir: Folder of all files.
        only: Regular expression on the names of commands.
    """

    def __init__(self, work_dir: Path, only: str = "") -> None:
        self._work_dir = work_dir
        self._base = build_warehouse(work_dir)
        self._warehouse = work_dir / "trial"
        self.jobs = [job for job in all_jobs(work_dir) if re.search(only, job.name)]
        self._expected: dict[str, tuple[str, dict[str, str]]] = {}
        for job in self.jobs:
            for _ in range(2):  # the first one imports modules, and makes caches in the base
                result = self._run(job)
                _must(result)
            self._expected[job.name] = (result.output, self._contents())

    def files(self, job: Job) -> list[tuple[str, list[Path]]]:
        """Return (kind, files) for each pattern of a job."""
        return [(kind_of(pattern), sorted(self._base.glob(pattern))) for pattern in job.reads]

    def run(self, job: Job, path: Path, is_cut: bool, generator: random.Random) -> tuple[str, str]:
        """Run a command on a damaged file; return the outcome and its description."""
        damage = Damage(
            path=self._warehouse / path.relative_to(self._base),
            is_cut=is_cut,
            generator=generator,
        )
        result = self._run(job, damage)
        outcome, reason = self._outcome(job, damage, result)
        name = damage.path.relative_to(self._warehouse)
        return outcome, f"{job.name}; {name}, {damage.text}; {reason}"

    def _run(self, job: Job, damage: Damage | None = None) -> Result:
        for folder in (self._warehouse, self._work_dir / "out"):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self._base, self._warehouse)
        (self._work_dir / "out").mkdir()
        if damage is not None:
            damage.apply()
        return run_command(job.command, self._warehouse, self._work_dir)

    def _contents(self) -> dict[str, str]:
        outputs = {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted((self._work_dir / "out").iterdir())
        }
        return contents(self._warehouse) | outputs

    def _outcome(self, job: Job, damage: Damage, result: Result) -> tuple[str, str]:
        """Return the outcome of a trial and its description."""
        if result.code is None or result.code < 0 or result.code >= 128:
            return "fault", f"exit code {result.code}: {result.errors[-300:]}"
        if "Traceback" in result.errors:
            return "fault", f"traceback: {result.errors[-600:]}"
        notices = [line for line in result.notices() if _names(line, damage.path)]
        if result.code:
            if not notices:
                return "fault", f"unclear, exit code {result.code}: {result.errors[-300:]}"
            return ("refused" if notices[-1].startswith("error") else "named"), notices[-1]
        is_changed = damage.undo()
        output, files = self._expected[job.name]
        fault = difference(files, self._contents())
        if result.output != output:
            fault = f"another output {fault}"
        if fault:
            return "fault", f"silent: {fault}; {result.errors[-300:]}"
        return ("rebuilt" if is_changed else "equal"), ""


def _names(line: str, path: Path) -> bool:
    """Return whether a line names a file or its folder, and a remedy after a semicolon."""
    return str(path.parent) in line and ";" in line


def kind_of(pattern: str) -> str:
    """Return the kind of file that a pattern of a job matches."""
    name = pattern.rsplit("/", 1)[-1]
    if name == "part-*" or ("features" in pattern and name == "*"):
        return "feature parts"
    return f"{pattern.split('/')[-2]}/*.parquet" if name.startswith("*") else name


@dataclass(kw_only=True, slots=True)
class Table:
    """Outcomes by the kind of file."""

    counts: dict[str, Counter[str]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def add(self, kind: str, is_cut: bool, outcome: str, description: str) -> None:
        """Add one trial."""
        count = self.counts.setdefault(kind, Counter())
        count.update((outcome, "cuts" if is_cut else "flips"))
        if outcome == "fault":
            self.faults.append(description)

    def total(self, column: str) -> int:
        """Return the sum of a column."""
        return sum(count[column] for count in self.counts.values())

    def lines(self) -> list[str]:
        """Return the table in Markdown."""
        columns = ("flips", "cuts", *OUTCOMES)
        rows = [
            f"| `{kind}` | {' | '.join(str(count[column]) for column in columns)} |"
            for kind, count in sorted(self.counts.items())
        ]
        return [f"| file | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|", *rows]


def run_trials(trials: Trials, flips: int, cuts: int, generator: random.Random) -> Table:
    """Run trials of every command and kind of file in turn, flips and cuts mixed."""
    cells = [(job, kind, paths) for job in trials.jobs for kind, paths in trials.files(job)]
    for job, kind, paths in cells:
        assert paths, f"{job.name} has no {kind}"
    damages = [False] * flips + [True] * cuts
    generator.shuffle(cells)
    generator.shuffle(damages)
    table = Table()
    for index, is_cut in enumerate(damages):
        job, kind, paths = cells[index % len(cells)]
        outcome, description = trials.run(job, generator.choice(paths), is_cut, generator)
        table.add(kind, is_cut, outcome, description)
    return table


def main() -> None:
    """Read the command line, run the trials and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--flips", type=int, default=200, help="number of flipped bits")
    parser.add_argument("--truncations", type=int, default=40, help="number of cuts")
    parser.add_argument("--seed", type=int, default=0, help="seed of files and places")
    parser.add_argument("--only", default="", help="regular expression on the names of commands")
    given = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        trials = Trials(Path(temporary).resolve(), given.only)
        table = run_trials(trials, given.flips, given.truncations, random.Random(given.seed))
    print("\n".join(table.lines()))
    print(
        f"\n{table.total('flips')} flips, {table.total('cuts')} cuts, {len(table.faults)} faults;"
        f" {time.monotonic() - began:.0f} s"
    )
    print("\n".join(table.faults))
    raise SystemExit(1 if table.faults else 0)


if __name__ == "__main__":
    main()
