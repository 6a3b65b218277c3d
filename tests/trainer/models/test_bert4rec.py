"""BERT4Rec: masks, and the loss against the paper's equations."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.trainer import worlds
from trainer.data.batches import Sequences

N = 12


def sequences(rows: list[list[int]], padding: int = 0) -> Sequences:
    width = max(map(len, rows))
    items = [row + [padding] * (width - len(row)) for row in rows]
    return Sequences(
        items_BL=torch.tensor(items), lengths_B=torch.tensor([len(row) for row in rows])
    )


def reference_logits(model: Any, row: list[int], masked: set[int]) -> Tensor:
    """The scores (L, N) of one window, written from the paper's equations."""
    settings = model.settings
    length = len(row)
    x = torch.stack(
        [model.mask_D if slot in masked else model.item.weight[row[slot]] for slot in range(length)]
    )
    x = model.norm(x + model.position.weight[torch.arange(length - 1, -1, -1)])
    for block in model.transformer.blocks:
        query, key, value = block.qkv(x).chunk(3, dim=-1)
        width = settings.dim // settings.heads
        heads = []
        for part in range(settings.heads):
            q, k, v = (t[:, part * width : (part + 1) * width] for t in (query, key, value))
            heads.append((q @ k.T / width**0.5).softmax(-1) @ v)
        x = block.norm_attention(x + block.out(torch.cat(heads, dim=-1)))
        x = block.norm_feed(x + block.down(functional.gelu(block.up(x))))
    z = model.head[2](functional.gelu(model.head[0](model.transformer.norm(x))))
    logits: Tensor = z @ model.item.weight.T + model.bias_N1[:, 0]
    return logits


def test_the_loss_equals_the_equations(monkeypatch: pytest.MonkeyPatch) -> None:
    features = worlds.features(N)
    model: Any = worlds.build("bert4rec", features).double().eval()
    torch.nn.init.normal_(model.bias_N1)
    rows, masked = [[1, 2, 3, 4], [5, 6]], [{1, 3}, {0}]
    is_masked = torch.tensor([[False, True, False, True], [True, False, False, False]])
    monkeypatch.setattr(model, "_draw_masks", lambda *args: is_masked)
    batch = worlds.batch(sequences(rows), features, torch.Generator())
    losses = []
    for row, slots in zip(rows, masked, strict=True):
        logits = reference_logits(model, row, slots)
        losses += [
            functional.cross_entropy(logits[slot], torch.tensor(row[slot])) for slot in slots
        ]
    torch.testing.assert_close(
        model.loss(batch)["loss"].double(), torch.stack(losses).mean(), rtol=1e-6, atol=1e-6
    )


def test_the_next_item_is_scored_at_the_appended_mask() -> None:
    features = worlds.features(N)
    model: Any = worlds.build("bert4rec", features).double().eval()
    torch.nn.init.normal_(model.bias_N1)
    items = model.encode_items(features)
    queries = model.encode_sequences(items, sequences([[1, 2, 3], [4]]), features)
    for query, row in zip(queries, ([1, 2, 3], [4]), strict=True):
        expected = reference_logits(model, [*row, 0], {len(row)})[-1]
        torch.testing.assert_close(items @ query, expected)


@pytest.mark.parametrize("last_share", [0.0, 1.0])
@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.99])
def test_every_row_has_a_masked_item_and_no_padding_is_masked(
    last_share: float, ratio: float
) -> None:
    model: Any = worlds.build(
        "bert4rec", worlds.features(N), mask_ratio=ratio, last_share=last_share
    )
    rows = sequences([[1], [2, 3], [4, 5, 6, 7, 8, 9]])
    generator = torch.Generator().manual_seed(1)
    counts = torch.zeros(3, 6)
    for _ in range(300):
        masks = model._draw_masks(rows, generator)
        assert masks.any(1).all()
        assert not (masks & ~rows.mask_BL).any()
        counts += masks
    if last_share:
        assert counts.nonzero().tolist() == [[0, 0], [1, 1], [2, 5]]
    else:
        assert (counts[2] > 300 * ratio / 1.5).all()
