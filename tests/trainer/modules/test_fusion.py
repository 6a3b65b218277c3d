"""Each fusion against the formula written for one item at a time, of the tokens it has."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from features.errors import UserError
from trainer.modules.fusion import FusionSettings
from trainer.modules.item_encoder import ItemEncoder
from trainer.modules.registry import FUSIONS
from trainer.modules.transformer import initialise

WIDTHS = {"image": 5, "text": 6}
LENGTHS = {"image": [3, 1, 0, 2, 0], "text": [1, 4, 2, 0, 0]}
"""Tokens of five items: the third lacks a picture, the fourth a text, the last both."""
Item = list[Tensor]
"""One item's tokens (T, D) for each modality, projected and typed."""


def encoder(fusion: str, widths: dict[str, int] = WIDTHS, **options: Any) -> ItemEncoder:
    torch.manual_seed(0)
    sizes = {"dim": 8, "fusion_heads": 2, "hidden": 12}
    settings = FusionSettings(**{**sizes, **options})
    built = ItemEncoder(fusion, settings, widths).double()
    initialise(built, std=0.4)
    for part in built.modules():
        if isinstance(part, nn.LayerNorm):
            nn.init.normal_(part.weight, mean=1.0, std=0.2)
            nn.init.normal_(part.bias, std=0.2)
    return built.eval()


def features(padding: float = 0.0, extra: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    by_modality = {}
    for name, width in WIDTHS.items():
        lengths = torch.tensor(LENGTHS[name])
        tokens = torch.randn(len(lengths), 4, width, generator=generator, dtype=torch.float64)
        tokens = functional.pad(tokens, (0, 0, 0, extra))
        mask = torch.arange(4 + extra) < lengths[:, None]
        by_modality[name] = torch.where(mask[..., None], tokens, padding), mask
    return by_modality


def item_tokens(model: ItemEncoder, item: int) -> Item:
    tokens = []
    for index, (name, project) in enumerate(model.inputs.items()):
        x, mask = features()[name]
        own = project(x[item][mask[item]])
        tokens.append(own if len(own) else model.absent[index][None])
    return tokens


def attention(query: Tensor, key: Tensor, value: Tensor, heads: int = 2) -> Tensor:
    width = query.shape[-1] // heads
    parts = []
    for head in range(heads):
        own = slice(head * width, (head + 1) * width)
        scores = query[:, own] @ key[:, own].T / math.sqrt(width)
        parts.append(scores.softmax(-1) @ value[:, own])
    return torch.cat(parts, dim=-1)


def block(part: Any, x: Tensor) -> Tensor:
    query, key, value = part.qkv(x).chunk(3, dim=-1)
    x = part.norm_attention(x + part.out(attention(query, key, value)))
    return Tensor(part.norm_feed(x + part.down(functional.gelu(part.up(x)))))


def vectors(fusion: Any, item: Item) -> Item:
    norms = list(fusion.norms.values())
    return [norms[m % len(norms)](tokens.mean(0)) for m, tokens in enumerate(item)]


def by_sum(fusion: Any, item: Item) -> Tensor:
    image, text = vectors(fusion, item)
    return Tensor(fusion.maps["image"](image) + fusion.maps["text"](text))


def by_concat(fusion: Any, item: Item) -> Tensor:
    return Tensor(fusion.map(torch.cat(vectors(fusion, item))))


def by_gate(fusion: Any, item: Item) -> Tensor:
    image, text = vectors(fusion, item)
    return Tensor(fusion.map(fusion.gate(text).sigmoid() * fusion.value(image)))


def by_film(fusion: Any, item: Item) -> Tensor:
    image, text = vectors(fusion, item)
    condition = fusion.condition(text)
    return Tensor(fusion.map(condition[:8] * image + condition[8:]))


def typed(fusion: Any, item: Item) -> Item:
    if fusion.types is None:
        return item
    return [tokens + fusion.types[m] for m, tokens in enumerate(item)]


def by_merge(fusion: Any, item: Item) -> Tensor:
    x = torch.cat(typed(fusion, item))
    if fusion.cls is not None:
        x = torch.cat([fusion.cls[None], x])
    for part in fusion.blocks:
        x = block(part, x)
    return x.mean(0) if fusion.cls is None else x[0]


def by_co(fusion: Any, item: Item) -> Tensor:
    image, text = typed(fusion, item)
    if len(fusion.cls):
        image = torch.cat([fusion.cls["image"][None], image])
        text = torch.cat([fusion.cls["text"][None], text])
    for layer, cross in enumerate(fusion.cross):

        def look(x: Tensor, other: Tensor, part: Any = cross) -> Tensor:
            key, value = part.key_value(other).chunk(2, dim=-1)
            return Tensor(part.norm(x + part.out(attention(part.query(x), key, value))))

        image, text = look(image, text), look(text, image)
        image = block(fusion.own[2 * layer], image)
        text = block(fusion.own[2 * layer + 1], text)
    if len(fusion.cls):
        return Tensor(fusion.map(torch.cat([image[0], text[0]])))
    return Tensor(fusion.map(torch.cat([image.mean(0), text.mean(0)])))


NAIVE: dict[str, Callable[[Any, Item], Tensor]] = {
    "sum": by_sum,
    "concat": by_concat,
    "gate": by_gate,
    "film": by_film,
    "co-attention": by_co,
    "merge-attention": by_merge,
}
CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in NAIVE),
    *((name, {"dnn": True}) for name in ("sum", "concat", "gate", "film")),
    ("sum", {"dnn": True, "dnn_relu": True}),
    ("gate", {"shared_norm": True}),
    *(("merge-attention", {"fusion_layers": layers}) for layers in (2, 4)),
    ("merge-attention", {"pool": "cls"}),
    ("merge-attention", {"token_types": False}),
    ("co-attention", {"pool": "cls", "fusion_layers": 2}),
    ("co-attention", {"token_types": False}),
]


