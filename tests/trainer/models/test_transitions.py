"""Transition counts against the definition, written as loops over histories."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval.seen_items import SeenItems
from tests.trainer import worlds
from trainer.data.batches import ItemFeatures
from trainer.evaluation.encode import histories_of
from trainer.models import transitions
from trainer.models.transitions import (
    CountedTransitions,
    Transitions,
    TransitionsConfig,
    sum_by_key,
)

N = 6
histories = st.lists(
    st.lists(st.integers(0, N - 1), min_size=3, max_size=9), min_size=1, max_size=5
)


def naive(train: list[list[int]], history: list[int], window: int, length: int) -> np.ndarray:
    counts = np.zeros((N, N))
    for items in train:
        for place, earlier in enumerate(items):
            for distance in range(1, window + 1):
                if place + distance < len(items):
                    counts[earlier, items[place + distance]] += 1 / distance
    rows = counts / (counts.sum(1, keepdims=True) + 3)
    scores = np.zeros(N)
    for age, item in enumerate(history[::-1][:length], 1):
        scores += rows[item] / age
    return scores


@settings(max_examples=40, deadline=None)
@given(
    sequences=histories,
    window=st.integers(1, 4),
    length=st.integers(1, 4),
    block=st.sampled_from([1, 3, 2**20]),
)
def test_scores_are_those_of_the_definition(
    sequences: list[list[int]], window: int, length: int, block: int
) -> None:
    dataset = worlds.dataset(sequences, N)
    features = ItemFeatures(n_items=N, vectors={}, present={})
    model = worlds.build("transitions", features, window=window, length=length)
    assert isinstance(model, Transitions)
    data = worlds.training_data(dataset, features)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transitions, "_POSITIONS_AT_ONCE", block)
        model.fit_buffers(features, data.train)
    train = [items[: int(end - start)] for items, start, end in zip(
        sequences, dataset.offsets[:-1], dataset.train_ends(), strict=True
    )]  # fmt: skip
    users = dataset.eval_split("test")
    scores = model.correction(histories_of(dataset, users))
    for row, user in enumerate(users.users):
        dense = np.zeros(N)
        part = scores.rows(row, row + 1)
        dense[part.items] = part.values
        expected = naive(train, sequences[user][:-1], window, length)
        np.testing.assert_allclose(dense, expected, atol=1e-12)


def test_the_held_out_items_are_not_counted() -> None:
    dataset = worlds.dataset([[0, 1, 2, 3]], N)
    features = ItemFeatures(n_items=N, vectors={}, present={})
    model = worlds.build("transitions", features)
    assert isinstance(model, Transitions)
    model.fit_buffers(features, worlds.training_data(dataset, features).train)
    after_one = SeenItems(items=np.array([1]), offsets=np.array([0, 1]))
    assert len(model.correction(after_one).items) == 0
    after_zero = SeenItems(items=np.array([0]), offsets=np.array([0, 1]))
    assert model.correction(after_zero).items.tolist() == [1]


def test_counts_do_not_depend_on_the_size_of_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    offsets = np.concatenate([[0], np.cumsum(random.integers(0, 30, 300))])
    items = (50 * random.random(offsets[-1]) ** 2).astype(np.int64)
    histories = SeenItems(items=items, offsets=offsets)
    whole = CountedTransitions.of(histories, 50, TransitionsConfig())
    monkeypatch.setattr(transitions, "_POSITIONS_AT_ONCE", 100)
    parts = CountedTransitions.of(histories, 50, TransitionsConfig())
    np.testing.assert_array_equal(parts.rows.items, whole.rows.items)
    np.testing.assert_array_equal(parts.rows.offsets, whole.rows.offsets)
    np.testing.assert_array_equal(parts.rows.values, whole.rows.values)
    np.testing.assert_array_equal(parts.totals_N, whole.totals_N)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 12), st.floats(-9, 9)), max_size=30),
    st.sampled_from([1, 10**9]),
    st.integers(0, 10**6),
)
def test_sums_of_dense_and_of_spread_keys_have_the_same_bits(
    pairs: list[tuple[int, float]], stride: int, least: int
) -> None:
    sums: dict[int, float] = {}
    for key, value in pairs:
        sums[least + stride * key] = sums.get(least + stride * key, 0.0) + value
    keys = np.array([least + stride * key for key, _ in pairs], dtype=np.int64)
    kept, totals = sum_by_key(keys, np.array([value for _, value in pairs], dtype=np.float64))
    assert dict(zip(kept.tolist(), totals.tolist(), strict=True)) == dict(sorted(sums.items()))
    assert (np.diff(kept) > 0).all()
