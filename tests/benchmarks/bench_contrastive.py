"""What the in-batch operator costs, against the naive form and against its bare matrix products.

    python -m tests.benchmarks.bench_contrastive [--pairs 8192] [--large 48000] [--dim 512]

Each way runs in a process of its own, forward and backward, and tells CPU seconds, wall seconds and
the highest resident memory beyond what the inputs, their gradients and torch take. "products" are
the matrix products that exactness needs, in blocks of as many rows: three for one direction, four
for both. Set OMP_NUM_THREADS=1 where other programs run as well.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from trainer.losses.clip import in_batch_symmetric
from trainer.losses.in_batch import Columns, ExcludedLabels, in_batch

SCALE = 20.0
ROWS = 256


def naive(x_BD: Tensor, y_BD: Tensor, both: bool) -> None:
    """All scores at once, as the formula says."""
    scores_BB = SCALE * x_BD @ y_BD.T
    target_B = torch.arange(len(x_BD))
    loss = functional.cross_entropy(scores_BB, target_B)
    if both:
        loss = (loss + functional.cross_entropy(scores_BB.T, target_B)) / 2
    loss.backward()


def products(x_BD: Tensor, y_BD: Tensor, both: bool) -> None:
    """Scores (twice for both directions) and the two gradients, and nothing else."""
    x_BD, y_BD = x_BD.detach(), y_BD.detach()
    buffer_RB = x_BD.new_empty(ROWS, len(x_BD))
    grad_BD = torch.zeros_like(y_BD)
    for x_RD in x_BD.split(ROWS):
        score_RB = buffer_RB[: len(x_RD)]
        for _ in range(2 if both else 1):
            torch.mm(x_RD, y_BD.T, out=score_RB)
        score_RB @ y_BD
        grad_BD.addmm_(score_RB.T, x_RD)


def filtered(x_BD: Tensor, y_BD: Tensor) -> None:
    """One direction, with the items of each row's user left out and the popularity corrected."""
    B = len(x_BD)
    generator = torch.Generator().manual_seed(1)
    label_B = torch.randint(B, (B,), generator=generator)
    owner_B = torch.arange(B) // 20  # twenty positions of each user
    own_UJ = label_B[: B // 20 * 20].view(-1, 20)
    own_UJ = torch.cat([own_UJ, own_UJ[:1]])
    in_batch(
        x_BD,
        y_BD,
        torch.arange(B),
        scale=SCALE,
        columns=Columns(label_C=label_B, correction_C=torch.rand(B, generator=generator).log()),
        excluded=ExcludedLabels(own_UJ=own_UJ, owner_M=owner_B),
    ).backward()


def blocked(x_BD: Tensor, y_BD: Tensor, both: bool) -> None:
    if both:
        in_batch_symmetric(x_BD, y_BD, scale=SCALE).backward()
    else:
        in_batch(x_BD, y_BD, torch.arange(len(x_BD)), scale=SCALE).backward()


def narrow(x_BD: Tensor, y_BD: Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        loss = in_batch_symmetric(x_BD, y_BD, scale=SCALE)
    loss.backward()


WAYS: dict[str, Callable[[Tensor, Tensor], None]] = {
    "products, one direction": lambda x, y: products(x, y, both=False),
    "operator, one direction": lambda x, y: blocked(x, y, both=False),
    "operator, one direction, filtered": filtered,
    "naive, one direction": lambda x, y: naive(x, y, both=False),
    "products, both directions": lambda x, y: products(x, y, both=True),
    "operator, both directions": lambda x, y: blocked(x, y, both=True),
    "operator, both directions, bfloat16": narrow,
    "naive, both directions": lambda x, y: naive(x, y, both=True),
}


def peak() -> float:
    """MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def one(way: str, pairs: int, dim: int, rounds: int) -> dict[str, float]:
    """Run a way in this process; the quickest of the rounds counts."""
    generator = torch.Generator().manual_seed(0)
    x_BD, y_BD = (
        functional.normalize(torch.randn(pairs, dim, generator=generator), dim=1).requires_grad_()
        for _ in range(2)
    )
    for part in (x_BD, y_BD):
        part.grad = torch.zeros_like(part)
    WAYS[way](x_BD[:64], y_BD[:64])  # what the libraries set up is not the operator's
    before = peak()
    found = []
    for _ in range(rounds):
        cpu, wall = time.process_time(), time.perf_counter()
        WAYS[way](x_BD, y_BD)
        found.append((time.process_time() - cpu, time.perf_counter() - wall))
    cpu, wall = min(found)
    return {"cpu": cpu, "wall": wall, "mb": peak() - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=8192)
    parser.add_argument("--large", type=int, default=48_000, help="0: not measured")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--way", choices=list(WAYS))
    asked = parser.parse_args()
    if asked.way:
        print(json.dumps(one(asked.way, asked.pairs, asked.dim, asked.rounds)))
        return
    runs = [(way, asked.pairs, asked.rounds) for way in WAYS]
    if asked.large:
        runs += [(way, asked.large, 1) for way in ("operator, both directions",)]
    print("| way | pairs | CPU s | wall s | MB beyond inputs and gradients |")
    print("|---|---|---|---|---|")
    for way, pairs, rounds in runs:
        command = [sys.executable, "-m", "tests.benchmarks.bench_contrastive", "--way", way]
        command += ["--pairs", str(pairs), "--dim", str(asked.dim), "--rounds", str(rounds)]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found = json.loads(said)
        print(
            f"| {way} | {pairs:,} | {found['cpu']:.2f} | {found['wall']:.2f} | {found['mb']:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
