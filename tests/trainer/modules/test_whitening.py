from dataclasses import replace

import pytest
import torch

from tests.trainer import worlds
from tests.trainer.models.test_recommenders import build
from trainer.data.batches import TrainSet
from trainer.modules.whitening import Centring, Whitening


def cone(items: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    axes, _ = torch.linalg.qr(torch.randn(4, 4, generator=generator))
    spread = torch.tensor([4.0, 2.0, 1.0, 1.0])
    x: torch.Tensor = torch.randn(items, 4, generator=generator) * spread @ axes + 5
    return x


def test_until_it_is_fitted_nothing_changes() -> None:
    x = torch.randn(5, 4)
    assert torch.equal(Whitening(4)(x), x)


def test_mean_0_and_covariance_1() -> None:
    white, x = Whitening(4), cone(500)
    white.fit(x)
    whitened = white(x)
    torch.testing.assert_close(whitened.mean(0), torch.zeros(4), atol=1e-3, rtol=0)
    # The smallest of these variances is a sixth of their mean, of which a thousandth is added.
    torch.testing.assert_close(whitened.T @ whitened / 500, torch.eye(4), atol=0.01, rtol=0)


def test_by_hand_the_axes_stay() -> None:
    white = Whitening(2)
    x = torch.tensor([[3.0, 1.0], [-1.0, 1.0], [1.0, 2.0], [1.0, 0.0]]).repeat(5, 1)
    white.fit(x)  # variances 2 and 1/2 about (1, 1), no correlation; 0.00125 is added to each
    expected = (x - 1) / torch.tensor([2.00125, 0.50125]).sqrt()
    torch.testing.assert_close(white(x), expected)


def test_by_hand_the_directions_that_the_items_do_not_support_are_removed() -> None:
    white = Whitening(2)
    x = torch.tensor([[3.0, 1.0], [-1.0, 1.0], [1.0, 2.0], [1.0, 0.0]])
    white.fit(x)  # 4 items support one direction: that of the variance 2
    expected = torch.stack([(x[:, 0] - 1) / 2.00125**0.5, torch.zeros(4)], 1)
    torch.testing.assert_close(white(x), expected)
    assert white.directions == 1


@pytest.mark.parametrize(("items", "kept"), [(200, 20), (209, 20), (640, 64), (5000, 64)])
def test_at_most_one_direction_for_every_10_items(items: int, kept: int) -> None:
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(0, -3, 64)  # variances over six orders of magnitude
    x = torch.randn(items, 64, generator=generator) * scales
    white = Whitening(64)
    assert white.directions == 64  # the identity
    white.fit(x)
    assert white.directions == kept
    assert int(torch.linalg.matrix_rank(white(x) - white(x).mean(0), rtol=1e-3)) == kept


def test_with_10_items_for_each_dimension_no_bit_of_the_map_depends_on_the_limit() -> None:
    x, white = cone(40), Whitening(4)
    white.fit(x)
    centred = x.double() - x.double().sum(0) / 40
    variances, axes = torch.linalg.eigh(centred.T @ centred / 40)
    scales = (variances + 1e-3 * float(variances.mean())).rsqrt()
    assert torch.equal(white.matrix_WW, (axes * scales @ axes.T).float())


def groups(items: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return features of 8 groups of items in noise of many directions, and the group of each."""
    generator = torch.Generator().manual_seed(0)
    group = torch.arange(items) % 8
    centres = torch.randn(8, width, generator=generator)
    return 0.5 * centres[group] + torch.randn(items, width, generator=generator), group


def test_with_more_dimensions_than_items_similar_items_stay_near_each_other() -> None:
    x, group = groups(items=160, width=400)
    white = Whitening(400)
    white.fit(x)
    units = torch.nn.functional.normalize(white(x), dim=1)
    cosines = units @ units.T
    other = ~torch.eye(160, dtype=torch.bool)
    same = group == group[:, None]
    # A whitening of all directions makes every vector orthogonal to all others: its cosines are
    # -1 / 159 with a standard deviation below .001, whatever the groups are.
    assert cosines[other].std() > 0.1
    assert cosines[same & other].mean() > 0.3
    assert abs(cosines[~same].mean()) < 0.1
    cosines[~other] = -1
    assert (group[cosines.argmax(1)] == group).float().mean() > 0.95


def test_a_model_says_how_many_directions_it_keeps() -> None:
    features = worlds.features(12)
    train = TrainSet(counts_N=torch.ones(12, dtype=torch.int64), keys_J=torch.arange(12))
    model = build("mmsrec", features, whiten=True)
    model.fit_buffers(features, train)
    widths = features.widths
    kept = ", ".join(f"1 of {width} directions of {name}" for name, width in widths.items())
    assert model.remarks == (f"whiten=true keeps {kept}: at most one for every 10 items",)
    assert build("mmsrec", features).remarks == ()


def test_nothing_to_fit_on() -> None:
    white = Whitening(2)
    white.fit(torch.empty(0, 2))
    torch.testing.assert_close(white(torch.ones(1, 2)), torch.ones(1, 2))
    white.fit(torch.full((3, 2), 4.0))
    torch.testing.assert_close(white(torch.ones(1, 2)), torch.full((1, 2), -3.0))


def test_only_items_seen_in_training_are_looked_at() -> None:
    features = worlds.features(12)
    counts = torch.ones(12, dtype=torch.int64)
    counts[[2, 3]] = 0
    train = TrainSet(counts_N=counts, keys_J=torch.arange(12))
    buffers = []
    for garbage in (0.0, 1e6):
        model = build("mmsrec", features, whiten=True, ids=True)
        for vectors in features.vectors.values():
            vectors[[2, 3]] += garbage
        model.fit_buffers(features, train)
        buffers.append(dict(model.named_buffers()))
    assert all(torch.equal(value, buffers[1][name]) for name, value in buffers[0].items())
    assert not torch.equal(buffers[0]["whitening.text.matrix_WW"], torch.eye(5))
    assert torch.equal(buffers[0]["known_N"], counts > 0)


def test_centring_is_one_shift_and_one_scale() -> None:
    x = torch.randn(300, 4, generator=torch.Generator().manual_seed(0)) * 3 + 7
    centring = Centring(4)
    assert torch.equal(centring(x), x)
    centring.fit(x.half())
    y = centring(x)
    torch.testing.assert_close(y.mean(0), torch.zeros(4), atol=1e-3, rtol=0)
    assert y.square().mean().item() == pytest.approx(1, abs=1e-3)
    torch.testing.assert_close((y[1] - y[0]) * centring.scale, x[1] - x[0])
    centring.fit(torch.ones(5, 4))
    assert torch.equal(centring(torch.ones(2, 4)), torch.zeros(2, 4))


def test_centred_weights_keep_their_function_in_a_model_that_does_not_centre() -> None:
    features = worlds.features(30)
    for name, vectors in features.vectors.items():
        vectors[features.present[name]] += 5
    centred = build("mmsrec", features, centre=True).eval()
    centred.fit_buffers(features, worlds.training_data(worlds.cycles(n_items=30), features).train)
    plain = build("mmsrec", features).eval()
    state = centred.state_dict()
    plain.load_state_dict(dict(plain.adapted(state)))
    torch.testing.assert_close(
        plain.encode_items(features), centred.encode_items(features), rtol=1e-4, atol=1e-5
    )
    assert centred.adapted(state) is state
    assert plain.adapted(plain.state_dict()).keys() == plain.state_dict().keys()


def test_features_without_interactions_are_centred_on_all_items() -> None:
    features = worlds.features(30, missing=False)
    model = build("mmsrec", features, centre=True)
    train = worlds.training_data(worlds.cycles(n_items=30), features).train
    model.fit_buffers(features, replace(train, counts_N=torch.zeros_like(train.counts_N)))
    expected = features.vectors["text"].mean(0)
    torch.testing.assert_close(model.state_dict()["centring.text.mean_W"], expected)


def test_dropped_features_are_dropped_in_training_alone() -> None:
    features = worlds.features(30)
    model = build("mmsrec", features, feature_dropout=0.5, dropout=0.0, embed_dropout=0.0)
    with torch.no_grad():
        model.train()
        trained = model.encode_items(features)
        model.eval()
        first, second = (model.encode_items(features) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.allclose(trained, first)


@pytest.mark.parametrize("name", ["mmsr", "pmmrec"])
def test_centred_item_encoders_read_features_of_any_scale_alike(name: str) -> None:
    features = worlds.features(30)
    train = worlds.training_data(worlds.cycles(n_items=30), features).train
    larger = replace(
        features,
        vectors={
            "image": (20 * features.vectors["image"] + 3) * features.present["image"][:, None],
            "text": features.vectors["text"],
        },
    )
    vectors = {}
    for centre in (True, False):
        for kind, world in (("as they are", features), ("larger", larger)):
            model = build(name, world, centre=centre).eval()
            model.fit_buffers(world, train)
            with torch.no_grad():
                vectors[centre, kind] = model.encode_items(world)
    torch.testing.assert_close(
        vectors[True, "larger"], vectors[True, "as they are"], rtol=1e-4, atol=1e-5
    )
    assert not torch.allclose(vectors[False, "larger"], vectors[False, "as they are"], atol=1e-2)


def test_an_item_encoder_is_centred_on_items_of_the_training_alone() -> None:
    features = worlds.features(30, missing=False)
    train = worlds.training_data(worlds.cycles(n_items=30), features).train
    train = replace(train, counts_N=train.counts_N.clone())
    train.counts_N[7] = 0
    other = replace(
        features, vectors={name: x_NW.clone() for name, x_NW in features.vectors.items()}
    )
    for x_NW in other.vectors.values():
        x_NW[7] = 100
    vectors = []
    for world in (features, other):
        model = build("mmsr", world, centre=True).eval()
        model.fit_buffers(world, train)
        with torch.no_grad():
            vectors.append(model.encode_items(world))
    is_known_N = torch.arange(30) != 7
    assert torch.equal(vectors[0][is_known_N], vectors[1][is_known_N])
    assert not torch.equal(vectors[0][7], vectors[1][7])


def test_tables_of_tokens_are_not_centred() -> None:
    features = worlds.token_features(30)
    model = build("mmsr", features, centre=True)
    train = worlds.training_data(worlds.cycles(n_items=30), features).train
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.fit_buffers(features, train)
    fitted = {name for name, x in model.state_dict().items() if not torch.equal(x, before[name])}
    assert fitted
    assert all(".image." in name for name in fitted)
