"""Compare the training of two checkouts of mmrec: this one, and an earlier one.

    python -m tests.benchmarks.equal_versions --before DIR [--only REGEX] [--ranks] [--work DIR]

Both versions train every setting of :mod:`tests.benchmarks.equal_settings` on the same small data
from the same weights, with the same batches and the same random numbers. The script compares the
losses of the first steps, and with ``--ranks`` the rank of every evaluated user after two epochs,
on validation and test, with seen items filtered and kept. It exits with 1 if a loss differs by more
than 1e-6 (the few settings of ``ROUNDED``: 1e-5) or more than 3 users of a split have another rank.

The earlier version is 0.1 (commit 83959dc) or one whose runs are in ``trainer/runs``. It makes the
data: the demo with fewer users and items, and the tables of the backbone ``hashed``. Each version
gets its own copy, and a version that changes the data fails.
``--work DIR`` keeps the data and the results of the earlier version for the next comparison.
"""

import argparse
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.equal_settings import (
    BERT_LEVEL,
    LIMITS,
    RENAMED_PARAMETERS,
    ROUNDED,
    Setting,
    all_settings,
    rename_settings,
)

HERE = Path(__file__).resolve().parents[2]
STEPS, EPOCHS = 30, 2
LOSS_TOLERANCE, RANK_TOLERANCE = 1e-6, 3
USERS, ITEMS = 300, 192


def call(checkout: Path, *command: str) -> None:
    """Run Python in a checkout, with its own packages first and one thread.

    Raises:
        SystemExit: The process fails.
    """
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-P", *command], cwd=checkout, env=environment, stdout=subprocess.DEVNULL
    )
    if done.returncode:
        raise SystemExit(f"{checkout}: {' '.join(command[:4])} ended with {done.returncode}")


def has_current_names(checkout: Path) -> bool:
    """Return whether a version has the modules and settings of this version, not those of 0.1."""
    return (checkout / "trainer" / "runs").is_dir()


def make_data(before: Path, work_dir: Path) -> Path:
    """Let the version before make the warehouse; return its folder."""
    root = work_dir / "warehouse"
    if (root / "made").exists():
        return root
    shutil.rmtree(root, ignore_errors=True)
    quiet = ("--warehouse", str(root))
    for seed, name in enumerate(("demo", "other")):
        raw = work_dir / f"raw-{name}"
        shutil.rmtree(raw, ignore_errors=True)
        module = "pipeline.datasets.demo" if has_current_names(before) else "pipeline.demo"
        make = f"import sys; from pathlib import Path; from {module} import make_demo;"
        make += f" make_demo(Path(sys.argv[1]), users={USERS}, items={ITEMS}, seed={seed})"
        call(before, "-c", make, str(raw))
        prepare = ("prepare", "--dataset", "demo", "--name", name, "--raw", str(raw), *quiet)
        call(before, "-m", "cli.app", *prepare)
        extract = ("extract", "--dataset", name, "--image", "hashed", "--text", "hashed")
        call(before, "-m", "cli.app", *extract, "--video", "hashed", *quiet)
    extract_text = ("extract", "--dataset", "demo", *quiet, "--text")
    call(before, "-m", "cli.app", *extract_text, "hashed", "--level", "tokens")
    from tests.pipeline.backbones.checkpoints import bert_folder  # imports transformers

    bert = bert_folder(work_dir / "bert")
    call(before, "-m", "cli.app", *extract_text, str(bert), "--level", BERT_LEVEL)
    (root / "made").touch()
    return root


def changed_files(data: Path, root: Path) -> list[str]:
    """Return the files of ``data`` that are gone or have other bytes in its copy ``root``."""
    names = [path.relative_to(data) for path in sorted(data.rglob("*")) if path.is_file()]
    return [
        str(name)
        for name in names
        if not (root / name).exists() or (root / name).read_bytes() != (data / name).read_bytes()
    ]


def make_jobs(
    checkout: Path, chosen: Sequence[Setting], work_dir: Path, ranks: bool
) -> list[dict[str, Any]]:
    """Return settings in the words of a version, as ``equal_worker`` takes them."""
    jobs = []
    for entry in chosen:
        about = [entry.name, entry.settings, dict(entry.limits), ranks, STEPS, EPOCHS]
        key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
        length = ["epochs=1000", "validate_every=1000"]
        if ranks:
            length = [f"epochs={EPOCHS}"]
        pairs, limits = [*entry.settings, *length, "seed=42"], dict(entry.limits)
        if has_current_names(checkout):
            pairs = rename_settings(entry.model, pairs)
            limits = {LIMITS[name]: value for name, value in limits.items()}
        job = {
            "key": key,
            "model": entry.model,
            "datasets": entry.datasets,
            "stage": entry.stage,
            "features": entry.features,
            "settings": pairs,
            "limits": limits,
            "steps": 0 if ranks else STEPS,
            "start": str(work_dir / "before" / f"{key}.safetensors"),
            "renamed": [
                names for model, *names in RENAMED_PARAMETERS if model in ("", entry.model)
            ],
        }
        jobs.append(job)
    return jobs


