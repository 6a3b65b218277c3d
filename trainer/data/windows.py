"""Windows: how training histories are cut, and how windows form batches."""

from dataclasses import dataclass

import numpy as np

from features.dataset import Ints

_SORTED_TOGETHER = 64  # batches whose windows are sorted by length before they are cut


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowSampling:
    """How a recommender wants the training histories to be cut."""

    length: int
    """Most items of one window, targets included."""
    stride: int
    """Interactions between the ends of two windows of one user."""
    every_target: bool
    """Whether each epoch must hold every interaction as a target, the newest up to twice (causal
    towers), or each epoch draws other ends (masked towers, which predict the end)."""


def cut_windows(
    starts: Ints, ends: Ints, sampling: WindowSampling, rng: np.random.Generator
) -> tuple[Ints, Ints]:
    """Cut histories into windows whose ends are shifted at random in each epoch.

    With ``every_target`` and ``stride = length - 1``, each item of a history but the first is a
    target: of a history with at most ``stride`` targets, all once, in one window. From a longer one
    a shift s, 0 <= s < ``stride``, cuts windows that end s items before the newest and do not share
    targets; where s > 0, one more window ends at the newest item and, full like the others,
    predicts the ``stride`` newest: the newest s once, the other ``stride`` - s a second time. That
    is half a window a user and epoch, (``stride`` - 1) / 2 targets in the mean, in favour of the
    recent past. Nothing is counted three times.

    Args:
        starts: (U,) first flat position of each training history.
        ends: (U,) one past the last; users with fewer than two items give no window.
        sampling: Length and stride; a covering one leaves nothing between two windows.
        rng: Decides the shifts.

    Returns:
        (W,) first flat position and (W,) length of each window, user by user.
    """
    assert sampling.stride < sampling.length or not sampling.every_target
    long_enough = ends - starts >= 2
    starts, ends = starts[long_enough], ends[long_enough]
    targets = ends - starts - 1
    shifts = (rng.random(len(starts)) * np.minimum(targets, sampling.stride)).astype(np.int64)
    if sampling.every_target:
        shifts[targets <= sampling.stride] = 0  # one window holds them all
    counts = (targets - 1 - shifts) // sampling.stride + 1
    user = np.repeat(np.arange(len(starts)), counts)
    order = np.arange(len(user)) - np.repeat(np.cumsum(counts) - counts, counts)
    window_ends = ends[user] - shifts[user] - order * sampling.stride
    if sampling.every_target:  # what the shift left out at the recent end
        user = np.concatenate([user, np.flatnonzero(shifts)])
        window_ends = np.concatenate([window_ends, ends[shifts > 0]])
    window_starts = np.maximum(starts[user], window_ends - sampling.length)
    return window_starts, window_ends - window_starts


def cut_batches(lengths: Ints, size: int, rng: np.random.Generator, least: int = 1) -> list[Ints]:
    """Shuffle windows into batches of similar lengths, so that little is padded.

    Args:
        lengths: (W,) length of each window.
        size: Windows to a batch.
        rng: Decides the order.
        least: What remains at an end and is less than this joins the batch before it.

    Returns:
        Arrays of window numbers; together each window once.
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
