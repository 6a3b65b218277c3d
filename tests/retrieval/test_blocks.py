import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from retrieval.blocks import for_each_block
from retrieval.index_ranking import rank_with
from retrieval.ranking import rank
from retrieval.registry import make_index
from tests.retrieval import brute
from tests.retrieval.brute import EXACT

CPU = torch.device("cpu")


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
def test_every_block_is_worked_once_each_on_a_single_thread() -> None:
    met: list[tuple[int, int]] = []
    seen_threads: list[int] = []

    def work(block: slice) -> None:
        met.append((block.start, block.stop))
        seen_threads.append(torch.get_num_threads())

    for_each_block(work, 10, 4, CPU)
    assert sorted(met) == [(0, 4), (4, 8), (8, 10)]
    assert seen_threads == [1, 1, 1]
    assert torch.get_num_threads() == 3
    later: list[int] = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [3], "threads that start later get what this one has"
    for_each_block(work, 4, 4, CPU)
    assert seen_threads[3:] == [3], "a single block has all the threads"
    for_each_block(work, 0, 4, CPU)
    assert len(met) == 4


@pytest.mark.usefixtures("three_threads")
def test_a_failing_block_fails_the_whole_and_leaves_the_threads_as_they_were() -> None:
    def work(block: slice) -> None:
        if block.start == 3:
            raise ValueError("block 3")

    with pytest.raises(ValueError, match="block 3"):
        for_each_block(work, 100, 1, CPU)
    assert torch.get_num_threads() == 3


@pytest.mark.usefixtures("three_threads")
def test_threads_and_inference_mode_change_nothing() -> None:
    rng = np.random.default_rng(12)
    queries, items = brute.vectors("gauss", rng, 150, 8), brute.vectors("bf16", rng, 300, 8)
    targets, seen = rng.integers(0, 300, 150), brute.make_seen(brute.seen_lists(rng, 150, 300, 20))
    torch.set_num_threads(1)
    expected = rank(queries, items, targets, seen)
    listed = make_index("torch", items).search(queries, 30_000, seen)
    torch.set_num_threads(3)
    with torch.inference_mode():
        vectors = torch.from_numpy(queries) + 0, torch.from_numpy(items) + 0
        assert vectors[0].is_inference()
        for name in EXACT:
            found = rank_with(name, *vectors, targets, seen)
            np.testing.assert_array_equal(found.kept, expected.kept)
            np.testing.assert_array_equal(found.filtered, expected.filtered)
            # So deep a list makes the search take several blocks.
            scores, ids = make_index(name, vectors[1]).search(vectors[0], 30_000, seen)
            np.testing.assert_array_equal(ids, listed[1])
            np.testing.assert_array_equal(scores, listed[0])
