"""What one fine-tuning step of MMSRec costs, and how it grows.

    python -m tests.benchmarks.bench_training [--threads 1] [step|growth]

``step``: B = 1,024 windows of at most 20 items (7.7 in the mean), d = 512, 12,101 items with two
modalities of 512, 2% without a picture: the setting in which the official code was measured at 35
CPU seconds and 8 GB a step, on another day and machine. Each figure is of a process of its own;
"products" are the same matrix products, forward and backward, and nothing else. They are computed
after each step in the same process, so that both meet the same load of the machine. ``growth``: the
same step with more items, windows, and longer histories.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.trainer import worlds
from trainer.data.batches import ItemFeatures
from trainer.models.base import Catalogue
from trainer.models.mmsrec import MMSRec, MMSRecConfig

BATCH, LENGTH, ITEMS, DIM = 1024, 20, 12_101, 512
STEPS = 4  # the batches of an epoch, which hold similar lengths


def peak() -> float:
    """Most memory that this process has held, in GB."""
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(found[1]) / 1e6 if found else float("nan")


def clock(work: Callable[[], Any], rounds: int) -> tuple[float, float]:
    """CPU and wall seconds of the quickest of some calls."""
    spent = []
    for _ in range(rounds):
        cpu, wall = time.process_time(), time.perf_counter()
        work()
        spent.append((time.process_time() - cpu, time.perf_counter() - wall))
    return min(a for a, _ in spent), min(b for _, b in spent)


def histories(users: int, items: int, length: int) -> list[list[int]]:
    """Histories of 2 to ``length`` + 2 items, the last two held out, popular items more often."""
    random = np.random.default_rng(0)
    sizes = np.clip(random.geometric(1 / (0.33 * length), users) + 1, 2, length) + 2
    ranks = (items ** random.random(sizes.sum())).astype(np.int64) % items
    return [part.tolist() for part in np.split(ranks, np.cumsum(sizes)[:-1])]


def step(batch_size: int, length: int, items: int, precision: str, steps: int) -> dict[str, Any]:
    """Measure training steps of one epoch's first batches."""
    generator = torch.Generator().manual_seed(0)
    present = {name: torch.ones(items, dtype=torch.bool) for name in ("image", "text")}
    present["image"][::50] = False
    vectors = {
        name: torch.randn(items, DIM, generator=generator) * there[:, None]
        for name, there in present.items()
    }
    features = ItemFeatures(n_items=items, vectors=vectors, present=present)
    world = worlds.dataset(histories(4 * batch_size, items, length), items)
    data = worlds.training_data(world, features)
    torch.manual_seed(0)
    model = MMSRec(
        MMSRecConfig(dim=DIM, length=length),
        Catalogue(n_items=items, n_users=1, widths=features.widths),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    before = peak()
    _, batches = data.epoch(model.window_sampling, batch_size=batch_size, seed=0, epoch=0)
    windows = [batch for batch in batches if len(batch.users_B) == batch_size][:steps]
    spent, slots, products, held = [], [], [], 0.0
    for batch in windows:

        def work(batch: Any = batch) -> None:
            optimizer.zero_grad(set_to_none=True)
            low = precision == "bf16"
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                loss = model.loss(batch)["loss"]
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

        spent.append(clock(work, 1))
        slots.append(int(batch.sequences.lengths_B.sum()))
        held = held or peak()  # the products below are no part of a step
        products.append(_products(slots[-1], items, batch_size, precision)[0])
    filled = float(np.mean(slots)) / batch_size
    ratios = [cpu / bare for (cpu, _), bare in zip(spent, products, strict=True)]
    return {
        "cpu": float(np.mean([a for a, _ in spent])),
        "wall": float(np.mean([b for _, b in spent])),
        "gb": held,
        "gb_before": before,
        "length": filled,
        "predicted": batch_size * (1 + 0.2 * (filled - 1)),
        "products_cpu": float(np.mean(products)),
        "ratio": float(np.median(ratios)),
        "ratios": [min(ratios), max(ratios)],
    }


def _products(slots: int, items: int, batch_size: int, precision: str) -> tuple[float, float]:
    """The linear layers and the scores, forward and both backward products."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    tokens = 2 * (slots + items)
    # Input heads on each item; two blocks of qkv, out and feed-forward; output heads on few slots.
    shapes = [(2 * 2 * items, DIM, DIM)]
    shapes += 2 * [(tokens, DIM, 3 * DIM), (tokens, DIM, DIM), (tokens, DIM, 1024)]
    shapes += 2 * [(tokens, 1024, DIM)]
    predicted = round(batch_size + 0.2 * (slots - batch_size))
    shapes += [(2 * (predicted + items), DIM, DIM), (predicted, DIM, items)]

    def work() -> None:
        for m, k, n in shapes:
            for start in range(0, m, 4096):
                rows = min(4096, m - start)
                a, b = torch.ones(rows, k, dtype=dtype), torch.ones(k, n, dtype=dtype)
                c = a @ b
                _ = c @ b.T
                _ = a.T @ c

    return clock(work, 1)


def alone(threads: int, *settings: Any) -> dict[str, Any]:
    """Measure in a fresh process."""
    command = [sys.executable, "-m", "tests.benchmarks.bench_training", "--threads", str(threads)]
    done = subprocess.run(
        [*command, "--one", ",".join(map(str, settings))],
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def show(what: str, found: dict[str, Any]) -> None:
    """Print one measurement."""
    print(
        f"{what}: {found['cpu']:.2f} CPU s, {found['wall']:.2f} s, peak {found['gb']:.2f} GB"
        f" ({found['gb_before']:.2f} before the first step), {found['length']:.1f} items a window,"
        f" {found['predicted']:,.0f} predicted; bare products {found['products_cpu']:.2f} CPU s,"
        f" step over products: median {found['ratio']:.2f},"
        f" {found['ratios'][0]:.2f} to {found['ratios'][1]:.2f}",
        flush=True,
    )


def main() -> None:
    """Read the command line and run the sections."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sections", nargs="*", default=["step", "growth"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", nargs="+", default=["fp32"], choices=["fp32", "bf16"])
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.one:
        batch, length, items, precision, steps = given.one.split(",")
        print(json.dumps(step(int(batch), int(length), int(items), precision, int(steps))))
        return
    if "step" in given.sections:
        for precision in given.precision:
            found = alone(given.threads, BATCH, LENGTH, ITEMS, precision, STEPS)
            show(f"step, {precision}", found)
    if "growth" in given.sections:
        base = alone(given.threads, 256, LENGTH, 3000, "fp32", STEPS)
        show("growth, 256 windows of 20, 3,000 items", base)
        for what, settings in (
            ("2x items", (256, LENGTH, 6000)),
            ("2x windows", (512, LENGTH, 3000)),
            ("2x length", (256, 2 * LENGTH, 3000)),
        ):
            found = alone(given.threads, *settings, "fp32", STEPS)
            show(f"growth, {what}: {found['cpu'] / base['cpu']:.2f} times the time", found)


if __name__ == "__main__":
    main()
