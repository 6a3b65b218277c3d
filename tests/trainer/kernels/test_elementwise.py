import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.kernels.dispatch import plain_forms
from trainer.kernels.elementwise import add_norm, draw_dropout_mask, dropout, gelu_dropout

SEED = 3


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def dropout_factor(shape: tuple[int, ...], probability: float) -> Tensor:
    """Return the factor by which a kernel called after ``manual_seed(SEED)`` multiplies."""
    torch.manual_seed(SEED)
    mask, scale = draw_dropout_mask(shape, probability)
    return mask.double() * scale


def assert_equal_to_reference(
    kernel: Callable[[], Tensor], reference: Callable[[], Tensor], inputs: list[Tensor]
) -> None:
    """Assert that values and gradients of both are equal in float64."""
    torch.manual_seed(SEED)
    output = kernel()
    weight = random(*output.shape, seed=9).detach()
    gradients = torch.autograd.grad(output, inputs, weight)
    expected = reference()
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, inputs, weight))


@pytest.mark.parametrize(
    ("probability", "below"), [(0.4, 102), (0.5, 128), (0.001, 0), (0.999, 255)]
)
def test_dropout_has_the_rate_and_keeps_the_mean(probability: float, below: int) -> None:
    count, rate = 100_003, below / 256  # not a multiple of the 8 bytes of a word
    torch.manual_seed(7)
    output = dropout(torch.ones(count), probability, training=True)
    dropped = int((output == 0).sum())
    assert abs(dropped - count * rate) <= 5 * math.sqrt(count * rate * (1 - rate))
    kept = output[output != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - rate)))
    spread = math.sqrt(rate / (1 - rate) / count)
    assert abs(float(output.mean()) - 1) <= 5 * spread + 1e-6


def test_dropout_depends_on_the_seed_and_happens_only_in_training() -> None:
    x = torch.randn(3, 5)
    torch.manual_seed(1)
    first = dropout(x, 0.5, training=True)
    second = dropout(x, 0.5, training=True)
    torch.manual_seed(1)
    assert torch.equal(first, dropout(x, 0.5, training=True))
    assert not torch.equal(first, second)
    assert first.shape == x.shape
    assert torch.equal(dropout(x, 0.5, training=False), x)
    assert torch.equal(dropout(x, 0.0, training=True), x)


def test_the_gradient_of_dropout_passes_where_an_element_was_kept() -> None:
    x = torch.ones(64, requires_grad=True)
    torch.manual_seed(0)
    output = dropout(x, 0.25, training=True)
    output.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, output.detach())


@pytest.mark.parametrize("probability", [0.0, 0.3])
def test_add_norm_equals_its_plain_form(probability: float) -> None:
    x, h = random(3, 4, 6), random(3, 4, 6, seed=1)
    norm = nn.LayerNorm(6).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    factor = dropout_factor((3, 4, 6), probability)
    assert_equal_to_reference(
        lambda: add_norm(x, h, norm, probability),
        lambda: functional.layer_norm(x + h * factor, (6,), norm.weight, norm.bias),
        [x, h, norm.weight, norm.bias],
    )


@pytest.mark.parametrize("probability", [0.0, 0.3])
def test_gelu_dropout_equals_its_plain_form(probability: float) -> None:
    x = random(5, 7)
    factor = dropout_factor((5, 7), probability)
    assert_equal_to_reference(
        lambda: gelu_dropout(x, probability), lambda: functional.gelu(x) * factor, [x]
    )


def test_without_dropout_the_kernels_equal_the_plain_forms() -> None:
    x, h, norm = random(3, 4, 6), random(3, 4, 6, seed=1), nn.LayerNorm(6).double()
    operators: list[Callable[[], Tensor]] = [
        lambda: add_norm(x, h, norm, 0.0),
        lambda: gelu_dropout(x + h, 0.0),
        lambda: dropout(x + h, 0.4, training=False),
    ]
    for operator in operators:
        with plain_forms():
            expected = operator()
        torch.testing.assert_close(operator(), expected)
