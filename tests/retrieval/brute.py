"""Slow references, pair by pair, and ways to make catalogues full of ties."""

from __future__ import annotations

import math
from itertools import chain

import numpy as np
import numpy.typing as npt

from retrieval.metrics import UNRANKED
from retrieval.seen_items import SeenItems

EXACT = ["torch", "faiss", "faiss:flat"]
"""Names of the exact indexes of a CPU."""

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


def dot(left: Floats, right: Floats) -> float:
    """Correctly rounded: products of fp32 are exact in float64, and fsum rounds once."""
    return math.fsum((left.astype(np.float64) * right.astype(np.float64)).tolist())


def all_scores(queries: Floats, items: Floats) -> npt.NDArray[np.float64]:
    return np.array([[dot(query, item) for item in items] for query in queries])


def ranks(
    scores: npt.NDArray[np.float64], targets: Ints, seen: list[set[int]]
) -> tuple[Ints, Ints]:
    """(kept, filtered) from a (U, N) score matrix, by the definition; a seen target is unranked."""
    kept, filtered = [], []
    for row, target, gone in zip(scores, targets.tolist(), seen, strict=True):
        above = {j for j in range(len(row)) if j != target and row[j] >= row[target]}
        kept.append(1 + len(above))
        filtered.append(UNRANKED if target in gone else 1 + len(above - gone))
    return np.array(kept), np.array(filtered)


def top(
    scores: npt.NDArray[np.float64], k: int, seen: list[set[int]]
) -> tuple[list[list[int]], Floats]:
    """Items, padded with -1, and fp32 scores, padded with -inf, by a sort of a (U, N) matrix."""
    items, values = [], np.full((len(scores), k), -np.inf, np.float32)
    for place, (row, gone) in enumerate(zip(scores, seen, strict=True)):
        left = [item for item in range(len(row)) if item not in gone]
        order = sorted(left, key=lambda item: (-row[item], item))[:k]
        items.append(order + [-1] * (k - len(order)))
        values[place, : len(order)] = row[order]
    return items, values


def make_seen(lists: list[list[int]]) -> SeenItems:
    offsets = np.cumsum([0, *map(len, lists)], dtype=np.int64)
    return SeenItems(items=np.array([*chain(*lists)], np.int64), offsets=offsets)


def seen_lists(rng: np.random.Generator, users: int, items: int, most: int) -> list[list[int]]:
    """Unsorted, with repetitions, some empty."""
    return [rng.integers(0, items, rng.integers(0, most + 1)).tolist() for _ in range(users)]


def vectors(kind: str, rng: np.random.Generator, rows: int, dim: int) -> Floats:
    """Rows whose inner products tie never (gauss), nearly (near, bf16) or often (the others)."""
    gauss = rng.standard_normal((rows, dim)).astype(np.float32)
    if kind == "gauss":
        return gauss
    if kind == "integers":
        return rng.integers(-2, 3, (rows, dim)).astype(np.float32)
    if kind == "bf16":
        bits = gauss.view(np.uint32) & np.uint32(0xFFFF0000)
        return bits.view(np.float32)
    if kind == "near":  # one vector, each copy off by single units in the last place
        step = rng.integers(-1, 2, (rows, dim)).astype(np.float32)
        return gauss[:1] * (1 + step * np.float32(2**-23))
    if kind == "duplicates":
        return gauss[rng.integers(0, max(1, rows // 4), rows)]
    if kind == "equal":
        return np.repeat(gauss[:1], rows, axis=0)
    if kind == "zero":
        return np.zeros((rows, dim), np.float32)
    if kind == "scales":  # lengths over many orders of magnitude, denormals among them
        return gauss * (10.0 ** rng.integers(-42, 15, (rows, 1))).astype(np.float32)
    raise AssertionError(kind)


KINDS = ["gauss", "integers", "bf16", "near", "duplicates", "equal", "zero", "scales"]