@pytest.mark.parametrize(("fusion", "options"), CASES)
def test_a_batch_is_the_formula_item_by_item(fusion: str, options: dict[str, Any]) -> None:
    model = encoder(fusion, **options)
    with torch.no_grad():
        together = model(features()).fused_KD
        for item in range(5):
            alone = NAIVE[fusion](model.fusion, item_tokens(model, item))
            if model.dnn is not None:
                for index, layer in enumerate(model.dnn.maps):
                    alone = layer(alone)
                    alone = alone.relu() if index < 2 or options.get("dnn_relu") else alone
            torch.testing.assert_close(together[item], alone)
    assert not torch.allclose(together[2], together[4])  # something is known of one of them


@pytest.mark.parametrize(
    ("fusion", "options"), [*CASES, *((name, {}) for name in FUSIONS if name not in NAIVE)]
)
def test_padding_changes_nothing(fusion: str, options: dict[str, Any]) -> None:
    model = encoder(fusion, **options)
    with torch.no_grad():
        without = model(features()).fused_KD
        padded = model(features(padding=99.0, extra=3)).fused_KD
    torch.testing.assert_close(padded, without)


@pytest.mark.parametrize("fusion", list(FUSIONS))
def test_every_modality_that_is_there_counts(fusion: str) -> None:
    model = encoder(fusion)
    before = model(features()).fused_KD
    for name in WIDTHS:
        changed = features()
        x, mask = changed[name]
        changed[name] = (x + 1.0, mask)
        differs = ~torch.isclose(model(changed).fused_KD, before).all(-1)
        assert differs.tolist() == mask.any(-1).tolist()


def test_a_model_of_one_modality_has_nothing_to_fuse() -> None:
    model = encoder("gate", {"text": 6})
    x, mask = features()["text"]
    fused = model({"text": (x, mask)}).fused_KD
    for item in range(5):
        own = x[item][mask[item]]
        expected = model.inputs["text"](own).mean(0) if len(own) else model.absent[0]
        torch.testing.assert_close(fused[item], expected)


@pytest.mark.parametrize("fusion", list(FUSIONS))
def test_tokens_are_projected_one_by_one_only_where_attention_reads_them(fusion: str) -> None:
    model = encoder(fusion)
    seen: list[int] = []
    for part in model.inputs.values():
        part.register_forward_hook(lambda _, given, out: seen.append(given[0].shape[1]))
    model(features())
    assert seen == ([4, 4] if "attention" in fusion else [1, 1])


def test_three_modalities() -> None:
    widths = {"image": 5, "text": 6, "video": 5}
    for fusion in ("sum", "concat", "merge-attention"):
        fused = encoder(fusion, widths)({**features(), "video": features()["image"]}).fused_KD
        assert fused.shape == (5, 8)
    with pytest.raises(UserError, match=r"fusion='film'.*or merge-attention"):
        encoder("film", widths)


def test_the_dnn_as_published_has_no_negative_element() -> None:
    assert (encoder("sum", dnn=True, dnn_relu=True)(features()).fused_KD >= 0).all()
    assert (encoder("sum", dnn=True)(features()).fused_KD < 0).any()


def test_dropout_only_in_training() -> None:
    for fusion in ("merge-attention", "co-attention"):
        model = encoder(fusion, dropout=0.5)
        torch.testing.assert_close(model(features()).fused_KD, model(features()).fused_KD)
        model.train()
        assert not torch.allclose(model(features()).fused_KD, model(features()).fused_KD)
