"""Ridge regression between the sides: its weights, its strength, and what it finds."""

from typing import Any

import numpy as np
import pytest
import torch

from trainer.data.batches import ItemFeatures
from trainer.evaluation.cross_modal import TO_TEXT, TO_VISION, without_vision_of
from trainer.evaluation.ridge import RidgeRetrieval, fit_ridge

CHANCE = 10 / 60


def planted(n_items: int = 260, *, noise: float = 0.3) -> ItemFeatures:
    """Vision is a linear map of the text, with noise; neither is centred."""
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(n_items, 9, generator=generator)
    image = text @ torch.randn(9, 14, generator=generator)
    image += noise * torch.randn(n_items, 14, generator=generator)
    vectors = {"image": 3 * image + 5, "text": text - 2}
    present = torch.ones(n_items, dtype=torch.bool)
    return ItemFeatures(n_items=n_items, vectors=vectors, present=dict.fromkeys(vectors, present))


def parts(n_items: int = 260) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the items of the fit, and 60 other items to rank."""
    return torch.arange(60, n_items), torch.arange(60)


def recall(ranks: Any) -> float:
    return float((ranks <= 10).mean())


@pytest.mark.parametrize(("pairs", "width"), [(40, 6), (12, 30)])
def test_weights_and_strength_are_those_of_the_dense_solution(pairs: int, width: int) -> None:
    """With more columns than rows as well; the residual and the trace are computed directly."""
    rng = np.random.default_rng(pairs)
    x = rng.normal(size=(pairs, width))
    x -= x.mean(0)
    y = x @ rng.normal(size=(width, 4)) + rng.normal(size=(pairs, 4))
    y -= y.mean(0)
    fitted, strength = fit_ridge(
        torch.from_numpy(x.T @ x), torch.from_numpy(x.T @ y), float((y**2).sum()), pairs
    )

    def dense(penalty: float) -> tuple[Any, float]:
        hat = x @ np.linalg.solve(x.T @ x + penalty * np.eye(width), x.T)
        weights = np.linalg.solve(x.T @ x + penalty * np.eye(width), x.T @ y)
        return weights, ((y - hat @ y) ** 2).sum() / (pairs - 1 - np.trace(hat)) ** 2

    weights, error = dense(strength)
    np.testing.assert_allclose(fitted.numpy(), weights, rtol=1e-8, atol=1e-9)
    least = min(dense(strength * factor)[1] for factor in 10.0 ** np.arange(-1, 1.01, 0.25))
    assert error == pytest.approx(least)
    given, _ = fit_ridge(
        torch.from_numpy(x.T @ x), torch.from_numpy(x.T @ y), float((y**2).sum()), pairs, 7.0
    )
    np.testing.assert_allclose(given.numpy(), dense(7.0)[0], rtol=1e-8, atol=1e-9)


def test_a_linear_map_is_found_in_both_directions() -> None:
    features = planted()
    pairs, pool = parts()
    ranks = RidgeRetrieval.fit(features, pairs).retrieve(features, pool)
    assert {name: len(values) for name, values in ranks.items()} == {TO_VISION: 60, TO_TEXT: 60}
    assert all((values == 1).mean() > 0.9 for values in ranks.values())


def test_permuted_pairs_are_at_chance() -> None:
    features = planted()
    order = torch.randperm(260, generator=torch.Generator().manual_seed(2))
    features.vectors["image"][:] = features.vectors["image"][order].clone()
    pairs, pool = parts()
    ranks = RidgeRetrieval.fit(features, pairs).retrieve(features, pool)
    assert all(recall(values) < 2 * CHANCE for values in ranks.values())


def test_with_more_features_than_items_noise_is_not_fitted() -> None:
    """As posters have: the smallest strength fits every pair, and finds no other."""
    generator = torch.Generator().manual_seed(3)
    shared = torch.randn(260, 4, generator=generator)
    vectors = {
        name: shared @ torch.randn(4, width, generator=generator)
        + 3 * torch.randn(260, width, generator=generator)
        for name, width in (("image", 300), ("text", 40))
    }
    present = dict.fromkeys(vectors, torch.ones(260, dtype=torch.bool))
    features = ItemFeatures(n_items=260, vectors=vectors, present=present)
    pairs, pool = parts()
    ridge = RidgeRetrieval.fit(features, pairs)
    image = vectors["image"][pairs].double() - vectors["image"][pairs].double().mean(0)
    mean_square = float(image.square().sum() / (image.square().sum(1).mean() * 199))
    assert ridge.strengths[TO_TEXT] > 0.1 * mean_square
    assert all(recall(values) > 0.7 for values in ridge.retrieve(features, pool).values())


def test_the_ranked_items_do_not_change_the_fit() -> None:
    features, other = planted(), planted()
    pairs, pool = parts()
    for vectors in other.vectors.values():
        vectors[pool] = torch.randn(60, vectors.shape[1])
    ridges = [RidgeRetrieval.fit(world, pairs) for world in (features, other)]
    assert ridges[0].strengths == ridges[1].strengths
    for direction in (TO_VISION, TO_TEXT):
        assert torch.equal(ridges[0].weights[direction], ridges[1].weights[direction])
    assert all(recall(r) < 2 * CHANCE for r in ridges[1].retrieve(other, pool).values())


def test_a_pair_whose_image_is_ranked_is_left_out_also_under_another_item() -> None:
    features, other = planted(), planted(80, noise=0.9)
    pairs, _ = parts()
    other.vectors["image"][7] = features.vectors["image"][100]
    other.vectors["text"][8] = features.vectors["text"][101]
    left = without_vision_of(pairs, features, torch.tensor([7, 8]), other)
    assert left.tolist() == [item for item in pairs.tolist() if item != 100]
    assert without_vision_of(pairs, features, pairs, features).tolist() == []


def test_several_modalities_of_a_side_and_an_item_that_lacks_one() -> None:
    """An absent modality counts as the mean, whatever its row holds."""
    features = planted()
    video = features.vectors["image"].flip(1).clone()
    lacking = torch.arange(260) % 3 == 0
    present = {**features.present, "video": ~lacking}
    ranks = []
    for filler in (0.0, 1e4):
        rows = torch.where(lacking[:, None], filler, video)
        vectors = {**features.vectors, "video": rows}
        world = ItemFeatures(n_items=260, vectors=vectors, present=present)
        pairs, pool = parts()
        ranks.append(RidgeRetrieval.fit(world, pairs).retrieve(world, pool))
    assert recall(ranks[0][TO_VISION]) > 0.95
    for direction in (TO_VISION, TO_TEXT):
        assert ranks[0][direction].tolist() == ranks[1][direction].tolist()


def test_equal_inputs_predict_nothing_and_ties_count_against() -> None:
    features = planted()
    features.vectors["text"][:] = 1.0
    pairs, pool = parts()
    ranks = RidgeRetrieval.fit(features, pairs).retrieve(features, pool)
    assert set(ranks[TO_VISION].tolist()) == {60}


def test_features_in_half_precision_give_the_same_ranks_as_in_float32() -> None:
    half = planted()
    half = ItemFeatures(
        n_items=260,
        vectors={name: x.half() for name, x in half.vectors.items()},
        present=half.present,
    )
    full = ItemFeatures(
        n_items=260,
        vectors={name: x.float() for name, x in half.vectors.items()},
        present=half.present,
    )
    pairs, pool = parts()
    ranks = [RidgeRetrieval.fit(world, pairs).retrieve(world, pool) for world in (half, full)]
    for direction in (TO_VISION, TO_TEXT):
        assert ranks[0][direction].tolist() == ranks[1][direction].tolist()
