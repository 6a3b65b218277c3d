import pytest
import torch
from torch import Tensor

from trainer.modules import transformer
from trainer.modules.transformer import Transformer, initialise


def build(*, causal: bool = False, dropout: float = 0.0) -> Transformer:
    torch.manual_seed(0)
    made = Transformer(
        layers=2,
        dim=8,
        heads=2,
        hidden=12,
        dropout=dropout,
        attention_dropout=dropout,
        causal=causal,
    )
    initialise(made, std=0.4)
    return made.double()


def tokens(rows: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, count, 8, generator=generator, dtype=torch.float64)


def gradients(model: Transformer, found: Tensor, x: Tensor) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    return list(torch.autograd.grad(found, [x, *model.parameters()], weight))


@pytest.mark.parametrize(("count", "causal"), [(1, False), (2, False), (5, False), (5, True)])
@pytest.mark.parametrize("masked", [False, True])
def test_the_fused_form_is_the_plain_one(
    count: int, causal: bool, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = build(causal=causal), tokens(4, count).requires_grad_()
    keys = None
    if masked and not causal:
        keys = torch.ones(4, count, dtype=torch.bool)
        keys[0, 1:] = False
    fused = model(x, keys)
    found = gradients(model, fused, x)
    with monkeypatch.context() as patch:
        patch.setattr("trainer.kernels.fused_cpu.plain", lambda _: True)
        patch.setattr(transformer, "plain", lambda _: True)
        reference = model(x, keys)
        wanted = gradients(model, reference, x)
    torch.testing.assert_close(fused, reference)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_with_dropout_is_attention_in_the_mean(causal: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 1, 3, 4, generator=generator) for _ in range(3))
    mask = None if causal else torch.tensor([[True, True, False]])
    many, rest = (20_000, 1, 3, 4), (mask, causal, 0.25)
    torch.manual_seed(0)
    drawn = transformer._attend(query.expand(many), key.expand(many), value.expand(many), *rest)
    found = drawn.mean(0, keepdim=True)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal
    )
    torch.testing.assert_close(found, wanted, atol=0.03, rtol=0)


@pytest.mark.parametrize("count", [2, 5])
def test_only_the_wanted_tokens_are_computed(count: int) -> None:
    model, x = build(), tokens(4, count).requires_grad_()
    at = torch.rand(4, count, generator=torch.Generator().manual_seed(3)) < 0.5
    some, every = model(x, None, at), model(x)[at]
    torch.testing.assert_close(some, every)
    torch.testing.assert_close(gradients(model, some, x), gradients(model, every, x))
