from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from features.dataset import Ints
from tests.trainer import worlds
from trainer.data import WindowPlan, cut_batches, cut_windows

histories = st.lists(st.integers(0, 30), min_size=1, max_size=12)


def _cut(lengths: list[int], plan: WindowPlan, seed: int) -> tuple[Ints, Ints, Ints, Ints]:
    ends = np.cumsum(np.array(lengths, np.int64))
    starts = ends - np.array(lengths, np.int64)
    window, size = cut_windows(starts, ends, plan, np.random.default_rng(seed))
    return starts, ends, window, size


@settings(deadline=None)
@given(lengths=histories, length=st.integers(2, 9), seed=st.integers(0, 99))
def test_covering_windows_hold_every_target_and_no_stranger(
    lengths: list[int], length: int, seed: int
) -> None:
    plan = WindowPlan(length=length, stride=length - 1, cover=True)
    starts, ends, window, size = _cut(lengths, plan, seed)
    user = np.searchsorted(ends, window, side="right")
    assert (size >= 2).all()
    assert (size <= length).all()
    assert (window >= starts[user]).all()
    assert (window + size <= ends[user]).all()
    targets = Counter(p for w, s in zip(window, size, strict=True) for p in range(w + 1, w + s))
    expected = {p for s, e in zip(starts, ends, strict=True) for p in range(s + 1, e)}
    assert set(targets) == expected


@settings(deadline=None)
@given(
    lengths=histories,
    length=st.integers(2, 9),
    stride=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_drawn_windows_stay_inside_and_differ_in_their_ends(
    lengths: list[int], length: int, stride: int, seed: int
) -> None:
    plan = WindowPlan(length=length, stride=stride, cover=False)
    starts, ends, window, size = _cut(lengths, plan, seed)
    user = np.searchsorted(ends, window, side="right")
    assert (size >= 2).all()
    assert (window >= starts[user]).all()
    assert (window + size <= ends[user]).all()
    last = Counter((window + size).tolist())
    assert not last or max(last.values()) == 1
    assert set(user) == {u for u, n in enumerate(lengths) if n >= 2}  # nobody is left out


def test_over_many_epochs_every_end_is_drawn() -> None:
    plan = WindowPlan(length=5, stride=4, cover=False)
    drawn: set[int] = set()
    for seed in range(60):
        _, _, window, size = _cut([11], plan, seed)
        drawn.update((window + size).tolist())
    assert drawn == set(range(2, 12))


def test_batches_hold_each_window_once() -> None:
    lengths = np.random.default_rng(1).integers(2, 50, size=1003)
    batches = cut_batches(lengths, 8, np.random.default_rng(2))
    assert sorted(np.concatenate(batches).tolist()) == list(range(1003))
    padded = sum(len(b) * lengths[b].max() for b in batches)
    assert padded < 1.2 * lengths.sum()  # unsorted batches of 8 would pad by more than half


def test_an_epoch_reads_training_interactions_only_and_is_a_function_of_its_number() -> None:
    world = worlds.dataset([[0, 1, 2, 3, 4], [5, 6], [7, 0, 8]], 10)
    data = worlds.training_data(world, worlds.features(10))
    plan = WindowPlan(length=4, stride=3, cover=True)

    def seen(epoch: int, skip: int = 0) -> list[list[list[int]]]:
        _, batches = data.epoch(plan, batch_size=1, seed=3, epoch=epoch, skip=skip)
        return [
            [
                s[:n].tolist()
                for s, n in zip(b.sequences.items_BL, b.sequences.lengths_B, strict=True)
            ]
            for b in batches
        ]

    windows = sorted(sequence for batch in seen(0) for sequence in batch)
    assert windows == [[0, 1, 2], [5, 6]]  # 3, 4 and 0, 8 are held out; one item has no target
    assert seen(4) == seen(4)
    assert seen(4, skip=1) == seen(4)[1:]


def test_histories_end_right_before_the_target() -> None:
    world = worlds.dataset([[0, 1, 2, 3, 4], [5, 6], [7, 0, 8]], 10)
    data = worlds.training_data(world, worlds.features(10))
    for split, expected in (
        ("validation", {0: [1, 2], 2: [7]}),
        ("test", {0: [2, 3], 2: [7, 0]}),
    ):
        held = world.held(split)
        found = {}
        for rows, sequences in data.histories(held, length=2, batch_size=1):
            for row, items, n in zip(rows, sequences.items_BL, sequences.lengths_B, strict=True):
                found[int(held.users[row])] = items[:n].tolist()
        assert found == expected
