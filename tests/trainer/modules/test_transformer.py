import pytest
import torch
from torch import Tensor

from trainer.kernels.dispatch import plain_forms
from trainer.modules.transformer import BlockConfig, Transformer, initialise


def build(*, causal: bool = False, dropout: float = 0.0) -> Transformer:
    torch.manual_seed(0)
    config = BlockConfig(
        dim=8,
        heads=2,
        hidden=12,
        dropout=dropout,
        attention_dropout=dropout,
        causal=causal,
    )
    made = Transformer(config, layers=2)
    initialise(made, std=0.4)
    return made.double()


def tokens(rows: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, count, 8, generator=generator, dtype=torch.float64)


def gradients(model: Transformer, output: Tensor, x: Tensor) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    return list(torch.autograd.grad(output, [x, *model.parameters()], weight))


@pytest.mark.parametrize(("count", "causal"), [(1, False), (2, False), (5, False), (5, True)])
@pytest.mark.parametrize("masked", [False, True])
def test_the_kernels_equal_the_plain_forms(count: int, causal: bool, masked: bool) -> None:
    model, x = build(causal=causal), tokens(4, count).requires_grad_()
    mask = None
    if masked and not causal:
        mask = torch.ones(4, count, dtype=torch.bool)
        mask[0, 1:] = False
    output = model(x, mask)
    with plain_forms():
        expected = model(x, mask)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(gradients(model, output, x), gradients(model, expected, x))


@pytest.mark.parametrize("count", [2, 5])
def test_only_the_selected_tokens_are_computed(count: int) -> None:
    model, x = build(), tokens(4, count).requires_grad_()
    selected = torch.rand(4, count, generator=torch.Generator().manual_seed(3)) < 0.5
    some, every = model(x, None, selected.flatten().nonzero()[:, 0]), model(x)[selected]
    torch.testing.assert_close(some, every)
    torch.testing.assert_close(gradients(model, some, x), gradients(model, every, x))
