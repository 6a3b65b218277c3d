"""What starting costs: short commands, and the verification of checksums.

    python -m tests.benchmarks.bench_startup [commands|table|starts]

"commands": CPU seconds of `mmrec models`, `backbones`, `datasets` and `sql 'SELECT 1'`, and of
`mmrec recommend` beyond importing torch, each the best of some fresh processes. The warehouse has
three datasets, a feature table and 30 runs. Compiled modules are kept, as after an installation.

"table": reading a feature table of 100,000 x 512 with and without verification, in turn.

"starts": `train` to its first step and `eval` to its end with and without verification, in turn.
"""

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv

ROUNDS = 5
ROWS, DIM = 100_000, 512
SETTINGS = ("epochs=1", "dim=16", "heads=2", "hidden=16", "candidates=256", "length=20")
COMMANDS = {
    "models": ["models"],
    "backbones": ["backbones"],
    "datasets": ["datasets"],
    "sql 'SELECT 1'": ["sql", "SELECT 1"],
}
_UNVERIFIED = (
    "import features.checksums as c; c.verify = lambda path: "
    ";"
    " c.verify_files = lambda *arguments: None;"
)


def cpu_seconds(command: list[str], environment: dict[str, str]) -> float:
    """Return user and system seconds of a fresh process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, env=environment, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def python(*words: str) -> list[str]:
    """Return a command of this interpreter."""
    return [sys.executable, *words]


def mmrec(*words: str, code: str = "") -> list[str]:
    """Return a command of mmrec in a fresh process; ``code`` runs before it."""
    return python("-c", f"{code}from cli.app import main; main()", *words)


def write_raw(folder: Path, *, users: int, items: int, length: int) -> None:
    """Write raw tables of random interactions and short texts."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    user = np.repeat(np.arange(users), length)
    item = (items * random.random(len(user)) ** 2).astype(np.int64)
    item[:items] = np.arange(items)
    interactions = {"user_id": user, "item_id": item, "timestamp": np.arange(len(user))}
    pyarrow.csv.write_csv(pa.table(interactions), folder / "interactions.csv")
    texts = [f"item {i} of kind {i % 97} and colour {i % 31}" for i in range(items)]
    table = pa.table({"item_id": np.arange(items), "text": texts})
    pyarrow.csv.write_csv(table, folder / "items.csv")


def build(root: Path, environment: dict[str, str], runs: int) -> Path:
    """Return a warehouse with three datasets, a feature table and runs of two models."""
    warehouse = root / "warehouse"
    sizes = {
        "small": (500, 300, 8),
        "middle": (3_000, 1_600, 9),  # Amazon Beauty has 7 times as many users
        "large": (1_000, 600, 100),  # MovieLens-1M has 6 times as many
    }
    for name, (users, items, length) in sizes.items():
        write_raw(root / name, users=users, items=items, length=length)
        words = ["prepare", "--dataset", name, "--format", "table", "--raw", str(root / name)]
        subprocess.run(mmrec(*words, "--k-core", "0"), env=environment, check=True)
    commands = [["extract", "--dataset", "middle", "--text", "hashed"]]
    for model, dataset in (("sasrec", "large"), ("mmsrec", "middle")):
        pairs = [word for pair in SETTINGS for word in ("--set", pair)]
        train = ["train", "--model", model, "--dataset", dataset, "--name", model, *pairs]
        commands += [train, ["eval", "--run", model]]
    for command in commands:
        subprocess.run(mmrec(*command), env=environment, check=True)
    for number in range(runs):
        shutil.copytree(warehouse / "runs" / "sasrec", warehouse / "runs" / f"copy-{number}")
    return warehouse


def commands(warehouse: Path, environment: dict[str, str]) -> None:
    """Print the CPU seconds of short commands."""
    print("| command | CPU s | goal |\n|---|---|---|")
    for name, words in COMMANDS.items():
        spent = min(cpu_seconds(mmrec(*words), environment) for _ in range(ROUNDS))
        print(f"| `{name}` | {spent:.2f} | 1.0 |")
    pairs: dict[str, list[tuple[float, float]]] = {"sasrec": [], "mmsrec": []}
    for _ in range(ROUNDS):
        for run, figures in pairs.items():
            torch = cpu_seconds(python("-c", "import torch"), environment)
            words = ["recommend", "--run", run, "--user", "1"]
            figures.append((torch, cpu_seconds(mmrec(*words), environment)))
    for run, figures in pairs.items():
        beyond = statistics.median(whole - torch for torch, whole in figures)
        torch = statistics.median(torch for torch, _ in figures)
        print(f"| `recommend`, {run}, beyond importing torch ({torch:.2f}) | {beyond:.2f} | 1.5 |")


