"""Cut training histories into windows, and windows into batches."""

from dataclasses import dataclass

import numpy as np

from features.dataset import Ints

_SORTED_TOGETHER = 64  # number of batches whose windows are sorted by length together


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowSampling:
    """Settings of cutting training histories into windows."""

    length: int
    """Largest number of items of a window, targets included."""
    stride: int
    """Number of interactions between the ends of two windows of a user."""
    every_target: bool
    """For causal models True: in each epoch every interaction after the first is a target, the
    newest up to twice. For masked item prediction, which always predicts the end of a window,
    False: each epoch draws random ends."""


def cut_windows(
    starts: Ints, ends: Ints, sampling: WindowSampling, rng: np.random.Generator
) -> tuple[Ints, Ints]:
    """Cut histories into windows whose ends are shifted at random in each epoch.

    With ``every_target`` and ``stride = length - 1``, each item of a history except the first is a
    target. A history with at most ``stride`` targets is one window. A longer history draws a shift
    s, 0 <= s < ``stride``. Its windows end s items before the newest item, ``stride`` items apart,
    and do not share targets. If s > 0, one more window ends at the newest item: it predicts the s
    newest items for the first time and ``stride - s`` items for the second time. On average these
    are (``stride`` - 1) / 2 targets a user and epoch. No item is a target three times.

    Args:
        starts: (U,) index of the first interaction of each training history.
        ends: (U,) one past the last index; users with fewer than two items give no window.
        sampling: Length and stride; with ``every_target``, the stride is below the length.
        rng: Draws the shifts.

    Returns:
        (W,) index of the first interaction and (W,) length of each window, user by user.
    """
    assert sampling.stride < sampling.length or not sampling.every_target
    long_enough = ends - starts >= 2
    starts, ends = starts[long_enough], ends[long_enough]
    targets = ends - starts - 1
    shifts = (rng.random(len(starts)) * np.minimum(targets, sampling.stride)).astype(np.int64)
    if sampling.every_target:
        shifts[targets <= sampling.stride] = 0  # one window holds all targets
    counts = (targets - 1 - shifts) // sampling.stride + 1
    user = np.repeat(np.arange(len(starts)), counts)
    order = np.arange(len(user)) - np.repeat(np.cumsum(counts) - counts, counts)
    window_ends = ends[user] - shifts[user] - order * sampling.stride
    if sampling.every_target:  # the window of the newest items
        user = np.concatenate([user, np.flatnonzero(shifts)])
        window_ends = np.concatenate([window_ends, ends[shifts > 0]])
    window_starts = np.maximum(starts[user], window_ends - sampling.length)
    return window_starts, window_ends - window_starts


def cut_batches(lengths: Ints, size: int, rng: np.random.Generator, least: int = 1) -> list[Ints]:
    """Shuffle windows into batches of similar length, so that batches have little padding.

    Args:
        lengths: (W,) length of each window.
        size: Number of windows of a batch.
        rng: Draws the order.
        least: A last batch with fewer windows is merged with the batch before it.

    Returns:
        Arrays of indices into ``lengths``. Every window is in exactly one batch.
    """
    order = rng.permutation(len(lengths))
    together = size * _SORTED_TOGETHER
    batches: list[Ints] = []
    for begin in range(0, len(order), together):
        chunk = order[begin : begin + together]
        chunk = chunk[np.argsort(lengths[chunk], kind="stable")]
        starts = range(0, len(chunk), size)
        if len(chunk) % size in range(1, least) and len(starts) > 1:
            starts = starts[:-1]
        batches.extend(np.split(chunk, starts[1:]))
    return [batches[i] for i in rng.permutation(len(batches))]
