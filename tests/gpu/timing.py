"""Measure seconds and peak memory on a device."""

import math
import time
from collections.abc import Callable

import torch

from tests.gpu.parts import Setup

_SLOW = 1.0  # seconds of a call that is not repeated


def synchronize(device: str) -> None:
    """Wait until the device has finished; a CPU always has."""
    if device == "cuda":
        torch.cuda.synchronize()


def best_seconds(setup: Setup, work: Callable[[], object], *, rounds: int = 3) -> float:
    """Return the wall seconds of the quickest of some calls, after one that warms up.

    A call of more than a second needs no warm-up and is not repeated.
    """
    quickest = math.inf
    for number in range(rounds + 1):
        synchronize(setup.device)
        began = time.perf_counter()
        work()
        synchronize(setup.device)
        seconds = time.perf_counter() - began
        if seconds > _SLOW:
            return min(quickest, seconds)
        if number > 0:
            quickest = min(quickest, seconds)
    return quickest


def peak_bytes(device: str, work: Callable[[], object]) -> int | None:
    """Return the bytes that a call allocates on the device beyond those before; ``None``: no GPU.

    The call also warms up.
    """
    if device != "cuda":
        work()
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def free_bytes(device: str) -> float:
    """Return the free memory of the GPU; infinite on a CPU."""
    if device != "cuda":
        return math.inf
    torch.cuda.empty_cache()
    return float(torch.cuda.mem_get_info()[0])


def rounded(value: float) -> float:
    """Return a figure with four digits."""
    return float(f"{value:.4g}")
