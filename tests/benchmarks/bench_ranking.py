"""What a full-catalogue evaluation costs: counting, against sorting and against FAISS.

    python tests/benchmarks/bench_ranking.py [--users 4096] [--items 100000] [--dim 512]

All in one process, the ways taking turns, each measured by its best round. "product" is the bare
blocked matrix product that every exact way has to do; ratios are to counting. On two cores that
other programs use as well, set OMP_NUM_THREADS=1: the threads of one product wait for each other.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from retrieval.index_ranking import rank_with
from retrieval.ranking import rank
from retrieval.registry import make_index
from retrieval.seen_items import SeenItems

BLOCK = 512


def world(
    users: int, items: int, dim: int, trained: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, SeenItems]:
    """Vectors in clusters, ten seen items a user, targets at random or near the query."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    centre = normal(2000, dim)[torch.randint(0, 2000, (items,), generator=generator)]
    item_ND = torch.nn.functional.normalize(centre + 0.5 * normal(items, dim), dim=1)
    target_U = torch.randint(0, items, (users,), generator=generator)
    query_UD = item_ND[target_U] + 0.05 * normal(users, dim) if trained else normal(users, dim)
    seen = torch.randint(0, items, (users * 10,), generator=generator)
    return (
        query_UD,
        item_ND,
        target_U,
        SeenItems(items=seen.numpy(), offsets=np.arange(users + 1, dtype=np.int64) * 10),
    )


def product(query_UD: torch.Tensor, item_ND: torch.Tensor) -> None:
    """The scores and nothing else, through the same tiles as counting."""
    scores = torch.empty(BLOCK * 4096)
    for query_BD in query_UD.split(BLOCK):
        for item_CD in item_ND.split(4096):
            out = scores[: len(query_BD) * len(item_CD)].view(len(query_BD), len(item_CD))
            torch.mm(query_BD, item_CD.T, out=out)


def argsort(query_UD: torch.Tensor, item_ND: torch.Tensor, target_U: torch.Tensor) -> torch.Tensor:
    """The usual way: sort every score of every user, look the target up; kept only."""
    ranks = []
    for query_BD, target_B in zip(query_UD.split(BLOCK), target_U.split(BLOCK), strict=True):
        order_BN = torch.argsort(query_BD @ item_ND.T, dim=1, descending=True)
        ranks.append(1 + (order_BN == target_B[:, None]).long().argmax(1))
    return torch.cat(ranks)


def ways_to_rank(
    query_UD: torch.Tensor, item_ND: torch.Tensor, target_U: torch.Tensor, seen: SeenItems
) -> dict[str, Callable[[], object]]:
    """What is compared; FAISS's times include filling the index, as an evaluation must."""
    return {
        "counting, both masks": lambda: rank(query_UD, item_ND, target_U, seen),
        "product": lambda: product(query_UD, item_ND),
        "faiss, both masks": lambda: rank_with("faiss", query_UD, item_ND, target_U, seen),
        "argsort, kept": lambda: argsort(query_UD, item_ND, target_U),
        "search 50, torch": lambda: make_index("torch", item_ND).search(query_UD, 50, seen),
        "search 50, faiss": lambda: make_index("faiss", item_ND).search(query_UD, 50, seen),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    for name, default in (("users", 4096), ("items", 100_000), ("dim", 512), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    print(
        f"{given.users:,} users x {given.items:,} items x {given.dim} dimensions, fp32, "
        f"{torch.get_num_threads()} threads, best of {given.rounds}"
    )
    for trained in (False, True):
        ways = ways_to_rank(*world(given.users, given.items, given.dim, trained))
        seconds = {name: [float("inf")] * 2 for name in ways}
        for _ in range(given.rounds):
            for name, way in ways.items():
                wall, cpu = time.perf_counter(), time.process_time()
                way()
                spent = time.perf_counter() - wall, time.process_time() - cpu
                seconds[name] = [min(pair) for pair in zip(seconds[name], spent, strict=True)]
        print(f"\ntargets {'near the query' if trained else 'at random'}")
        print(f"{'':24}{'wall s':>8}{'CPU s':>8}{'x counting':>12}")
        base = seconds["counting, both masks"][0]
        for name, (wall, cpu) in seconds.items():
            print(f"{name:24}{wall:8.2f}{cpu:8.2f}{wall / base:12.2f}")


if __name__ == "__main__":
    main()
