"""SASRec's training epoch and evaluation against RecBole's, in one run on one machine.

    python -m tests.benchmarks.bench_recbole --peer PYTHON --raw ML100K [--threads 1] [train|rank]

PYTHON is an interpreter of an environment of its own, where RecBole 1.2.1 runs:

    python3.11 -m venv peer
    peer/bin/pip install recbole==1.2.1 torch 'numpy<2' 'pandas<2.3' 'scipy<1.14' 'setuptools<81'

``train``: one epoch on ml-100k, each with its own defaults. Both see the same 5-core interactions
in the same order; a target is one predicted next item. ``rank``: evaluating users of a world of
100,000 items with untrained weights; ours gives the filtered and the kept ranking and nine
metrics, RecBole the kept one and two.
"""

import argparse
import json
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from features.dataset import Dataset, load_dataset
from features.warehouse import Warehouse
from pipeline.datasets.prepare import PrepareOptions, prepare_dataset
from retrieval.metrics import per_user
from tests.trainer import worlds
from trainer.evaluation.ranking import rank_split
from trainer.loop import TrainProgress
from trainer.runs.train import train_run

USERS, ITEMS, EACH = 4096, 100_000, 25


def export(dataset: Dataset, folder: Path, name: str) -> None:
    """Write RecBole's atomic file; the position is the time, so that ties cannot reorder."""
    place = folder / name
    place.mkdir(parents=True)
    lengths = np.diff(dataset.offsets)
    users = np.repeat(np.arange(len(lengths)), lengths)
    positions = np.arange(len(users)) - np.repeat(dataset.offsets[:-1], lengths)
    table = np.stack([users, dataset.items, positions], axis=1)
    header = "user_id:token\titem_id:token\ttimestamp:float"
    np.savetxt(place / f"{name}.inter", table, "%d", "\t", header=header, comments="")


def peer(python: str, folder: Path, name: str, threads: int, epochs: int) -> dict[str, Any]:
    """Run RecBole's side."""
    script = Path(__file__).with_name("recbole_peer.py")
    command = [python, str(script), str(folder), name, str(threads), str(epochs)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"RecBole's side ended with {done.returncode}:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(what: str, ours: tuple[float, float], theirs: tuple[float, float], each: str) -> None:
    """Print rates by CPU and by wall time, and their ratios."""
    for number, kind in enumerate(("CPU", "clock")):
        ratio = ours[number] / theirs[number]
        print(
            f"{what}: mmrec {ours[number]:,.0f}, RecBole {theirs[number]:,.0f} {each} a second"
            f" ({kind}): {ratio:.1f} times"
        )


def compare_training(python: str, raw: Path, threads: int, epochs: int) -> None:
    """One epoch of ml-100k."""
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        warehouse = Warehouse(root / "warehouse")
        prepare_dataset(warehouse, PrepareOptions(dataset="ml-100k", raw=raw))
        dataset = load_dataset(warehouse, "ml-100k")
        export(dataset, root, "ml-100k")
        marks: list[tuple[int, float, float]] = []

        def watch(tick: TrainProgress) -> None:
            if not tick.metrics:
                marks.append((tick.epoch, time.process_time(), time.perf_counter()))

        run = worlds.begin(
            warehouse, "sasrec", "ml-100k", settings=["device=cpu", f"epochs={epochs + 1}"]
        )
        targets = sum(
            int((batch.sequences.lengths_B - 1).sum())
            for batch in run.data.epoch(
                run.model.window_sampling,
                batch_size=run.config.batch_size,
                seed=run.config.seed,
                epoch=1,
            )[1]
        )
        train_run(run, on_progress=watch)
        spent = []
        for epoch in range(2, epochs + 2):  # the first one warms up
            inside = [mark for mark in marks if mark[0] == epoch]
            share = len(inside) / (len(inside) - 1)  # from the first step's end to the last's
            spent.append([share * (b - a) for a, b in zip(inside[0], inside[-1], strict=True)][1:])
        cpu, wall = np.array(spent).min(0)
        theirs = peer(python, root, "ml-100k", threads, epochs)
        print(f"an epoch: mmrec {targets:,} targets in {cpu:.2f} CPU s, {wall:.2f} s;", end=" ")
        print(
            f"RecBole {theirs['targets']:,} in {theirs['epoch'][0]:.1f} CPU s,"
            f" {theirs['epoch'][1]:.1f} s"
        )
        rates = (theirs["targets"] / theirs["epoch"][0], theirs["targets"] / theirs["epoch"][1])
        compare("training", (targets / cpu, targets / wall), rates, "targets")


def evaluation(python: str, threads: int) -> None:
    """Evaluate users of a world of 100,000 items; the weights are random, and so the metrics."""
    order = np.random.default_rng(0).permutation(USERS * EACH) % ITEMS
    world = worlds.dataset(order.reshape(USERS, EACH).tolist(), ITEMS)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        export(world, root, "wide")
        theirs = peer(python, root, "wide", threads, 0)
    from trainer.data.batches import ItemFeatures
    from trainer.models.base import Catalogue
    from trainer.models.sasrec import SASRec, SASRecConfig

    features = ItemFeatures(n_items=ITEMS, vectors={}, present={})
    data = worlds.training_data(world, features)
    model = SASRec(SASRecConfig(), Catalogue(n_items=ITEMS, n_users=1, widths={})).eval()

    def work() -> None:
        ranks = rank_split(model, data, "test", 512).ranks
        for found in (ranks.filtered, ranks.kept):
            assert all(len(values) == USERS for values in per_user(found).values())

    spent = []
    for _ in range(3):
        cpu, wall = time.process_time(), time.perf_counter()
        work()
        spent.append((time.process_time() - cpu, time.perf_counter() - wall))
    best_cpu, best_wall = np.array(spent).min(0)
    print(f"evaluating {USERS:,} users over {ITEMS:,} items: mmrec {best_cpu:.2f} CPU s,", end=" ")
    print(f"RecBole {theirs['evaluate'][0]:.2f} CPU s for {theirs['users']:,}")
    rates = (theirs["users"] / theirs["evaluate"][0], theirs["users"] / theirs["evaluate"][1])
    compare("evaluation", (USERS / best_cpu, USERS / best_wall), rates, "users")


def main() -> None:
    """Read the command line and run the sections."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sections", nargs="*", default=["train", "rank"])
    parser.add_argument("--peer", required=True, help="a Python that has RecBole")
    parser.add_argument("--raw", type=Path, help="folder of ml-100k, for the section train")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if "train" in given.sections:
        if given.raw is None:
            parser.error("the section train needs --raw")
        compare_training(given.peer, given.raw.resolve(), given.threads, given.epochs)
    if "rank" in given.sections:
        evaluation(given.peer, given.threads)


if __name__ == "__main__":
    main()
