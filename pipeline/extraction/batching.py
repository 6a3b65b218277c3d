"""Work that runs ahead of the model, and batches that waste no padding."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import numpy.typing as npt

In = TypeVar("In")
Out = TypeVar("Out")


def prefetch(
    work: Callable[[In], Out], inputs: Iterable[In], *, threads: int, ahead: int
) -> Iterator[Out]:
    """Run ``work`` in threads and give its results in the order of ``inputs``.

    At most ``ahead`` inputs are taken and not yet given back, so memory stays flat however slow
    the consumer is.
    """
    waiting: deque[Future[Out]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="prefetch")
    try:
        for one in inputs:
            waiting.append(pool.submit(work, one))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def token_batches(
    lengths: npt.NDArray[np.int64], *, budget: int, most: int
) -> Iterator[npt.NDArray[np.int64]]:
    """Split texts into batches of like length, the longest first.

    Args:
        lengths: (R,) tokens of each text.
        budget: Tokens of a batch, padding included; a longer text stands alone.
        most: Texts of a batch.

    Yields:
        Indices into ``lengths``; every text is in exactly one batch.
    """
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        longest = max(1, int(lengths[order[start]]))
        size = max(1, min(most, budget // longest))
        yield order[start : start + size]
        start += size
