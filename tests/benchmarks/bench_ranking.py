"""Measure ranking and search in the full catalogue, as ratios of CPU time in one run.

    python -m tests.benchmarks.bench_ranking exact [--items 12000 --dim 64]
    python -m tests.benchmarks.bench_ranking approximate [--items 1000000 --kinds ivf hnsw]
    python -m tests.benchmarks.bench_ranking approximate --run FOLDER

`exact` compares the default index with torch: ranks and lists of 512 users, one of whom has seen
many items, for a model that ranks most targets near the top and for a random one. `approximate`
searches for one query at a time, in planted vectors or in those of a run. The ways take turns; a
ratio is the median of the ratios of the rounds. Measurements of the default are made anew in each
first round and are part of its time.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from features.warehouse import Warehouse
from retrieval import default_index
from retrieval.approximate_indexes import recall
from retrieval.index_ranking import rank_with
from retrieval.indexes import Index
from retrieval.registry import make_index
from retrieval.seen_items import SeenItems
from trainer.evaluation.encode import encode_catalogue, encode_histories
from trainer.runs.run import open_run

USERS, GROUPS, SEEN, HEAVY = 512, 1000, 10, 50_000
World = tuple[torch.Tensor, torch.Tensor, torch.Tensor, SeenItems]


def clustered_items(items: int, dim: int, generator: torch.Generator) -> torch.Tensor:
    """Return unit vectors of 1,000 groups: the vector of the group and noise."""
    group = torch.randint(0, GROUPS, (items,), generator=generator)
    centre_GD = torch.randn(GROUPS, dim, generator=generator)
    noise_ND = torch.randn(items, dim, generator=generator)
    return torch.nn.functional.normalize(centre_GD[group] + 0.5 * noise_ND, dim=1)


def world(items: int, dim: int, *, is_trained: bool, is_heavy: bool) -> World:
    """Return queries, items, targets and seen items.

    Args:
        items: Number of items.
        dim: Dimensions.
        is_trained: Queries are near their targets, else random.
        is_heavy: The first user has seen 50,000 items, or half of the catalogue if that is less.
    """
    generator = torch.Generator().manual_seed(0)
    item_ND = clustered_items(items, dim, generator)
    target_U = torch.randint(0, items, (USERS,), generator=generator)
    query_UD = torch.randn(USERS, dim, generator=generator)
    if is_trained:
        query_UD = item_ND[target_U] + 0.02 * query_UD
    counts = np.full(USERS, SEEN)
    if is_heavy:
        counts[0] = min(HEAVY, items // 2)
    offsets = np.concatenate([[0], counts.cumsum()])
    seen = torch.randint(0, items, (int(offsets[-1]),), generator=generator).numpy()
    return query_UD, item_ND, target_U, SeenItems(items=seen, offsets=offsets)


def cpu_seconds(call: Callable[[], object]) -> float:
    """Return the CPU time of all threads of this process."""
    start = time.process_time()
    call()
    return time.process_time() - start


def paired(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, tuple[float, float]]:
    """Return the best CPU time of each way, and the median of its ratios to the first way."""
    for way in ways.values():
        way()
    seconds = np.array([[cpu_seconds(way) for way in ways.values()] for _ in range(rounds)])
    ratios = np.median(seconds / seconds[:, :1], axis=0)
    return dict(zip(ways, zip(seconds.min(0), ratios, strict=True), strict=True))


def forget_measurements(call: Callable[[], object]) -> Callable[[], object]:
    """Return a call that measures anew what the default index measures once in a process."""

    def fresh() -> object:
        default_index._measured.clear()
        return call()

    return fresh


def exact_ways(given: World, work: str, choices: list[str]) -> dict[str, Callable[[], object]]:
    """Return the same work with each exact index.

    Args:
        given: Queries, items, targets and seen items.
        work: ``ranks`` or ``lists of 20``.
        choices: The choices of the default are added to it.
    """
    query_UD, item_ND, _, seen = given

    def ranks(name: str) -> object:
        return rank_with(name, *given, on_choice=choices.append)

    def lists(name: str) -> object:
        index = make_index(name, item_ND)
        index.search(query_UD, 20, seen)
        choices.append(getattr(index, "choice", ""))
        return index

    way = ranks if work == "ranks" else lists
    return {
        "torch": lambda: way("torch"),
        "faiss": forget_measurements(lambda: way("faiss")),
        "faiss:flat": lambda: way("faiss:flat"),
    }


def exact(items: int, dim: int, rounds: int) -> Iterator[str]:
    """Yield a row of the table for each work: ratios to torch."""
    for is_trained, is_heavy in itertools.product((True, False), (False, True)):
        given = world(items, dim, is_trained=is_trained, is_heavy=is_heavy)
        for work in ("ranks", "lists of 20"):
            choices: list[str] = []
            measured = paired(exact_ways(given, work, choices), rounds)
            columns = [
                f"{items:,} x {dim}",
                "near the top" if is_trained else "random",
                "yes" if is_heavy else "no",
                work,
                f"{measured['torch'][0]:.3f}",
                f"{measured['faiss'][1]:.2f}",
                f"{measured['faiss:flat'][1]:.2f}",
                next(text for text in reversed(choices) if text),
            ]
            yield f"| {' | '.join(columns)} |"


def planted_vectors(items: int, dim: int, queries: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (N, D) items in groups, and (U, D) queries near random items."""
    generator = torch.Generator().manual_seed(1)
    item_ND = clustered_items(items, dim, generator)
    chosen = torch.randint(0, items, (queries,), generator=generator)
    noise_UD = torch.randn(queries, dim, generator=generator)
    return item_ND, torch.nn.functional.normalize(
        item_ND[chosen] + 0.5 * noise_UD / dim**0.5, dim=1
    )


