import torch

from tests.trainer import worlds
from tests.trainer.models.test_recommenders import build
from trainer.data.batches import TrainSet
from trainer.modules.whitening import Whitening


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
    x = torch.tensor([[3.0, 1.0], [-1.0, 1.0], [1.0, 2.0], [1.0, 0.0]])
    white.fit(x)  # variances 2 and 1/2 about (1, 1), no correlation; 0.00125 is added to each
    expected = (x - 1) / torch.tensor([2.00125, 0.50125]).sqrt()
    torch.testing.assert_close(white(x), expected)


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
