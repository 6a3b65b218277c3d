"""TedRec: the fusion against the Fourier transform, states against the equations in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.trainer import worlds
from tests.trainer.models.sasrec_reference import sasrec_states
from tests.trainer.models.test_morec import double
from tests.trainer.models.test_unisrec import adapted, randomised
from trainer.data.batches import Sequences
from trainer.models.tedrec import SpectralFusion
from trainer.modules.transformer import initialise

N = 12


def fused(fusion: Any, ids: Tensor, texts: Tensor, *, is_causal: bool) -> Tensor:
    """The fused sequence (L, D) of one history, by the orthonormal transform of the paper."""
    out = torch.zeros_like(ids)
    for slot in range(len(ids)):
        seen = slot + 1 if is_causal else len(ids)
        spectra = []
        for x in (ids[:seen], texts[:seen]):
            padded = functional.pad(x, (0, 0, 0, fusion.slots - seen))
            spectra.append(torch.fft.rfft(padded, dim=0, norm="ortho"))
        weight = torch.complex(*fusion.filter_2FD)
        products = (spectra[0] * weight, spectra[0] * spectra[1])
        c, m = (torch.fft.irfft(p, n=fusion.slots, dim=0, norm="ortho")[slot] for p in products)
        gates = (fusion.gate_filtered(c).sigmoid(), fusion.gate_mixed(m).sigmoid())
        out[slot] = 2 * (gates[0] * c + gates[1] * m)
    return out


@pytest.mark.parametrize("slots", [1, 6, 7])
@pytest.mark.parametrize("is_causal", [True, False])
def test_the_fusion_is_that_of_the_fourier_transform(slots: int, is_causal: bool) -> None:
    fusion = SpectralFusion(slots, 3, is_causal=is_causal).double()
    torch.nn.init.normal_(fusion.filter_2FD)
    for length in range(1, slots + 1):
        ids, texts = torch.randn(2, length, 3, dtype=torch.float64)
        expected = fused(fusion, ids, texts, is_causal=is_causal)
        torch.testing.assert_close(fusion(ids[None], texts[None])[0], expected)


@pytest.mark.parametrize("rows", ["windows", "prefixes"])
def test_states_equal_the_equations(rows: str) -> None:
    features = double(worlds.features(N))
    model: Any = worlds.build("tedrec", features, rows=rows).double().eval()
    initialise(model, std=0.5)
    for adaptor in model.text_encoder.adaptors.values():
        randomised(adaptor)
    histories = [[1, 5, 11, 2, 3], [6, 7]]
    padded = Sequences(
        items_BL=torch.tensor([histories[0], [*histories[1], 0, 0, 0]]),
        lengths_B=torch.tensor([5, 2]),
    )
    states_BLD = model.fused_states(padded, features)
    for row, history in enumerate(histories):
        texts = []
        for slot, item in enumerate(history):
            position = len(history) - 1 - slot
            text = torch.zeros(8, dtype=torch.float64)
            for number, (name, x) in enumerate(features.vectors.items()):
                if features.present[name][item]:
                    adaptor = model.text_encoder.adaptors[name]
                    text = text + adapted(adaptor, x[item], position)
                else:
                    text = text + model.text_encoder.absent[number]
            texts.append(text)
        x_LD = fused(
            model.fusion,
            model.item_encoder.weight[history],
            torch.stack(texts),
            is_causal=rows == "windows",
        )
        expected = sasrec_states(model.sequence_encoder, x_LD)
        torch.testing.assert_close(states_BLD[row, : len(history)], expected)


def test_the_published_fusion_reads_the_whole_prefix_and_the_causal_one_does_not() -> None:
    features = worlds.features(N, missing=False)
    pair = Sequences(
        items_BL=torch.tensor([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 9]]),
        lengths_B=torch.tensor([6, 6]),
    )
    for rows, is_equal in (("windows", True), ("prefixes", False)):
        model: Any = worlds.build("tedrec", features, rows=rows).eval()
        initialise(model, std=0.5)
        states = model.fused_states(pair, features)
        assert torch.allclose(states[0, :5], states[1, :5], atol=1e-4) == is_equal


def test_texts_of_candidates_are_not_read() -> None:
    features, others = worlds.features(N), worlds.features(N, seed=1)
    model: Any = worlds.build("tedrec", features).eval()
    assert torch.equal(model.encode_items(features), model.encode_items(others))
    rows = Sequences(items_BL=torch.tensor([[1, 2, 3]]), lengths_B=torch.tensor([3]))
    items = model.encode_items(features)
    queries = [model.encode_sequences(items, rows, given) for given in (features, others)]
    assert not torch.allclose(queries[0], queries[1], atol=1e-4)
