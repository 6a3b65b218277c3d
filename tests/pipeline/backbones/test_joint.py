"""Models that see an image and a text together, against the library's own forward passes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from features.errors import UserError
from pipeline.backbones.loading import check_modality, load_backbone
from pipeline.backbones.visualbert import PartSource, VisualBert
from tests.pipeline.backbones.checkpoints import (
    RESNET,
    clip_folder,
    flava_folder,
    vilt_folder,
    vision_folder,
    visualbert_folder,
)
from tests.pipeline.backbones.inputs import TEXTS, images, pairs, pictures, texts
from tests.pipeline.backbones.references import (
    check_levels,
    library,
    near,
    processor_of,
    tokenizer_of,
)


def check_joint_poolings(folder: Path, outputs: list[Any]) -> None:
    for suffix, theirs in {
        "": [one.last_hidden_state[0, 0] for one in outputs],
        "@cls": [one.last_hidden_state[0, 0] for one in outputs],
        "@mean": [one.last_hidden_state[0].mean(0) for one in outputs],
        "@own": [one.pooler_output[0] for one in outputs],
    }.items():
        chosen = load_backbone(f"{folder}{suffix}", device="cpu")
        assert near(chosen.embed(pairs(chosen)), torch.stack(theirs))


def test_flava(tmp_path: Path) -> None:
    folder = flava_folder(tmp_path / "flava")
    ours = load_backbone(str(folder), device="cpu")
    assert set(ours.modalities) == {"image", "video", "text", "joint"}
    model, prepare, words = library(folder), processor_of(folder), tokenizer_of(folder)

    def bare(i: int) -> Any:
        pixels = prepare(images=pictures()[i], return_tensors="pt")
        return model(**pixels, **words(TEXTS[i], return_tensors="pt"))

    def joint(i: int) -> Any:
        whole = bare(i)
        # The library does not list the states of its third encoder: once more, from its inputs.
        seen = model.image_to_mm_projection(whole.image_output.hidden_states[-1])
        read = model.text_to_mm_projection(whole.text_output.hidden_states[-1])
        again = model.multimodal_model(torch.cat([seen, read], 1), output_hidden_states=True)
        assert near(again.last_hidden_state, whole.multimodal_output.last_hidden_state)
        return again

    check_levels(ours, images(ours), lambda i: bare(i).image_output, levels=4)
    check_levels(ours, texts(ours), lambda i: bare(i).text_output, levels=4)
    check_levels(ours, pairs(ours), joint, levels=4)
    with torch.inference_mode():
        outputs = [bare(i) for i in range(4)]
    check_joint_poolings(folder, [one.multimodal_output for one in outputs])
    for batch, name in ((images(ours), "image_embeddings"), (texts(ours), "text_embeddings")):
        assert near(ours.embed(batch), torch.stack([one[name][0, 0] for one in outputs]))


def test_vilt(tmp_path: Path) -> None:
    folder = vilt_folder(tmp_path / "vilt")
    ours = load_backbone(str(folder), device="cpu")
    assert ours.modalities == ("joint",)
    model, prepare, words = library(folder), processor_of(folder), tokenizer_of(folder)
    embed = model.embeddings.visual_embed

    def in_reading_order(x: Any, mask: Any, max_image_length: int = -1) -> Any:
        """What the library does, less its drawing of lots over the order of the patches."""
        seen, kept, (place, (high, wide)) = embed(x, mask, max_image_length)
        order = (place[..., 0] * wide + place[..., 1])[0].argsort()
        assert kept.all()
        seen[:, 1:] = seen[:, 1:][:, order]
        return seen, kept, (place[:, order], (high, wide))

    def bare(i: int) -> Any:
        model.embeddings.visual_embed = in_reading_order
        pixels = prepare(images=pictures()[i], return_tensors="pt")
        words_of = words(TEXTS[i], return_tensors="pt")
        return model(**pixels, **words_of, output_hidden_states=True)

    torch.manual_seed(7)
    before = torch.get_rng_state()
    check_levels(ours, pairs(ours), bare, levels=4)
    shapes = {tuple(one.shape) for one in ours.tokens(pairs(ours), "tokens")}
    assert len(shapes) == 4  # pictures keep their shapes
    torch.set_rng_state(before)
    ours.embed(pairs(ours))
    assert (torch.get_rng_state() == before).all()
    with torch.inference_mode():
        outputs = [bare(i) for i in range(4)]
    check_joint_poolings(folder, outputs)
    with pytest.raises(UserError, match="'vilt' takes joint, not text; for --text give one of"):
        check_modality("vilt", "text")


@pytest.mark.parametrize("eyes", ["ResNet", "ViT"])
def test_visualbert(tmp_path: Path, eyes: str) -> None:
    grid_of = eyes == "ResNet"
    folder = visualbert_folder(tmp_path / "visualbert", width=16 if grid_of else 32)
    with pytest.raises(UserError, match=r"no folder 'vision' with .* and no 'detector\.pth'"):
        load_backbone(str(folder), device="cpu")
    looks = vision_folder(folder / "vision", kind=eyes, **(RESNET if grid_of else {}))
    ours = load_backbone(str(folder), device="cpu")
    assert (ours.modalities, ours.input_size) == (("joint",), 32)
    model, prepare, words = library(folder), processor_of(looks), tokenizer_of(folder)
    vision = library(looks)

    def bare(i: int) -> Any:
        seen = vision(**prepare(images=pictures()[i], return_tensors="pt")).last_hidden_state
        parts = seen.flatten(2).transpose(1, 2) if grid_of else seen[:, 1:]
        inputs = words(TEXTS[i], return_tensors="pt")
        return model(**inputs, visual_embeds=parts, output_hidden_states=True)

    check_levels(ours, pairs(ours), bare, levels=4)
    with torch.inference_mode():
        outputs = [bare(i) for i in range(4)]
    check_joint_poolings(folder, outputs)
    first = ours.checkpoint
    vision_folder(looks, kind=eyes, seed=1, **(RESNET if grid_of else {}))
    assert load_backbone(str(folder), device="cpu").checkpoint != first
    visualbert_folder(folder, width=48)
    width = 16 if grid_of else 32
    with pytest.raises(UserError, match=rf"width 48.* width {width}"):
        load_backbone(str(folder), device="cpu")


@pytest.mark.parametrize(("level", "state"), [("tokens", 2), ("layer-0", 0), ("layer-1", 1)])
@pytest.mark.parametrize("kind", ["CLIP", "ViT", "Siglip"])
def test_visualbert_over_patches_of_a_level(
    tmp_path: Path, kind: str, level: str, state: int
) -> None:
    folder = visualbert_folder(tmp_path / "visualbert", width=32)
    both = kind != "ViT"
    looks = clip_folder(tmp_path / kind, kind=kind) if both else vision_folder(tmp_path / kind)
    parts = PartSource(path=looks, level=level)
    ours = VisualBert("visualbert", folder, "cpu", "float32", parts=parts)
    vision = library(looks).vision_model if both else library(looks)
    model, prepare, words = library(folder), processor_of(looks), tokenizer_of(folder)
    described = "tokens of its last layer" if level == "tokens" else "block"
    assert described in ours.preprocessing("joint")

    def bare(i: int) -> Any:
        pixels = prepare(images=pictures()[i], return_tensors="pt")
        seen = vision(**pixels, output_hidden_states=True)
        patches = seen.last_hidden_state if level == "tokens" else seen.hidden_states[state]
        patches = patches[:, kind != "Siglip" :]  # without the class token
        inputs = words(TEXTS[i], return_tensors="pt")
        return model(**inputs, visual_embeds=patches, output_hidden_states=True)

    assert ours.tokens(pairs(ours), "tokens")[1].shape[0] == len(words("x")["input_ids"]) + 16
    check_levels(ours, pairs(ours), bare, levels=4)
