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

    The settings are restored at the end. They belong to the process, not to the thread.
    """
    import torch

    mkldnn: Any = torch.backends.mkldnn  # its stub does not know matmul
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

    On a CPU each thread works on whole blocks. If all threads shared every small operation, they
    would wait for each other at its end; with other programs on the same cores, the waiting was
    measured at several times the work. On a GPU the blocks run one after another.

    Args:
        work: Function of one block. Blocks must not depend on one another.
        total: Number of rows.
        step: Rows of one block; the last block may have fewer.
        device: Device that the work runs on.
    """
    import torch

    blocks = [slice(start, min(start + step, total)) for start in range(0, total, step)]
    before = torch.get_num_threads()
    threads = min(before, len(blocks)) if device.type == "cpu" else 1
    if threads < 2:
        for block in blocks:
            work(block)
        return
    inference = torch.is_inference_mode_enabled()  # belongs to the thread

    def run(block: slice) -> None:
        with torch.inference_mode(inference):
            work(block)

    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        list(pool.map(run, blocks))
    finally:
        pool.shutdown(cancel_futures=True)
        # A later thread starts with the value that the workers set for themselves.
        torch.set_num_threads(before)
