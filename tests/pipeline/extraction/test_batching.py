import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.extraction.batching import prefetch, token_batches


def test_results_come_in_order_and_never_too_many_are_under_way() -> None:
    taken = 0
    given_back = 0
    most = 0

    def source() -> Iterator[int]:
        nonlocal taken, most
        for number in range(50):
            taken += 1
            most = max(most, taken - given_back)
            yield number

    def work(number: int) -> int:
        time.sleep(0.002 if number % 3 else 0.0)
        return number * number

    results = []
    for result in prefetch(work, source(), threads=4, ahead=7):
        given_back += 1
        results.append(result)
    assert results == [number * number for number in range(50)]
    assert most <= 8  # seven waiting, and the one that is being asked for


def test_an_error_in_a_thread_comes_out_and_the_threads_end() -> None:
    def work(number: int) -> int:
        if number == 3:
            raise RuntimeError("three")
        return number

    before = threading.active_count()
    with pytest.raises(RuntimeError, match="three"):
        list(prefetch(work, range(100), threads=2, ahead=4))
    assert threading.active_count() == before


def test_stopping_early_ends_the_threads() -> None:
    before = threading.active_count()
    results = prefetch(lambda number: number, range(100), threads=2, ahead=4)
    assert next(iter(results)) == 0
    results.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def test_batches_by_hand() -> None:
    lengths = np.array([3, 10, 2, 9, 3])
    batches = [batch.tolist() for batch in token_batches(lengths, max_tokens=20, max_texts=3)]
    assert batches == [[1, 3], [0, 4, 2]]  # 10 + 9 padded to 20, then three of at most 3


@given(
    lengths=st.lists(st.integers(1, 90), max_size=60),
    max_tokens=st.integers(1, 300),
    max_texts=st.integers(1, 20),
)
def test_every_text_is_in_one_batch_within_the_budget(
    lengths: list[int], max_tokens: int, max_texts: int
) -> None:
    array = np.asarray(lengths, dtype=np.int64)
    batches = list(token_batches(array, max_tokens=max_tokens, max_texts=max_texts))
    together = [index for batch in batches for index in batch.tolist()]
    assert sorted(together) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) <= max_texts
        assert len(batch) == 1 or len(batch) * array[batch].max() <= max_tokens
