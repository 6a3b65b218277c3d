"""Standard deviations of initial weights at the sizes of the released code."""

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.models.base import Catalogue
from trainer.models.mmsr import IDSR, MMSR, IDSRConfig, MMSRConfig
from trainer.models.mmsrec import MMSRec, MMSRecConfig
from trainer.models.pmmrec import PMMRec, PMMRecConfig

LARGE: dict[str, Any] = {"dim": 768, "hidden": 3072}
BLOCK = "sequence_encoder.transformer.blocks.0"
FUSION = "item_encoder.fusion"


def widths(width: int) -> dict[str, int]:
    return {"image": width, "text": width}


def weights(model: str, initialisation: str = "released", **options: Any) -> Mapping[str, Tensor]:
    """Return the initial weights of a model as wide as the released one."""
    torch.manual_seed(0)
    options["initialisation"] = initialisation
    catalogue = Catalogue(n_items=50, n_users=1, widths=widths(512 if model == "mmsrec" else 768))
    if model == "mmsrec":
        return MMSRec(MMSRecConfig(**options), catalogue).state_dict()
    if model == "idsr":
        return IDSR(IDSRConfig(**LARGE, **options), catalogue).state_dict()
    if model == "mmsr":
        return MMSR(MMSRConfig(**LARGE, fusion_heads=12, **options), catalogue).state_dict()
    return PMMRec(PMMRecConfig(**LARGE, fusion_heads=12, **options), catalogue).state_dict()


def check_spread(values: Tensor, expected: float) -> None:
    """Check a standard deviation to four standard errors of its estimate, and the mean to five."""
    n = values.numel()
    assert abs(float(values.std()) / expected - 1) < 4 / math.sqrt(2 * n)
    assert abs(float(values.mean())) < 5 * expected / math.sqrt(n)


@pytest.mark.parametrize("model", ["mmsr", "idsr", "pmmrec"])
def test_the_sequence_encoder_is_glorot_normal_matrix_by_matrix(model: str) -> None:
    state = weights(model)
    for matrix in state[f"{BLOCK}.qkv.weight"].chunk(3):
        check_spread(matrix, 0.0361)
    check_spread(state[f"{BLOCK}.out.weight"], 0.0361)
    check_spread(state[f"{BLOCK}.up.weight"], 0.0228)
    check_spread(state[f"{BLOCK}.down.weight"], 0.0228)
    assert not state[f"{BLOCK}.qkv.bias"].any()
    # sqrt(2 / 788); .0497 was measured on one draw of 15,360 values, 2.4 standard errors below.
    check_spread(state["sequence_encoder.position.weight"], math.sqrt(2 / (20 + 768)))


@pytest.mark.parametrize("model", ["mmsr", "pmmrec"])
def test_the_projections_are_glorot_and_merge_attention_is_that_of_bert(model: str) -> None:
    state = weights(model, centre=False)
    check_spread(state["item_encoder.inputs.text.weight"], 0.0361)
    for name in ("qkv", "out", "up", "down"):
        check_spread(state[f"{FUSION}.blocks.0.{name}.weight"], 0.02)
        assert not state[f"{FUSION}.blocks.0.{name}.bias"].any()


def test_co_attention_is_that_of_bert_but_for_its_last_map() -> None:
    state = weights("mmsr", fusion="co-attention")
    for name in ("query", "key_value", "out"):
        check_spread(state[f"{FUSION}.cross.0.{name}.weight"], 0.02)
    for index in range(2):
        check_spread(state[f"{FUSION}.own.{index}.qkv.weight"], 0.02)
        check_spread(state[f"{FUSION}.own.{index}.up.weight"], 0.02)
    check_spread(state[f"{FUSION}.map.weight"], math.sqrt(2 / (3 * 768)))


def test_coarse_fusions_are_glorot_normal() -> None:
    state = weights("mmsr", fusion="film", dnn=True)
    check_spread(state[f"{FUSION}.map.weight"], 0.0361)
    check_spread(state["item_encoder.dnn.maps.2.weight"], 0.0361)


def test_the_convolutions_are_uniform_with_their_biases() -> None:
    state = weights("idsr", sequence_encoder="nextitnet")
    bound = 1 / math.sqrt(3 * 768) * (1 + 1e-6)  # float32 rounds it up
    for index in range(2):
        prefix = f"sequence_encoder.blocks.3.convolutions.{index}.map"
        weight, bias = state[f"{prefix}.weight"], state[f"{prefix}.bias"]
        check_spread(weight, bound / math.sqrt(3))
        assert bound / math.sqrt(3) == pytest.approx(0.0120, abs=5e-5)
        assert 0.999 * bound < float(weight.abs().max()) <= bound
        check_spread(bias, bound / math.sqrt(3))
        assert float(bias.abs().max()) <= bound


def test_layer_0_of_the_gru_is_glorot_and_layer_1_is_uniform() -> None:
    state = weights("idsr", sequence_encoder="gru")
    for name in ("weight_ih", "weight_hh"):
        check_spread(state[f"sequence_encoder.gru.{name}_l0"], 0.0255)
        check_spread(state[f"sequence_encoder.gru.{name}_l1"], 1 / math.sqrt(3 * 768))


def test_mmsrec_has_equal_glorot_uniform_projections_in_all_layers() -> None:
    state = weights("mmsrec", layers=3)
    first, *others = (state[f"transformer.blocks.{i}.qkv.weight"] for i in range(3))
    check_spread(first, 0.03125)
    assert float(first.abs().max()) < 0.03126 * math.sqrt(3)
    assert all(torch.equal(first, other) for other in others)
    for name in ("out", "up", "down"):
        check_spread(state[f"transformer.blocks.1.{name}.weight"], 0.02)
    assert not torch.equal(*(state[f"transformer.blocks.{i}.out.weight"] for i in range(2)))
    check_spread(state["inputs.text.0.weight"], 0.02)


@pytest.mark.parametrize(
    ("model", "name", "expected"),
    [
        ("mmsr", f"{BLOCK}.qkv.weight", 0.0255),
        ("mmsr", f"{FUSION}.blocks.0.qkv.weight", 0.0255),
        ("mmsr", f"{FUSION}.blocks.0.up.weight", 0.0228),
        ("pmmrec", f"{BLOCK}.qkv.weight", 0.02),
        ("pmmrec", "item_encoder.inputs.text.1.weight", 0.02),
        ("mmsrec", "transformer.blocks.0.qkv.weight", 0.02),
    ],
)
def test_the_default_is_another_distribution(model: str, name: str, expected: float) -> None:
    check_spread(weights(model, "default")[name], expected)
