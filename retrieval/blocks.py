"""Precision and threads of blocked computations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@contextmanager
def strict_fp32(device: torch.device) -> Iterator[None]:
    """Compute fp32 matrix products in fp32: no autocast, no TF32, no bf16.

    The settings are restored at the end. They hold for all threads of the process.
    """
    import torch

    mkldnn: Any = torch.backends.mkldnn  # torch's type stubs lack `mkldnn.matmul`
    switches = (torch.backends.cuda.matmul, mkldnn.matmul)
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision


def for_each_block(
    work: Callable[[slice], None], total: int, step: int, device: torch.device
) -> None:
    """Call ``work(slice)`` for consecutive blocks of 0..total-1, on torch's threads.

    On a CPU each thread computes whole blocks, and torch runs each operation of a block on one
    thread. Sharing every small operation among all threads makes them wait for each other at its
    end; with other programs on the same cores, waiting took several times as long as computing. On
    a GPU the blocks run one after another.

    Args:
        work: Function of one block. Blocks must not depend on each other.
        total: Number of rows.
        step: Rows per block; the last block may have fewer.
        device: Device on which ``work`` computes.
    """
    import torch

    blocks = [slice(start, min(start + step, total)) for start in range(0, total, step)]
    before = torch.get_num_threads()
    threads = min(before, len(blocks)) if device.type == "cpu" else 1
    if threads < 2:
        for block in blocks:
            work(block)
        return
    inference = torch.is_inference_mode_enabled()  # each thread has its own inference mode

    def run(block: slice) -> None:
        with torch.inference_mode(inference):
            work(block)

    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        list(pool.map(run, blocks))
    finally:
        pool.shutdown(cancel_futures=True)
        # The workers' `set_num_threads(1)` also changes the default of later threads.
        torch.set_num_threads(before)