def run_jobs(
    role: str, checkout: Path, data: Path, work_dir: Path, jobs: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Run jobs in a process of a version and return their results.

    Results of the version before are read where the work folder has them already.
    """
    folder = work_dir / role
    if role == "after":
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(exist_ok=True)
    missing = [job for job in jobs if not (folder / f"{job['key']}.json").exists()]
    if missing:
        root = work_dir / f"warehouse-{role}"
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(data, root)
        file = work_dir / f"jobs-{role}.json"
        file.write_text(json.dumps(missing))
        worker = Path(__file__).with_name("equal_worker.py").resolve()
        call(checkout, str(worker), role, str(root), str(file), str(folder))
        changed = changed_files(data, root)
        if changed:
            raise SystemExit(f"the version {role} has changed {', '.join(changed[:3])} in {root}")
    return [json.loads((folder / f"{job['key']}.json").read_text()) for job in jobs]


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """How the two versions train one setting."""

    name: str
    model: str
    steps: int = 0
    """Steps whose losses are compared."""
    largest: float = math.inf
    """Largest difference between two losses."""
    own: str = ""
    """How the initial weights differ; empty: they are equal."""
    users: int = 0
    """Users of the split with the most of them who have another rank."""
    evaluated: int = 0
    """Users of a split; 0: ranks are not compared."""
    equal: bool = False
    error: str = ""

    def cells(self) -> list[str]:
        """Return the cells of a row of the table."""
        if self.error:
            return [self.name, self.error, "", "", ""]
        users = f"{self.users} of {self.evaluated}" if self.evaluated else "-"
        return [self.name, str(self.steps), f"{self.largest:.2g}", self.own or "yes", users]


def compare(entry: Setting, before: Mapping[str, Any], after: Mapping[str, Any]) -> Comparison:
    """Compare the results of one setting."""
    for role, result in (("before", before), ("after", after)):
        if "error" in result:
            error = f"{role}: {result['error']}"
            return Comparison(name=entry.name, model=entry.model, error=error)
    steps = list(zip(before["losses"], after["losses"], strict=False))
    differences = [
        abs(float.fromhex(old[name]) - float.fromhex(new[name]))
        for old, new in steps
        for name in old.keys() & new.keys()
    ]
    largest = max(differences, default=math.inf)
    splits = [(ranks, after["ranks"][split]) for split, ranks in before["ranks"].items()]
    users = max((sum(a != b for a, b in zip(*pair, strict=True)) for pair in splits), default=0)
    rounded = [bound for pattern, bound in ROUNDED if re.search(pattern, entry.name)]
    tolerance = max([LOSS_TOLERANCE, *rounded])
    own = after["own"]
    if before["generator"] != after["generator"]:
        own = "; ".join(filter(None, [own, "the state of the generator differs"]))
    return Comparison(
        name=entry.name,
        model=f"{entry.model} {entry.stage}".strip(),
        steps=len(steps),
        largest=largest,
        own=own,
        users=users,
        evaluated=max((len(old) for old, _ in splits), default=0),
        equal=len(before["losses"]) == len(after["losses"])
        and largest <= tolerance
        and users <= RANK_TOLERANCE,
    )


def summary(rows: Sequence[Comparison]) -> Iterator[list[str]]:
    """Yield a row for each model: its settings, and the worst of each column."""
    for model in dict.fromkeys(row.model for row in rows):
        of_model = [row for row in rows if row.model == model]
        users = max(row.users for row in of_model)
        evaluated = max(row.evaluated for row in of_model)
        yield [
            f"{model}: {sum(row.equal for row in of_model)} of {len(of_model)} settings are equal",
            str(min(row.steps for row in of_model)),
            f"{max(row.largest for row in of_model):.2g}",
            f"{sum(not row.own for row in of_model)} of {len(of_model)}",
            f"{users} of {evaluated}" if evaluated else "-",
        ]


def compare_versions(
    before: Path, chosen: Sequence[Setting], work_dir: Path, ranks: bool, show_all: bool
) -> bool:
    """Run both versions, print the table, and return whether all settings are equal."""
    data = make_data(before, work_dir)
    results, seconds = [], []
    for role, checkout in (("before", before), ("after", HERE)):
        began = time.monotonic()
        jobs = make_jobs(checkout, chosen, work_dir, ranks)
        results.append(run_jobs(role, checkout, data, work_dir, jobs))
        seconds.append(f"{time.monotonic() - began:.0f} s")
    rows = [compare(*entry) for entry in zip(chosen, *results, strict=True)]
    print("| setting | steps | max difference of losses | equal initial weights | other ranks |")
    print("|---|---|---|---|---|")
    shown = [row.cells() for row in rows if show_all or row.own or not row.equal]
    for cells in (*shown, *summary(rows)):
        print(f"| {' | '.join(cells)} |")
    print(f"\n{sum(not row.equal for row in rows)} of {len(rows)} settings differ; {seconds}")
    return all(row.equal for row in rows)


def main() -> None:
    """Read the command line, run both versions and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--before", type=Path, required=True, help="checkout to compare with")
    parser.add_argument("--only", default="", help="regular expression on the names of settings")
    parser.add_argument("--ranks", action="store_true", help="train two epochs, compare ranks too")
    parser.add_argument("--work", type=Path, help="folder that keeps data and earlier results")
    parser.add_argument("--all", action="store_true", help="print the equal settings too")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work_dir = (given.work or Path(temporary)).resolve()
        work_dir.mkdir(parents=True, exist_ok=True)
        chosen = [entry for entry in all_settings() if re.search(given.only, entry.name)]
        equal = compare_versions(given.before.resolve(), chosen, work_dir, given.ranks, given.all)
    raise SystemExit(0 if equal else 1)


if __name__ == "__main__":
    main()
