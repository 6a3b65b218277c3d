"""MoRec++: item vectors and states against the equations, and tables of tokens."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.trainer import worlds
from tests.trainer.models.sasrec_reference import sasrec_states
from trainer.data.batches import ItemFeatures, Sequences
from trainer.modules.tokens import Tokens

N = 12


def double(features: ItemFeatures) -> ItemFeatures:
    return replace(features, vectors={k: x.double() for k, x in features.vectors.items()})


def one_modality(features: ItemFeatures, name: str) -> ItemFeatures:
    return ItemFeatures(
        n_items=N,
        vectors={name: features.vectors[name]},
        present={name: features.present[name]},
    )


@pytest.mark.parametrize("modality", ["both", "text", "image"])
def test_scores_equal_the_equations(modality: str) -> None:
    features = double(worlds.features(N))
    if modality != "both":
        features = one_modality(features, modality)
    model: Any = worlds.build("morec", features).double().eval()
    encoder = model.item_encoder
    vectors = []
    for item in range(N):
        parts: list[Tensor] = []
        for number, (name, x) in enumerate(features.vectors.items()):
            is_present = bool(features.present[name][item])
            mapped = functional.gelu(encoder.inputs[name](x[item]))
            parts.append(mapped if is_present else encoder.absent[number])
        whole = torch.cat(parts)
        vectors.append(encoder.fusion(whole) if len(parts) > 1 else whole)
    raw, history = torch.stack(vectors), [1, 5, 11, 2]
    expected = raw @ sasrec_states(model.sequence_encoder, raw[history])[-1]
    rows = Sequences(items_BL=torch.tensor([history]), lengths_B=torch.tensor([4]))
    items = model.encode_items(features)
    torch.testing.assert_close(
        (model.encode_sequences(items, rows, features) @ items.T)[0], expected
    )


@pytest.mark.parametrize("token", ["mean", "first"])
def test_the_vector_of_a_token_table(token: str) -> None:
    model: Any = worlds.build("morec", one_modality(worlds.features(N), "text"), token=token)
    x_KTD = torch.randn(3, 4, 5)
    mask_KT = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
    tokens: dict[str, Tokens] = {"text": (x_KTD, mask_KT)}
    vectors = model.item_encoder(tokens)
    pooled = torch.stack([x_KTD[0].mean(0), x_KTD[1, :2].mean(0)])
    chosen = x_KTD[:2, 0] if token == "first" else pooled
    expected = functional.gelu(model.item_encoder.inputs["text"](chosen))
    torch.testing.assert_close(vectors[:2], expected)
    torch.testing.assert_close(vectors[2], model.item_encoder.absent[0])


def test_one_modality_is_not_fused() -> None:
    model: Any = worlds.build("morec", one_modality(worlds.features(N), "image"))
    assert isinstance(model.item_encoder.fusion, nn.Identity)
