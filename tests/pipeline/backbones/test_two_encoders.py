"""Models with an encoder of images and one of texts: levels and pairs."""

from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch

from features.errors import UserError
from pipeline.backbones.loading import load_backbone
from tests.pipeline.backbones.checkpoints import (
    clip_folder,
    open_clip_folder,
    siglip_folder,
)
from tests.pipeline.backbones.inputs import TEXTS, images, pairs, pictures, texts
from tests.pipeline.backbones.references import (
    check_levels,
    grid,
    library,
    near,
    processor_of,
    tokenizer_of,
)


@pytest.mark.parametrize("kind", ["CLIP", "Siglip", "GroupViT"])
def test_tokens_of_two_towers(tmp_path: Path, kind: str) -> None:
    folder = clip_folder(tmp_path / kind, kind=kind)
    ours = load_backbone(str(folder), device="cpu")
    model, prepare, words = library(folder), processor_of(folder), tokenizer_of(folder)

    def seen(i: int) -> Any:
        pixels = prepare(images=pictures()[i], return_tensors="pt")
        return model.vision_model(**pixels, output_hidden_states=True)

    def read(i: int) -> Any:
        given = {"padding": "max_length", "max_length": 40} if kind == "Siglip" else {}
        inputs = words(TEXTS[i], truncation=True, return_tensors="pt", **given)
        real = int(inputs["attention_mask"].sum())
        if kind == "Siglip":  # trained on padding, without a mask
            del inputs["attention_mask"]
        del inputs["token_type_ids"]
        output = model.text_model(**inputs, output_hidden_states=True)
        output.last_hidden_state = output.last_hidden_state[:, :real]
        output.hidden_states = tuple(one[:, :real] for one in output.hidden_states)
        return output

    # GroupViT's images have three stages.
    check_levels(ours, images(ours), seen, levels=5 if kind == "GroupViT" else 4)
    check_levels(ours, texts(ours), read, levels=4)
    image, text = ours.embed(images(ours)), ours.embed(texts(ours))
    unit = [one / np.linalg.norm(one, axis=1, keepdims=True) for one in (image, text)]
    assert near(ours.embed(pairs(ours)), (unit[0] + unit[1]) / 2)
    assert "mean of the picture's and the text's features" in ours.pooling("joint")
    assert ours.levels("joint") == ("pooled",)
    assert ";" in ours.preprocessing("joint")
    with pytest.raises(UserError, match="pooling of its own; after the @ give own"):
        load_backbone(f"{folder}@mean", device="cpu")
    assert load_backbone(f"{folder}@own", device="cpu").name == f"{kind}@own"


def test_tokens_of_open_clip(tmp_path: Path) -> None:
    folder = open_clip_folder(tmp_path / "clip")
    ours = load_backbone(str(folder), device="cpu")
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    model.eval()
    words = open_clip.get_tokenizer(f"local-dir:{folder}")
    assert ours.levels("image") == ours.levels("text") == ("pooled", "tokens", "layer-0", "layer-1")
    assert (ours.token_dim("tokens", "image"), ours.token_dim("layer-1", "text")) == (32, 16)
    for i, one in enumerate(pictures()):
        with torch.inference_mode():
            found = model.visual.forward_intermediates(
                transform(one)[None], output_fmt="NLC", output_extra_tokens=True
            )
            parts = zip(
                found["image_intermediates_prefix"], found["image_intermediates"], strict=True
            )
            first, last = (torch.cat(part, dim=1) for part in parts)
            last = model.visual.ln_post(last)
            pooled = last[0, 0] @ model.visual.proj
        assert near(ours.tokens(images(ours), "layer-1")[i], first[0])
        assert near(ours.tokens(images(ours), "tokens")[i], last[0])
        assert near(ours.embed(images(ours))[i], pooled)
    lengths = [len(one) for one in ours.texts(TEXTS)]
    ids = words(TEXTS)
    with torch.inference_mode():
        x = model.token_embedding(ids) + model.positional_embedding
        embedded = x
        first = model.transformer.resblocks[0](x, attn_mask=model.attn_mask)
        last = model.ln_final(model.transformer(x, attn_mask=model.attn_mask))
    for level, states in (("layer-0", embedded), ("layer-1", first), ("tokens", last)):
        for i, tokens in enumerate(ours.tokens(texts(ours), level)):
            assert near(tokens, states[i, : lengths[i]])
    unit = [
        one / np.linalg.norm(one, axis=1, keepdims=True)
        for one in (ours.embed(images(ours)), ours.embed(texts(ours)))
    ]
    assert near(ours.embed(pairs(ours)), (unit[0] + unit[1]) / 2)
    with pytest.raises(UserError, match="pooling of its own; after the @ give own"):
        load_backbone(f"{folder}@cls", device="cpu")


def test_a_resnet_of_open_clip_shows_its_grid(tmp_path: Path) -> None:
    tower = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8}
    folder = open_clip_folder(tmp_path / "rn", vision_cfg=tower)
    ours = load_backbone(str(folder), device="cpu")
    assert ours.levels("image") == ("pooled", "tokens")
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    model.eval()
    for one, cells in zip(pictures(), ours.tokens(images(ours), "tokens"), strict=True):
        with torch.inference_mode():
            visual = model.visual
            x = visual.stem(transform(one)[None])
            x = visual.layer4(visual.layer3(visual.layer2(visual.layer1(x))))
        assert cells.shape == (4, 256) == (4, ours.token_dim("tokens", "image"))
        assert near(cells, grid(x[0]))


def test_tokens_of_siglip_in_open_clip(tmp_path: Path) -> None:
    folder = siglip_folder(tmp_path / "siglip")
    ours = load_backbone(str(folder), device="cpu")
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    model.eval()
    words = open_clip.get_tokenizer(f"local-dir:{folder}")
    trunk = model.visual.trunk
    assert len(ours.levels("image")) == 2 + len(trunk.blocks)
    with torch.inference_mode():
        pixels = torch.cat([transform(one)[None] for one in pictures()])
        assert near(ours.embed(images(ours)), model.encode_image(pixels))
        assert near(ours.embed(texts(ours)), model.encode_text(words(TEXTS)))
        last = trunk.forward_features(pixels)
        second = trunk.forward_intermediates(
            pixels, indices=[1], intermediates_only=True, output_fmt="NLC", norm=False,
            return_prefix_tokens=True,
        )[0]  # fmt: skip
        second = torch.cat([second[1], second[0]], dim=1)
        x, mask = model.text._embeds(words(TEXTS))
        first = model.text.transformer.resblocks[0](x, attn_mask=mask)
    assert near(np.stack(ours.tokens(images(ours), "tokens")), last)
    assert near(np.stack(ours.tokens(images(ours), "layer-2")), second)
    real = [len(words.tokenizer(text.strip())["input_ids"]) for text in TEXTS]
    for i, tokens in enumerate(ours.tokens(texts(ours), "layer-1")):
        assert near(tokens, first[i, : real[i]])  # all 24 were attended to, the padding is left out
