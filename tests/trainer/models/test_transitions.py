"""Transition counts against the definition, written as loops over histories."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval.seen_items import SeenItems
from tests.trainer import worlds
from trainer.data.batches import ItemFeatures
from trainer.evaluation.encode import histories_of
from trainer.models.transitions import Transitions

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
@given(sequences=histories, window=st.integers(1, 4), length=st.integers(1, 4))
def test_scores_are_those_of_the_definition(
    sequences: list[list[int]], window: int, length: int
) -> None:
    dataset = worlds.dataset(sequences, N)
    features = ItemFeatures(n_items=N, vectors={}, present={})
    model = worlds.build("transitions", features, window=window, length=length)
    assert isinstance(model, Transitions)
    data = worlds.training_data(dataset, features)
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
