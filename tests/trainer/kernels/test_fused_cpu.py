import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.kernels.fused_cpu import add_norm, attend_pairs, draw, dropout, gelu_dropout


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def drawn(shape: tuple[int, ...], probability: float) -> Tensor:
    """What the next call with this probability multiplies by."""
    torch.manual_seed(3)
    stays, scale = draw(shape, probability)
    torch.manual_seed(3)
    return stays.double() * scale


def check(found: Callable[[], Tensor], plain: Callable[[], Tensor], inputs: list[Tensor]) -> None:
    """Values and gradients of both are equal in float64."""
    torch.manual_seed(3)
    fused = found()
    weight = random(*fused.shape, seed=9).detach()
    grads = torch.autograd.grad(fused, inputs, weight)
    reference = plain()
    wanted = torch.autograd.grad(reference, inputs, weight)
    torch.testing.assert_close(fused, reference)
    torch.testing.assert_close(grads, wanted)


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


@pytest.mark.parametrize("probability", [0.0, 0.3])
def test_add_norm_is_its_plain_form(probability: float) -> None:
    x, h = random(3, 4, 6), random(3, 4, 6, seed=1)
    norm = nn.LayerNorm(6).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    factor = drawn((3, 4, 6), probability)
    check(
        lambda: add_norm(x, h, norm, probability),
        lambda: functional.layer_norm(x + h * factor, (6,), norm.weight, norm.bias),
        [x, h, norm.weight, norm.bias],
    )


@pytest.mark.parametrize("probability", [0.0, 0.3])
def test_gelu_dropout_is_its_plain_form(probability: float) -> None:
    x = random(5, 7)
    factor = drawn((5, 7), probability)
    check(lambda: gelu_dropout(x, probability), lambda: functional.gelu(x) * factor, [x])


@pytest.mark.parametrize("probability", [0.0, 0.3])
def test_attention_over_pairs_is_a_softmax_over_two(probability: float) -> None:
    n, H, E = 5, 3, 4
    query, key, value = (random(n, 2, H, E, seed=seed) for seed in range(3))
    factor = drawn((n, 2, H, 2), probability)

    def plain() -> Tensor:
        score = torch.einsum("nihe,njhe->nihj", query, key) / math.sqrt(E)
        return torch.einsum("nihj,njhe->nihe", score.softmax(-1) * factor, value)

    check(
        lambda: attend_pairs(query, key[:, 0] - key[:, 1], value, probability),
        plain,
        [query, key, value],
    )


def test_attention_over_pairs_stands_scores_that_overflow_an_exponential() -> None:
    query = torch.full((1, 2, 1, 4), 1e4, requires_grad=True)
    mixed = attend_pairs(query, torch.full((1, 1, 4), 1e4), torch.ones(1, 2, 1, 4), 0.0)
    mixed.sum().backward()
    assert torch.equal(mixed, torch.ones_like(mixed))
    assert query.grad is not None
    assert torch.equal(query.grad, torch.zeros_like(query))
