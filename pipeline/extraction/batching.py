"""Run functions in threads ahead of their consumer, and form text batches with little padding."""

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
    """Run ``work`` in threads and yield its results in the order of ``inputs``.

    Args:
        work: Function of one input. Threads call it concurrently.
        inputs: The inputs.
        threads: Number of threads.
        ahead: Most results that are computed, or being computed, and not yet yielded.
    """
    pending: deque[Future[Out]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="prefetch")
    try:
        for value in inputs:
            pending.append(pool.submit(work, value))
            if len(pending) >= ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def token_batches(
    lengths: npt.NDArray[np.int64], *, max_tokens: int, max_texts: int
) -> Iterator[npt.NDArray[np.int64]]:
    """Split texts into batches of similar length, the longest first.

    Args:
        lengths: (R,) tokens of each text.
        max_tokens: Most tokens of a batch, padding included. A longer text is a batch by itself.
        max_texts: Most texts of a batch.

    Yields:
        Indices into ``lengths``. Every text is in exactly one batch.
    """
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        longest = max(1, int(lengths[order[start]]))
        size = max(1, min(max_texts, max_tokens // longest))
        yield order[start : start + size]
        start += size