def vectors_of_run(folder: Path, queries: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (N, D) items of a run, and (U, D) queries of random test users."""
    run = open_run(Warehouse(folder.parents[1]), folder)
    users = run.data.dataset.eval_split("test").sample(queries, seed=0)
    item_ND = encode_catalogue(run.model, run.data)
    return item_ND, encode_histories(run.model, run.data, item_ND, users, queries)


def approximate(item_ND: torch.Tensor, query_UD: torch.Tensor, kinds: list[str]) -> Iterator[str]:
    """Yield a row of the table for each index: recall and speed of one query at a time."""
    (items, dim), queries = item_ND.shape, len(query_UD)
    flat = make_index("faiss:flat", item_ND)

    def one_by_one(index: Index) -> Callable[[], object]:
        return lambda: [index.search(query_UD[row : row + 1], 10) for row in range(queries)]

    for kind in kinds:
        start = time.process_time()
        index = make_index(f"faiss:{kind}", item_ND)
        build = time.process_time() - start
        ways = {"approximate": one_by_one(index), "flat": one_by_one(flat)}
        (seconds, _), (flat_seconds, ratio) = paired(ways, 3).values()
        columns = [
            f"`faiss:{kind}`",
            f"{items:,} x {dim}",
            f"{build:.0f}",
            f"{1000 * flat_seconds / queries:.2f}",
            f"{1000 * seconds / queries:.3f}",
            f"{ratio:.1f}",
            f"{recall(index, flat, query_UD, 10):.3f}",
        ]
        yield f"| {' | '.join(columns)} |"


def main() -> None:
    """Measure and print the rows of a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("part", choices=("exact", "approximate"))
    parser.add_argument("--items", type=int, default=300_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--kinds", nargs="+", default=["ivf", "ivfpq", "hnsw"])
    parser.add_argument(
        "--run", type=Path, help="folder of a run, in the folder runs of a warehouse"
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.part == "exact":
        rows = exact(given.items, given.dim, given.rounds)
    else:
        if given.run is None:
            vectors = planted_vectors(given.items, given.dim, given.queries)
        else:
            vectors = vectors_of_run(given.run, given.queries)
        rows = approximate(*vectors, given.kinds)
    for row in rows:
        print(row, flush=True)


if __name__ == "__main__":
    main()
