"""Encoders and fusions with the settings of the released code against its equations, in float64."""

import itertools
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.trainer.modules import released_reference as reference
from trainer.kernels.dispatch import plain_forms
from trainer.modules.fusion import Fusion, FusionSettings
from trainer.modules.registry import FUSIONS, SEQUENCE_ENCODERS
from trainer.modules.sequence_encoders import SequenceEncoder, SequenceSettings

D, SLOTS = 8, 6
RELEASED: dict[str, Any] = {
    "activation": "relu",
    "final_norm": False,
    "attention_bias": False,
    "norm_eps": 1e-6,
    "inner_dropout": False,
}
BERT: dict[str, Any] = {"fusion_norm_eps": 1e-12, "inner_dropout": False}


def randomise(module: nn.Module, std: float = 0.4) -> None:
    """Draw every parameter, biases and LayerNorms as well, so that none is without effect."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(std * noise + (1.0 if "norm" in name and "weight" in name else 0.0))


def build_encoder(layers: int = 2, **options: Any) -> SequenceEncoder:
    sizes = {"dim": D, "heads": 2, "hidden": 12, "length": SLOTS, "layers": layers, "dropout": 0.3}
    settings = SequenceSettings(**{**sizes, **RELEASED, **options})
    encoder = SEQUENCE_ENCODERS["sasrec"](settings, 0.3).double().eval()
    randomise(encoder)
    return encoder


def build_fusion(name: str, layers: int, **options: Any) -> Fusion:
    sizes = {"dim": D, "fusion_heads": 2, "hidden": 12, "fusion_layers": layers, "dropout": 0.3}
    fusion = FUSIONS[name](FusionSettings(**{**sizes, **BERT, **options}), ["image", "text"])
    fusion = fusion.double().eval()
    randomise(fusion)
    return fusion


def histories() -> tuple[Tensor, Tensor]:
    """Histories of 6, 2 and 1 items; the vectors are small, so that an epsilon counts."""
    generator = torch.Generator().manual_seed(1)
    x_BLD = torch.randn(3, SLOTS, D, generator=generator, dtype=torch.float64)
    return 0.01 * x_BLD, torch.tensor([SLOTS, 2, 1])


def items(counts: tuple[int, int]) -> list[tuple[Tensor, Tensor]]:
    """Tokens of three items for both modalities, with padding in the second item."""
    generator = torch.Generator().manual_seed(2)
    modalities = []
    for count in counts:
        x_KTD = torch.randn(3, count, D, generator=generator, dtype=torch.float64)
        mask_KT = torch.ones(3, count, dtype=torch.bool)
        mask_KT[1, 1:] = False
        modalities.append((0.01 * x_KTD, mask_KT))
    return modalities


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("kernels", [True, False])
def test_the_released_sequence_encoder(layers: int, kernels: bool) -> None:
    encoder = build_encoder(layers)
    x_BLD, lengths_B = histories()
    with torch.no_grad():
        if kernels:
            states_BLD = encoder(x_BLD, lengths_B)
        else:
            with plain_forms():
                states_BLD = encoder(x_BLD, lengths_B)
        weights = encoder.state_dict()
        for row, length in enumerate(lengths_B.tolist()):
            expected = reference.encode_history(
                list(x_BLD[row, :length]), weights, slots=SLOTS, heads=2, layers=layers
            )
            for state_D, expected_D in zip(states_BLD[row, :length], expected, strict=True):
                torch.testing.assert_close(state_D, expected_D, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "option",
    [
        {"activation": "gelu"},
        {"final_norm": True},
        {"attention_bias": True},
        {"norm_eps": 1e-5},
    ],
)
def test_every_option_of_the_sequence_encoder_counts(option: dict[str, Any]) -> None:
    x_BLD, lengths_B = histories()
    released, other = build_encoder(), build_encoder(**option)
    own = released.state_dict()
    kept = {name: own.get(name, value) for name, value in other.state_dict().items()}
    other.load_state_dict(kept)
    difference = (released(x_BLD, lengths_B) - other(x_BLD, lengths_B)).abs().max()
    assert float(difference.detach()) > 1e-7


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("counts", [(3, 4), (1, 1)])
def test_the_released_merge_attention(layers: int, counts: tuple[int, int]) -> None:
    """Two modalities of one token are two tokens, which have a kernel of their own."""
    fusion = build_fusion("merge-attention", layers, token_types=False)
    check_fusion(fusion, layers, counts)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("counts", [(3, 4), (1, 1)])
def test_the_released_co_attention(layers: int, counts: tuple[int, int]) -> None:
    fusion = build_fusion("co-attention", layers, token_types=True)
    check_fusion(fusion, layers, counts)


def check_fusion(fusion: Fusion, layers: int, counts: tuple[int, int]) -> None:
    modalities = items(counts)
    slow = {
        "MergeAttention": reference.merge_attention,
        "CoAttention": reference.co_attention,
    }[type(fusion).__name__]
    with torch.no_grad():
        fused_KD = fusion(modalities)
        for item, fused_D in enumerate(fused_KD):
            tokens = [list(x_KTD[item][mask_KT[item]]) for x_KTD, mask_KT in modalities]
            expected_D = slow(tokens, fusion.state_dict(), heads=2, layers=layers)
            torch.testing.assert_close(fused_D, expected_D, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", list(FUSIONS))
def test_the_epsilon_of_every_fusion_counts(name: str) -> None:
    modalities = items((3, 4))
    published, other = build_fusion(name, 1), build_fusion(name, 1, fusion_norm_eps=1e-5)
    difference = (published(modalities) - other(modalities)).abs().max()
    assert float(difference.detach()) > 1e-9


@pytest.mark.parametrize(("activation", "zeros"), [("gelu", 0.0), ("relu", 0.5)])
@pytest.mark.parametrize("kernels", [True, False])
def test_inner_dropout_is_on_the_activations(activation: str, zeros: float, kernels: bool) -> None:
    """About half of the ReLUs are zero without dropout; with a dropout of .3 more are."""
    x_BLD, lengths_B = histories()
    shares = []
    for with_dropout in (False, True):
        encoder: Any = build_encoder(layers=1, activation=activation, inner_dropout=with_dropout)
        inner: list[Tensor] = []
        down = encoder.transformer.blocks[0].down
        down.register_forward_pre_hook(lambda _, given, inner=inner: inner.append(given[0]))
        torch.manual_seed(0)
        with nullcontext() if kernels else plain_forms():
            encoder.train()(x_BLD, lengths_B)
        shares.append(float((inner[0] == 0).double().mean()))
    without, with_it = shares
    assert without == 0 if activation == "gelu" else abs(without - zeros) < 0.2
    assert without + 0.3 * (1 - without) == pytest.approx(with_it, abs=0.1)


def test_without_attention_biases_no_bias_is_drawn() -> None:
    names = [name for name, _ in build_encoder().named_parameters()]
    for missing, layer in itertools.product(("qkv.bias", "out.bias"), range(2)):
        assert f"transformer.blocks.{layer}.{missing}" not in names
    assert "transformer.norm.weight" not in names
