"""Permute the rows of a feature table among the items that have one, as a control.

A model that learns as much from permuted features as from the real ones uses nothing of their
content.

Shape suffixes in descriptions: N items of the dataset.
"""

import zlib

import numpy as np
import numpy.typing as npt


def permuted_items(
    present_N: npt.NDArray[np.bool_], seed: int, label: str
) -> npt.NDArray[np.int64]:
    """Return the item that gets the row of each item: (N,).

    The permutation is a single cycle through the present items in a random order, so no item keeps
    its row if there are at least two. An item without a row is its own image.

    Args:
        present_N: (N,) the items that have a row.
        seed: Seed of the run.
        label: Name of the table. Tables with other names have independent permutations.

    Examples:
        >>> permuted_items(np.array([True, False, True]), 1, "text=a").tolist()
        [2, 1, 0]
    """
    order = table_generator(seed, label).permutation(np.flatnonzero(present_N))
    place_N = np.arange(len(present_N))
    place_N[order] = np.roll(order, 1)
    return place_N


def table_generator(seed: int, label: str) -> np.random.Generator:
    """Return a generator that depends on the seed of a run and on the name of a table."""
    return np.random.default_rng([seed, zlib.crc32(label.encode())])
