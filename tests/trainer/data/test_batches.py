from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from features.dataset import Ints
from tests.trainer import worlds
from trainer.data.batches import ItemFeatures, Shard
from trainer.data.windows import WindowSampling, cut_batches, cut_windows

histories = st.lists(st.integers(0, 30), min_size=1, max_size=12)


def _cut(lengths: list[int], sampling: WindowSampling, seed: int) -> tuple[Ints, Ints, Ints, Ints]:
    ends = np.cumsum(np.array(lengths, np.int64))
    starts = ends - np.array(lengths, np.int64)
    window, size = cut_windows(starts, ends, sampling, np.random.default_rng(seed))
    return starts, ends, window, size


@settings(deadline=None)
@given(lengths=histories, length=st.integers(2, 9), seed=st.integers(0, 99))
def test_covering_windows_hold_every_target_and_no_stranger(
    lengths: list[int], length: int, seed: int
) -> None:
    plan = WindowSampling(length=length, stride=length - 1, every_target=True)
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
@given(lengths=histories, length=st.integers(2, 9), seed=st.integers(0, 99))
def test_only_the_newest_targets_are_counted_twice(
    lengths: list[int], length: int, seed: int
) -> None:
    stride = length - 1
    plan = WindowSampling(length=length, stride=stride, every_target=True)
    _, ends, window, size = _cut(lengths, plan, seed)
    counts = Counter(p for w, s in zip(window, size, strict=True) for p in range(w + 1, w + s))
    for end, n in zip(ends.tolist(), lengths, strict=True):
        mine = [counts[p] for p in range(end - max(0, n - 1), end)]
        newest = mine[-stride:]
        assert set(mine[:-stride]) <= {1}
        assert set(newest) <= {1, 2}
        assert newest == sorted(newest, reverse=True)  # twice, and the very newest s of them once
        assert n > length or 2 not in newest


def test_windows_count_half_a_window_twice_in_the_mean() -> None:
    """By hand: the shifts 0, 1 and 2 of a stride of 3 repeat 0, 2 and 1 targets."""
    plan = WindowSampling(length=4, stride=3, every_target=True)
    users = 3000
    _, _, _, size = _cut([13] * users, plan, 0)
    extra = (size - 1).sum() - 12 * users
    assert extra == pytest.approx(users * (3 - 1) / 2, rel=0.05)


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
    plan = WindowSampling(length=length, stride=stride, every_target=False)
    starts, ends, window, size = _cut(lengths, plan, seed)
    user = np.searchsorted(ends, window, side="right")
    assert (size >= 2).all()
    assert (window >= starts[user]).all()
    assert (window + size <= ends[user]).all()
    last = Counter((window + size).tolist())
    assert not last or max(last.values()) == 1
    assert set(user) == {u for u, n in enumerate(lengths) if n >= 2}  # nobody is left out


def test_over_many_epochs_every_end_is_drawn() -> None:
    plan = WindowSampling(length=5, stride=4, every_target=False)
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
    plan = WindowSampling(length=4, stride=3, every_target=True)

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


def test_two_processes_draw_different_things_and_the_first_what_one_alone_draws() -> None:
    data = worlds.training_data(worlds.cycles(n_items=12), worlds.features(12))
    plan = WindowSampling(length=4, stride=3, every_target=True)
    draws = []
    for shard in (
        Shard(),
        Shard(process_rank=0, world_size=2),
        Shard(process_rank=1, world_size=2),
    ):
        batches = data.epoch(plan, batch_size=8, seed=1, epoch=2, shard=shard)[1]
        drawn = [torch.rand(3, generator=batch.generator) for batch in batches]
        draws.append(torch.stack(drawn[:5]))
    alone, first, second = draws
    assert torch.equal(first, alone)
    assert not (second == first).any()


def test_histories_end_right_before_the_target() -> None:
    world = worlds.dataset([[0, 1, 2, 3, 4], [5, 6], [7, 0, 8]], 10)
    data = worlds.training_data(world, worlds.features(10))
    for split, expected in (
        ("validation", {0: [1, 2], 2: [7]}),
        ("test", {0: [2, 3], 2: [7, 0]}),
    ):
        evaluated = world.eval_split(split)
        histories = {}
        for rows, sequences in data.histories(evaluated, length=2, batch_size=1):
            for row, items, n in zip(rows, sequences.items_BL, sequences.lengths_B, strict=True):
                histories[int(evaluated.users[row])] = items[:n].tolist()
        assert histories == expected


def test_the_last_sequence_is_not_read_beyond_the_end_of_all_interactions() -> None:
    data = worlds.training_data(worlds.dataset([[0, 1, 2, 3], [4, 5]], 6), worlds.features(6))
    # The second row ends with the array.
    sequences = data.gather(np.array([0, 5]), np.array([4, 1]))
    assert sequences.items_BL.tolist() == [[0, 1, 2, 3], [5, 5, 5, 5]]
    assert sequences.mask_BL.tolist() == [[True] * 4, [True, False, False, False]]


def test_coverage_counts_items() -> None:
    present = {
        "image": torch.tensor([True, False, True, False]),
        "text": torch.tensor([True, True, False, False]),
    }
    features = ItemFeatures(n_items=4, vectors={}, present=present)
    assert features.coverage() == ({"image": 2, "text": 2}, 1)
    assert ItemFeatures(n_items=4, vectors={}, present={}).coverage() == ({}, 4)


def test_the_training_set_knows_training_pairs_alone() -> None:
    world = worlds.dataset([[0, 1, 0, 2, 3], [3, 2], [1, 4, 2]], n_items=5)
    data = worlds.training_data(world, worlds.features(5))
    users, items = torch.arange(3)[:, None], torch.arange(5)[None, :]
    seen = data.train.seen(users, items)  # the last two of users 0 and 2 are held out
    assert [row.nonzero().flatten().tolist() for row in seen] == [[0, 1], [2, 3], [1]]
    assert data.train.counts_N.tolist() == [2, 2, 1, 1, 0]


def test_each_row_of_a_batch_knows_its_user() -> None:
    world = worlds.cycles(users=20)
    data = worlds.training_data(world, worlds.features(12))
    plan = WindowSampling(length=4, stride=3, every_target=True)
    _, batches = data.epoch(plan, batch_size=7, seed=0, epoch=0)
    for batch in batches:
        for user, items, length in zip(
            batch.users_B.tolist(),
            batch.sequences.items_BL.tolist(),
            batch.sequences.lengths_B.tolist(),
            strict=True,
        ):
            whole = world.items[world.offsets[user] : world.train_ends()[user]].tolist()
            windows = [whole[i : i + length] for i in range(len(whole) - length + 1)]
            assert items[:length] in windows
