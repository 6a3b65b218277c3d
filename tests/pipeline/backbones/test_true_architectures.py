"""Short names with their true architectures and random weights, out of the hub's cache.

What the table says of a backbone is what the library builds, and its vectors and tokens are the
library's own. The other names are of families that are tested at a small size elsewhere.
"""

import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import tokenizers
import torch
import transformers
from huggingface_hub import constants
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.model import CLIP
from PIL import Image
from safetensors.torch import save_file

from pipeline.backbones import patch_masking
from pipeline.backbones.base import InputBatch
from pipeline.backbones.loading import load_backbone
from pipeline.backbones.registry import BACKBONES
from tests.pipeline.backbones.inputs import pictures

pytestmark = pytest.mark.heavy

IMAGENET: dict[str, Any] = {
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}
State = dict[str, torch.Tensor]
Place = Callable[[str], Path]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """Where the hub's cache keeps a repository; half a gigabyte that does not stay."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def place(repository: str) -> Path:
        folder = tmp_path / f"models--{repository.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("abc")
        (folder / "snapshots" / "abc").mkdir(parents=True)
        return folder / "snapshots" / "abc"

    yield place
    shutil.rmtree(tmp_path)


def weights(model: torch.nn.Module) -> State:
    """Random weights for a model that was built without any; signals keep their size."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(1_000_003, generator=generator) * 2 - 1  # a prime: no two rows are alike
    state = {}
    for name, empty in model.state_dict().items():
        if not empty.is_floating_point():
            state[name] = torch.zeros(empty.shape, dtype=empty.dtype)
            continue
        start = len(name) % 97
        values = noise[start:].repeat(empty.numel() // 900_000 + 1)[: empty.numel()]
        wide = empty.ndim > 1
        size = math.sqrt(3 / max(1, empty[0].numel())) if wide else 0.1
        one = not wide and name.endswith(("weight", "var"))
        state[name] = values.mul(size).add_(float(one)).view(empty.shape)
    return state


def save(folder: Path, config: Any) -> Any:
    """Save a transformers model of this configuration; give the library's own."""
    with torch.device("meta"):
        model: Any = transformers.AutoModel.from_config(config)  # type: ignore[no-untyped-call]
    save_file(weights(model), folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    return transformers.AutoModel.from_pretrained(folder).eval()


def near(ours: Any, theirs: torch.Tensor) -> None:
    theirs_np = theirs.numpy()
    assert ours.shape == theirs_np.shape
    assert theirs_np.std() > 1e-3
    assert np.abs(ours - theirs_np).max() < 1e-4 * max(1.0, np.abs(theirs_np).max())


VISION: list[tuple[str, Any, Any, tuple[int, int]]] = [
    # name, configuration, processor as the checkpoint's, shape of the tokens
    ("vit-b-16", transformers.ViTConfig(), transformers.ViTImageProcessor(), (197, 768)),
    (
        "swin-t",
        transformers.SwinConfig(),
        transformers.ViTImageProcessor(resample=3, **IMAGENET),
        (49, 768),
    ),
    (
        "mae-b-mask-75",
        transformers.ViTMAEConfig(),
        transformers.ViTImageProcessor(**IMAGENET),
        (50, 768),
    ),
    (
        "resnet-50",
        transformers.ResNetConfig(),
        transformers.ConvNextImageProcessor(
            size={"shortest_edge": 224}, crop_pct=0.875, resample=3, **IMAGENET
        ),
        (49, 2048),
    ),
    (  # the positions of 518 pixels, interpolated to 224; a sixteenth of the width
        "dinov2-b",
        transformers.Dinov2Config(
            hidden_size=48, num_attention_heads=3, image_size=518, patch_size=14
        ),
        transformers.BitImageProcessor(
            size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224}, **IMAGENET
        ),
        (257, 48),
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "config", "processor", "shape"), VISION, ids=[one[0] for one in VISION]
)
def test_pictures(
    cache: Place, name: str, config: Any, processor: Any, shape: tuple[int, int]
) -> None:
    entry = BACKBONES[name]
    folder = cache(entry.hub)
    bare = save(folder, config)
    processor.save_pretrained(folder)
    ours = load_backbone(name, device="cpu")
    assert (ours.modalities, ours.blocks) == (entry.modalities, entry.blocks)
    assert ours.dim == (entry.dim if name != "dinov2-b" else shape[1])
    shots = pictures()[:1]
    batch = InputBatch(images=[ours.image(one) for one in shots])
    more: dict[str, Any] = {}
    if name == "mae-b-mask-75":
        more["noise"] = patch_masking.noise(batch.images, 196, 0.75)
        assert bare.config.mask_ratio == 0.75
    with torch.inference_mode():
        pixels = processor(images=shots, return_tensors="pt")
        output = bare(**pixels, **more, output_hidden_states=True)
    last = output.last_hidden_state
    if last.ndim == 4:
        near(np.stack(ours.tokens(batch, "tokens")), last.flatten(2).transpose(1, 2))
        near(ours.embed(batch), last.mean((2, 3)))
    else:
        near(np.stack(ours.tokens(batch, "tokens")), last)
        near(np.stack(ours.tokens(batch, "layer-3")), output.hidden_states[3])
        near(ours.embed(batch), last.mean(1) if name == "swin-t" else last[:, 0])
    assert ours.tokens(batch, "tokens")[0].shape == shape


@pytest.mark.slow
def test_roberta(cache: Place) -> None:
    entry = BACKBONES["roberta"]
    folder = cache(entry.hub)
    bare = save(
        folder,
        transformers.RobertaConfig(
            vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5
        ),
    )
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words = {word: i for i, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", *letters])}
    words["<mask>"] = len(words)
    transformers.RobertaTokenizer(vocab=words, merges=[], model_max_length=512).save_pretrained(
        folder
    )
    ours = load_backbone("roberta", device="cpu")
    assert (ours.modalities, ours.dim, ours.blocks) == (("text",), entry.dim, entry.blocks)
    texts = ["red", "a longer title: größer"]
    ids = ours.texts(texts)
    assert [len(one) for one in ids] == [5, len(texts[1].encode()) + 2]  # bytes between the ends
    assert all((one[0], one[-1]) == (0, 2) for one in ids)
    assert ids[0][1] == words["r"]
    assert len(ours.texts(["x" * 600])[0]) == 512
    batch = InputBatch(texts=ids)
    tokens, third = ours.tokens(batch, "tokens"), ours.tokens(batch, "layer-3")
    pooled = ours.embed(batch)
    for i, one in enumerate(ids):
        with torch.inference_mode():  # alone: without padding and without a mask
            output = bare(torch.from_numpy(one)[None], output_hidden_states=True)
        near(tokens[i], output.last_hidden_state[0])
        near(third[i], output.hidden_states[3][0])
        near(pooled[i], output.last_hidden_state[0].mean(0))


@pytest.mark.slow
def test_clip(cache: Place) -> None:
    entry = BACKBONES["clip-vit-b-32"]
    config = open_clip.get_model_config("ViT-B-32")
    with torch.device("meta"):
        bare = CLIP(**config, quick_gelu=True)
    state = weights(bare)
    save_file(state, cache(entry.hub) / "open_clip_model.safetensors")
    bare.load_state_dict(state, assign=True)
    bare.attn_mask = torch.full((77, 77), -torch.inf).triu(1)
    bare.eval()
    ours = load_backbone("clip-vit-b-32", device="cpu")
    assert (ours.modalities, ours.dim, ours.blocks) == (entry.modalities, 512, 12)
    transform = open_clip.image_transform(
        224, is_train=False, mean=OPENAI_DATASET_MEAN, std=OPENAI_DATASET_STD
    )
    shots, texts = pictures()[:2], ["a red shoe", "x"]
    with torch.inference_mode():
        seen = bare.encode_image(torch.stack([transform(one) for one in shots]))
        read = bare.encode_text(open_clip.tokenize(texts))
    batch = InputBatch(images=[ours.image(one) for one in shots])
    near(ours.embed(batch), seen)
    assert ours.tokens(batch, "layer-11")[0].shape == (50, 768)
    near(ours.embed(InputBatch(texts=ours.texts(texts))), read)
    both = InputBatch(images=batch.images, texts=ours.texts(texts))
    unit = torch.nn.functional.normalize
    near(ours.embed(both), (unit(seen, dim=-1) + unit(read, dim=-1)) / 2)


def test_the_second_token_of_deit_is_no_patch(tmp_path: Path) -> None:
    config = transformers.DeiTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    tmp_path.joinpath("deit").mkdir()
    bare = save(tmp_path / "deit", config)
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path / "deit")
    ours = load_backbone(f"{tmp_path / 'deit'}@mean", device="cpu")
    shot = Image.new("RGB", (40, 40), "red")
    with torch.inference_mode():
        output = bare(**processor(images=shot, return_tensors="pt"))
    near(ours.embed(InputBatch(images=[ours.image(shot)])), output.last_hidden_state[:, 2:].mean(1))