def ratio(name: str, verified: Callable[[], float], plain: Callable[[], float]) -> None:
    """Print the medians of pairs of measurements that take turns, and of their ratios."""
    pairs = [(verified(), plain()) for _ in range(ROUNDS)]
    medians = [statistics.median(values) for values in zip(*pairs, strict=True)]
    share = statistics.median(a / b for a, b in pairs)
    print(f"| {name} | {medians[0]:.2f} | {medians[1]:.2f} | {share:.3f} |")


def table(root: Path) -> None:
    """Print what the verification of a large feature table costs."""
    from features import atomic_files, checksums
    from features.arrow_columns import embedding_array
    from features.matrices import read_vectors
    from features.provenance import Provenance

    provenance = Provenance(
        backbone="random", checkpoint="", preprocessing="", pooling="", modality="text",
        level="pooled", compute="float32", dtype="float16", dim=DIM,
    )  # fmt: skip
    random = np.random.default_rng(0)
    parts = []
    for start in range(0, ROWS, 8192):
        rows = np.arange(start, min(start + 8192, ROWS), dtype=np.int32)
        vectors = random.standard_normal((len(rows), DIM)).astype(np.float16)
        columns = {"item": pa.array(rows), "embedding": embedding_array(vectors)}
        parts.append(root / f"part-{start:08d}.parquet")
        atomic_files.write_table(parts[-1], pa.table(columns), compression="none")

    def read(is_verified: bool) -> float:
        checksums._verified.clear()
        verify = checksums.verify
        if not is_verified:
            vars(atomic_files)["verify"] = lambda path: True
        began = time.process_time()
        read_vectors(parts, ROWS, provenance)
        spent = time.process_time() - began
        vars(atomic_files)["verify"] = verify
        return spent

    read(True)
    ratio(f"reading {ROWS:,} x {DIM}, CPU s", lambda: read(True), lambda: read(False))


def starts(warehouse: Path, environment: dict[str, str]) -> None:
    """Print what verification costs when `train` and `eval` start."""
    first_step = (
        "import os, trainer.loop as l; l.Optimizer.prepare = lambda *arguments: os._exit(0);"
    )
    for run in ("sasrec", "mmsrec"):
        dataset = {"sasrec": "large", "mmsrec": "middle"}[run]
        pairs = [word for pair in SETTINGS for word in ("--set", pair)]
        train = ["train", "--model", run, "--dataset", dataset, *pairs]

        def begin(code: str, train: list[str] = train) -> float:
            return cpu_seconds(mmrec(*train, code=code + first_step), environment)

        def evaluate(code: str, run: str = run) -> float:
            return cpu_seconds(mmrec("eval", "--run", run, code=code), environment)

        for name, measure in (("train", begin), ("eval", evaluate)):
            what = "to its first step" if name == "train" else "whole"
            ratio(
                f"`{name}` of {run}, {what}, CPU s",
                lambda measure=measure: measure(""),  # type: ignore[misc]
                lambda measure=measure: measure(_UNVERIFIED),  # type: ignore[misc]
            )


def main() -> None:
    """Measure the named sections, or all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sections", nargs="*", default=["commands", "table", "starts"])
    sections = parser.parse_args().sections
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(root / "compiled")}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        environment["MMREC_WAREHOUSE"] = str(root / "warehouse")
        if {"commands", "starts"} & set(sections):
            warehouse = build(root, environment, runs=28)
        if "commands" in sections:
            commands(warehouse, environment)
        if {"table", "starts"} & set(sections):
            print("\n| work | verified | not verified | ratio |\n|---|---|---|---|")
        if "table" in sections:
            table(root)
        if "starts" in sections:
            starts(warehouse, environment)


if __name__ == "__main__":
    main()
