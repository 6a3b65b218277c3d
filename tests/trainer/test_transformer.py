import math

import pytest
import torch

from trainer.transformer import dropout


@pytest.mark.parametrize(
    ("probability", "below"), [(0.4, 102), (0.5, 128), (0.001, 0), (0.999, 255)]
)
def test_fast_dropout_has_the_rate_and_keeps_the_mean(probability: float, below: int) -> None:
    count, rate = 100_003, below / 256  # not a multiple of the 8 bytes of a word
    torch.manual_seed(7)
    found = dropout(torch.ones(count), probability, training=True)
    dropped = int((found == 0).sum())
    assert abs(dropped - count * rate) <= 5 * math.sqrt(count * rate * (1 - rate))
    kept = found[found != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - rate)))
    spread = math.sqrt(rate / (1 - rate) / count)
    assert abs(float(found.mean()) - 1) <= 5 * spread + 1e-6


def test_fast_dropout_goes_by_the_seed_and_only_in_training() -> None:
    x = torch.randn(3, 5)
    torch.manual_seed(1)
    one = dropout(x, 0.5, training=True)
    other = dropout(x, 0.5, training=True)
    torch.manual_seed(1)
    assert torch.equal(one, dropout(x, 0.5, training=True))
    assert not torch.equal(one, other)
    assert one.shape == x.shape
    assert torch.equal(dropout(x, 0.5, training=False), x)
    assert torch.equal(dropout(x, 0.0, training=True), x)


def test_the_gradient_passes_where_a_number_stayed() -> None:
    x = torch.ones(64, requires_grad=True)
    torch.manual_seed(0)
    found = dropout(x, 0.25, training=True)
    found.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, found.detach())
