"""ItemKNN and EASE against dense matrices, written from their equations."""

from typing import Any

import numpy as np
import pytest
import torch

from features.errors import UserError
from retrieval.seen_items import SeenItems
from tests.trainer import worlds
from trainer.data.batches import ItemFeatures, Sequences
from trainer.models import ease, itemknn
from trainer.models.base import Catalogue

N = 9


def histories(seed: int = 0, users: int = 40) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, N - 1, rng.integers(5, 9)).tolist() for _ in range(users)]


def dense(rows: list[list[int]]) -> np.ndarray[Any, Any]:
    matrix = np.zeros((len(rows), N))
    for user, row in enumerate(rows):
        matrix[user, row] = 1  # an item that a user repeats counts once
    return matrix


def fitted(name: str, rows: list[list[int]], **settings: Any) -> Any:
    features = ItemFeatures(n_items=N, vectors={}, present={})
    data = worlds.training_data(worlds.dataset(rows, N), features)
    model = worlds.build(name, features, **settings)
    model.fit_buffers(features, data.train)
    return model


def compressed(rows: list[list[int]]) -> SeenItems:
    offsets = np.cumsum([0, *(len(row) for row in rows)]).astype(np.int64)
    return SeenItems(items=np.concatenate(rows).astype(np.int64), offsets=offsets)


@pytest.mark.parametrize("shrink", [0.0, 2.5])
@pytest.mark.parametrize("neighbours", [1, 3, 100])
@pytest.mark.parametrize("block", [2, 1024])
def test_itemknn_equals_a_dense_loop(
    shrink: float, neighbours: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(itemknn, "_ITEMS_PER_BLOCK", block)
    rows = histories()
    model = fitted("itemknn", rows, shrink=shrink, neighbours=neighbours)
    users = dense([row[:-2] for row in rows])
    similarity = np.zeros((N, N))
    for target in range(N):
        norm = np.sqrt(users.sum(0))
        common = users.T @ users[:, target]
        with np.errstate(invalid="ignore"):
            row = np.nan_to_num(common / (norm * norm[target] + shrink))
        row[target] = 0
        for item in sorted(range(N), key=lambda i: (-row[i], i))[:neighbours]:
            similarity[item, target] = row[item]
    queries = [[0, 1, 1], [3], [5, 6, 7]]
    scores = model.correction(compressed(queries))
    values = np.zeros((len(queries), N))
    for user in range(len(queries)):
        part = slice(scores.offsets[user], scores.offsets[user + 1])
        values[user, scores.items[part]] = scores.values[part]
    np.testing.assert_allclose(values, dense(queries) @ similarity, atol=1e-12)


def test_ease_equals_the_closed_form() -> None:
    rows = histories()
    model = fitted("ease", rows, penalty=3.0).double()
    users = dense([row[:-2] for row in rows])
    inverse = np.linalg.inv(users.T @ users + 3.0 * np.eye(N))
    weights = -inverse / np.diag(inverse)
    np.fill_diagonal(weights, 0)
    queries = Sequences(
        items_BL=torch.tensor([[0, 1, 1], [3, 0, 0]]), lengths_B=torch.tensor([3, 1])
    )
    scores = torch.cat(
        [model.score(model.weights_NN, queries, first, last) for first, last in ((0, 4), (4, N))],
        dim=1,
    )
    expected = dense([[0, 1], [3]]) @ weights
    np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-4, atol=1e-6)


def test_ease_refuses_a_catalogue_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ease, "available_memory", lambda: 1000)
    catalogue = Catalogue(n_items=N, n_users=1, widths={})
    ease.EASE(ease.EASEConfig(), catalogue)
    large = Catalogue(n_items=100, n_users=1, widths={})
    with pytest.raises(UserError, match="100"):
        ease.EASE(ease.EASEConfig(), large)


@pytest.mark.parametrize("name", ["itemknn", "ease"])
def test_items_of_one_group_are_recommended_together(name: str) -> None:
    """A planted world: a user takes all six items of one of two groups, in any order."""
    rng = np.random.default_rng(1)
    rows = [(6 * (user % 2) + rng.permutation(6)).tolist() for user in range(60)]
    features = ItemFeatures(n_items=12, vectors={}, present={})
    world = worlds.dataset(rows, 12)
    model = worlds.build(name, features)
    model.fit_buffers(features, worlds.training_data(world, features).train)
    # The test target is the only item of the group that a user does not have yet.
    assert (worlds.ranks(model, world, features).filtered == 1).all()
    assert worlds.popularity_ranks(world).filtered.mean() > 2


@pytest.mark.parametrize("name", ["itemknn", "ease"])
def test_the_order_of_histories_is_left_as_it_is(name: str) -> None:
    """Other models read the same histories, and their order matters to them."""
    rows = [[5, 3, 3, 1, 0, 2], [4, 0, 6, 2, 1]]
    features = ItemFeatures(n_items=N, vectors={}, present={})
    train = worlds.training_data(worlds.dataset(rows, N), features).train
    model = worlds.build(name, features)
    model.fit_buffers(features, train)
    assert train.histories.items.tolist() == [5, 3, 3, 1, 4, 0, 6]
    queries = compressed([[3, 1, 0]])
    model.correction(queries)
    assert queries.items.tolist() == [3, 1, 0]
