"""How the arithmetic is run: in which precision, and on which threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@contextmanager
def plain_fp32(device: torch.device) -> Iterator[None]:
    """No autocast, and no TF32 or bf16 inside fp32 matrix products; restored at the end.

    The precision switches belong to the process, not to the thread.
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


def each_block(work: Callable[[slice], None], total: int, step: int, device: torch.device) -> None:
    """Call work(slice) for the blocks of 0..total; they must not depend on one another.

    On a CPU each of torch's threads takes whole blocks. When instead all of them share every small
    operation, they wait for each other at its end; where other programs use the cores as well, that
    waiting was measured at several times the work. On a GPU the blocks run one after another.
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
        # What the workers set for themselves is also what any later thread would start with.
        torch.set_num_threads(before)
