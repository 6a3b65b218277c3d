"""BSARec: the filter against the Fourier transform, a block against the paper's equations."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.trainer import worlds
from trainer.data.batches import Sequences
from trainer.models.bsarec import low_pass

N, SLOTS = 12, 6


@pytest.mark.parametrize(("slots", "cutoff"), [(6, 0), (6, 3), (6, 5), (6, 6), (7, 5), (50, 5)])
@pytest.mark.parametrize("width", [1, 4, 6])
def test_the_filter_is_that_of_the_fourier_transform(slots: int, cutoff: int, width: int) -> None:
    x_TD = torch.randn(width, 3, dtype=torch.float64)
    spectrum = torch.fft.rfft(x_TD, n=slots, dim=0)
    spectrum[cutoff // 2 + 1 :] = 0
    expected = torch.fft.irfft(spectrum, n=slots, dim=0)[:width]
    kernel_TT = low_pass(slots, cutoff, width, is_causal=False)
    torch.testing.assert_close(kernel_TT @ x_TD, expected)


def reference_states(model: Any, row: list[int], *, is_causal: bool) -> Tensor:
    """The states of one history (L, D), written from the paper's equations in float64."""
    encoder, settings = model.sequence_encoder, model.settings
    length = len(row)
    positions = torch.arange(length - 1, -1, -1)
    x = encoder.norm(model.item_encoder.weight[row] + encoder.position.weight[positions])
    for block in encoder.blocks:
        low = torch.zeros_like(x)
        for slot in range(length):
            seen = x[: slot + 1] if is_causal else x
            padded = functional.pad(seen, (0, 0, 0, settings.length - len(seen)))
            spectrum = torch.fft.rfft(padded, dim=0, norm="ortho")
            spectrum[settings.cutoff // 2 + 1 :] = 0
            low[slot] = torch.fft.irfft(spectrum, n=settings.length, dim=0, norm="ortho")[slot]
        filtered = block.norm_filter(x + low + block.beta_D**2 * (x - low))
        query, key, value = block.qkv(x).chunk(3, dim=-1)
        heads = []
        for part in range(settings.heads):
            width = settings.dim // settings.heads
            q, k, v = (t[:, part * width : (part + 1) * width] for t in (query, key, value))
            scores = (q @ k.T / width**0.5).masked_fill(
                ~torch.ones(length, length, dtype=torch.bool).tril(), -torch.inf
            )
            heads.append(scores.softmax(-1) @ v)
        attended = block.norm_attention(x + block.out(torch.cat(heads, dim=-1)))
        mixed = settings.alpha * filtered + (1 - settings.alpha) * attended
        x = block.norm_feed(mixed + block.down(functional.gelu(block.up(mixed))))
    states: Tensor = x
    return states


@pytest.mark.parametrize("rows", ["windows", "prefixes"])
def test_states_equal_the_equations(rows: str) -> None:
    features = worlds.features(N)
    model: Any = worlds.build("bsarec", features, rows=rows, heads=2, layers=2).double().eval()
    histories = [[1, 2, 3, 4, 5], [6, 7]]
    padded = Sequences(
        items_BL=torch.tensor([histories[0], [*histories[1], 0, 0, 0]]),
        lengths_B=torch.tensor([5, 2]),
    )
    with torch.no_grad():
        states_BLD = model.sequence_encoder(model.item_encoder(padded.items_BL), padded.lengths_B)
        for row, history in enumerate(histories):
            expected = reference_states(model, history, is_causal=rows == "windows")
            torch.testing.assert_close(states_BLD[row, : len(history)], expected)


def test_the_published_filter_reads_the_whole_prefix_and_the_causal_one_does_not() -> None:
    features = worlds.features(N)
    pair = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 9]])
    lengths = torch.tensor([4, 4])
    for rows, is_equal in (("windows", True), ("prefixes", False)):
        model: Any = worlds.build("bsarec", features, rows=rows).eval()
        states = model.sequence_encoder(model.item_encoder(pair), lengths)
        assert torch.allclose(states[0, :3], states[1, :3], atol=1e-6) == is_equal


def test_a_row_for_each_prefix_predicts_only_its_last_item() -> None:
    features = worlds.features(N)
    model: Any = worlds.build("bsarec", features, rows="prefixes").eval()
    rows = Sequences(items_BL=torch.tensor([[1, 2, 3], [4, 5, 0]]), lengths_B=torch.tensor([3, 2]))
    batch = worlds.batch(rows, features, torch.Generator())
    _, targets, slot_M = model.targets(batch)
    assert targets.item_M.tolist() == [3, 5]
    assert slot_M.tolist() == [1, 2]


def test_each_prefix_of_a_training_history_is_one_row() -> None:
    data = worlds.training_data(worlds.dataset([[0, 1, 2, 3, 4, 5]], N), worlds.features(N))
    model: Any = worlds.build("bsarec", worlds.features(N), rows="prefixes")
    _, batches = data.epoch(model.window_sampling, batch_size=8, seed=1, epoch=0)
    (batch,) = batches
    rows = [
        row[:length].tolist()
        for row, length in zip(batch.sequences.items_BL, batch.sequences.lengths_B, strict=True)
    ]
    assert sorted(rows) == [[0, 1], [0, 1, 2], [0, 1, 2, 3]]  # 4 and 5 are held out
