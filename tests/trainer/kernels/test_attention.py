import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.kernels.attention import self_attention
from trainer.kernels.dispatch import plain_forms
from trainer.kernels.elementwise import draw_dropout_mask

B, D, H = 5, 12, 3


def inputs(tokens: int) -> tuple[Tensor, nn.Linear]:
    torch.manual_seed(0)
    projection = nn.Linear(D, 3 * D).double()
    return torch.randn(B, tokens, D, dtype=torch.float64, requires_grad=True), projection


def gradients(output: Tensor, x: Tensor, projection: nn.Linear) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    return torch.autograd.grad(output, [x, projection.weight, projection.bias], weight)


def padding_mask(tokens: int) -> Tensor:
    mask = torch.ones(B, tokens, dtype=torch.bool)
    mask[0, 1:] = False
    return mask


def order_mask(tokens: int) -> Tensor:
    return torch.ones(1, tokens, tokens, dtype=torch.bool).tril()


@pytest.mark.parametrize("tokens", [1, 2, 5])
@pytest.mark.parametrize("mask", [None, padding_mask, order_mask])
@pytest.mark.parametrize("causal", [False, True])
def test_without_dropout_the_kernels_equal_the_plain_form(
    tokens: int, mask: object, causal: bool
) -> None:
    if causal and mask is not None:
        pytest.skip("a causal attention takes no mask")
    x, projection = inputs(tokens)
    allowed = mask(tokens) if callable(mask) else None
    output = self_attention(x, projection, H, mask=allowed, causal=causal, probability=0.0)
    with plain_forms():
        expected = self_attention(x, projection, H, mask=allowed, causal=causal, probability=0.0)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(gradients(output, x, projection), gradients(expected, x, projection))


@pytest.mark.parametrize("tokens", [1, 2, 5])
@pytest.mark.parametrize("mask", [None, padding_mask, order_mask])
@pytest.mark.parametrize("causal", [False, True])
def test_dropout_multiplies_the_attention_weights(tokens: int, mask: object, causal: bool) -> None:
    """The reference is a softmax, multiplied by the dropout mask that the kernel draws."""
    if causal and mask is not None:
        pytest.skip("a causal attention takes no mask")
    x, projection = inputs(tokens)
    allowed = mask(tokens) if callable(mask) else None
    torch.manual_seed(3)
    output = self_attention(x, projection, H, mask=allowed, causal=causal, probability=0.3)

    pairs = tokens == 2 and allowed is None and not causal  # this kernel has tokens before heads
    shape = (B, tokens, H, tokens) if pairs else (B, H, tokens, tokens)
    torch.manual_seed(3)
    kept, scale = draw_dropout_mask(shape, 0.3)
    factor = (kept.transpose(1, 2) if pairs else kept).double() * scale
    query, key, value = projection(x).view(B, tokens, 3, H, D // H).permute(2, 0, 3, 1, 4)
    score = query @ key.transpose(-1, -2) / math.sqrt(D // H)
    if causal:
        allowed = order_mask(tokens)
    if allowed is not None:
        score = score.masked_fill(
            ~(allowed[:, None] if allowed.ndim == 3 else allowed[:, None, None]), -math.inf
        )
    mixed = (score.softmax(-1) * factor) @ value
    expected = mixed.transpose(1, 2).reshape(B, tokens, D)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(gradients(output, x, projection), gradients(expected, x, projection))


def test_attention_over_two_tokens_bears_scores_that_overflow_an_exponential() -> None:
    projection = nn.Linear(2, 6, bias=True)
    with torch.no_grad():
        projection.weight.copy_(torch.cat([torch.eye(2) * 1e4, torch.eye(2) * 1e4, torch.eye(2)]))
        projection.bias.zero_()
    x = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]], requires_grad=True)
    output = self_attention(x, projection, 1, mask=None, causal=False, probability=0.0)
    output.sum().backward()
    torch.testing.assert_close(output, functional.one_hot(torch.tensor([[0, 1]])).float())
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
