"""Compare the training of two checkouts of mmrec: this one, and an earlier one.

    python -m tests.benchmarks.equal_versions --before DIR [--only REGEX] [--ranks] [--work DIR]

Both versions train every setting of :mod:`tests.benchmarks.equal_settings` on the same small data
from the same weights, with the same batches and the same random numbers. The script compares the
losses of the first steps, and with ``--ranks`` the rank of every evaluated user after two epochs,
on validation and test, with seen items filtered and kept. It exits with 1 if a loss differs by more
than 1e-6 or more than 3 users of a split have another rank.

The earlier version makes the data: the demo with fewer users and items, and the tables of the
backbone ``hashed``. Each version gets its own copy, and a version that changes the data fails.
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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.equal_settings import (
    BERT_LEVEL,
    LIMITS,
    RENAMED_PARAMETERS,
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
        make = "import sys; from pathlib import Path; from pipeline.demo import make_demo;"
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
    role: str, chosen: Sequence[Setting], work_dir: Path, ranks: bool
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
        if role == "after":
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


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[list[str], bool]:
    """Return the cells of one row of the table, and whether the versions are equal."""
    for role, result in (("before", before), ("after", after)):
        if "error" in result:
            return [f"{role}: {result['error']}", "-", "-", "-"], False
    steps = list(zip(before["losses"], after["losses"], strict=False))
    differences = [
        abs(float.fromhex(old[name]) - float.fromhex(new[name]))
        for old, new in steps
        for name in old.keys() & new.keys()
    ]
    largest = max(differences, default=math.inf)
    users = [
        sum(a != b for a, b in zip(ranks, after["ranks"][split], strict=True))
        for split, ranks in before["ranks"].items()
    ]
    equal = len(before["losses"]) == len(after["losses"]) and largest <= LOSS_TOLERANCE
    equal = equal and max(users, default=0) <= RANK_TOLERANCE
    own = after["own"] or "yes"
    if before["generator"] != after["generator"]:
        own += "; the generator's state differs"
    evaluated = sum(map(len, before["ranks"].values()))
    others = f"{sum(users)} of {evaluated}" if users else "-"
    return [str(len(steps)), f"{largest:.1e}" if largest else "0", own, others], equal


def compare_versions(
    before: Path, chosen: Sequence[Setting], work_dir: Path, ranks: bool, show_all: bool
) -> bool:
    """Run both versions, print a row for each setting, and return whether all are equal."""
    data = make_data(before, work_dir)
    results, seconds = [], []
    for role, checkout in (("before", before), ("after", HERE)):
        began = time.monotonic()
        jobs = make_jobs(role, chosen, work_dir, ranks)
        results.append(run_jobs(role, checkout, data, work_dir, jobs))
        seconds.append(time.monotonic() - began)
    print("| setting | steps | max difference of losses | equal initial weights | other ranks |")
    print("|---|---|---|---|---|")
    unequal = 0
    for entry, old, new in zip(chosen, *results, strict=True):
        cells, equal = compare(old, new)
        unequal += not equal
        if show_all or not equal or cells[2] != "yes":
            name = entry.name if equal else f"**{entry.name}**"
            print(f"| {name} | {' | '.join(cells)} |")
    spent = " and ".join(f"{value:.0f} s" for value in seconds)
    print(f"{len(chosen)} settings, {unequal} unequal; {spent}")
    return not unequal


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
