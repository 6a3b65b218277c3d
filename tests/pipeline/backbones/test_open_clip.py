"""Models of open_clip, against the library's own functions."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from features.errors import UserError
from features.warehouse import slug
from pipeline.backbones.loading import load_backbone
from tests.pipeline.backbones.checkpoints import (
    CLIP_CONFIG,
)
from tests.pipeline.backbones.inputs import pictures
from tests.pipeline.backbones.references import LONG_TEXTS, close, images_of, texts_of


def test_open_clip_folder_equals_a_bare_loop(clip: Path) -> None:
    ours = load_backbone(str(clip), device="cpu")
    assert (ours.name, ours.dim) == ("My CLIP", 24)
    assert ours.modalities == ("image", "text", "video", "joint")
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{clip}")
    model.eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{clip}")
    with torch.inference_mode():
        images = torch.cat([model.encode_image(transform(one)[None]) for one in pictures()])
        texts = model.encode_text(tokenizer(LONG_TEXTS))
    assert close(images_of(ours), images)
    assert close(texts_of(ours), texts)
    assert [len(ids) for ids in ours.texts(["a red shoe", "words " * 90])] == [5, 77]
    assert "0.5/0.4/0.3" in ours.preprocessing("image")


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("text_cfg", "hf_model_name", "../other"),
        ("text_cfg", "hf_model_name", "/tmp/other"),
        ("text_cfg", "hf_model_name", "a/../../other"),
        ("text_cfg", "hf_model_name", "~/other"),
        ("vision_cfg", "timm_model_name", "local-dir:/tmp/other"),
        ("vision_cfg", "timm_model_name", "hf-hub:someone/model"),
    ],
)
def test_a_configuration_that_leads_outside_its_folder_is_refused(
    clip: Path, tmp_path: Path, section: str, key: str, value: str
) -> None:
    folder = tmp_path / "clip"
    shutil.copytree(clip, folder)
    path = folder / "open_clip_config.json"
    document = json.loads(path.read_text())
    document["model_cfg"].setdefault(section, {})[key] = value
    path.write_text(json.dumps(document))
    with pytest.raises(UserError, match=rf"{re.escape(value)}.*{key}"):
        load_backbone(str(folder), device="cpu")


def test_other_text_towers_keep_what_they_look_at(tmp_path: Path) -> None:
    """One that looks both ways sees its padding; one of its own class has other names inside."""
    both_ways = {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    for name, text, custom in [
        ("custom", both_ways, True),
        ("bidirectional", {**both_ways, "no_causal_mask": True, "pool_type": "last"}, True),
    ]:
        config = {**json.loads(json.dumps(CLIP_CONFIG)), "text_cfg": text}
        folder = tmp_path / name
        folder.mkdir()
        torch.manual_seed(0)
        made = open_clip.model.CustomTextCLIP(**json.loads(json.dumps(config)))
        save_file(made.state_dict(), folder / "open_clip_model.safetensors")
        document = {"model_cfg": {**config, "custom_text": custom}, "preprocess_cfg": {}}
        (folder / "open_clip_config.json").write_text(json.dumps(document))
        ours = load_backbone(str(folder), device="cpu")
        tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
        with torch.inference_mode():
            theirs = made.eval().encode_text(tokenizer(LONG_TEXTS))
        assert close(texts_of(ours), theirs)
        lengths = [len(ids) for ids in ours.texts(["a", "b c"])]
        assert lengths == ([3, 4] if name == "custom" else [12, 12])


def test_an_architecture_with_a_file_of_weights(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from open_clip import factory

    monkeypatch.setitem(factory._MODEL_CONFIGS, "Tiny", CLIP_CONFIG)
    weights = tmp_path / "epoch_7.safetensors"
    weights.write_bytes((clip / "open_clip_model.safetensors").read_bytes())
    ours = load_backbone(f"open_clip:Tiny/{weights}", device="cpu")
    assert ours.name == "open_clip:Tiny/epoch_7"
    assert slug(ours.name) == "open_clip-tiny-epoch_7"
    assert (texts_of(ours) == texts_of(load_backbone(str(clip), device="cpu"))).all()
    torch.save(load_file(weights), tmp_path / "epoch_7.pt")
    again = load_backbone(f"open_clip:Tiny/{tmp_path / 'epoch_7.pt'}", device="cpu")
    assert again.checkpoint == ours.checkpoint  # the same weights in another kind of file


def test_openai_weights_get_the_activation_they_were_trained_with(
    clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import open_clip as lib
    from open_clip import factory

    from pipeline.backbones import open_clip as module

    monkeypatch.setitem(factory._MODEL_CONFIGS, "Tiny", CLIP_CONFIG)
    known = {"hf_hub": "org/tiny/", "quick_gelu": True, "mean": (0.1, 0.2, 0.3)}
    monkeypatch.setattr(lib, "get_pretrained_cfg", lambda arch, tag: known)
    monkeypatch.setattr(
        module, "_download", lambda *given: str(clip / "open_clip_model.safetensors")
    )
    quick = module.from_tag("quick", "Tiny", "openai", "cpu", "float32")
    plain = load_backbone(str(clip), device="cpu")
    assert "mean 0.1/0.2/0.3" in quick.preprocessing("image")
    assert np.abs(texts_of(quick) - texts_of(plain)).max() > 1e-4
    assert quick.checkpoint != plain.checkpoint  # same weights, other meaning
    model = lib.create_model("Tiny", force_quick_gelu=True)
    model.load_state_dict(load_file(clip / "open_clip_model.safetensors"))
    with torch.inference_mode():
        theirs = model.eval().encode_text(lib.tokenize(LONG_TEXTS))
    assert close(texts_of(quick), theirs)


def test_bfloat16_is_near_and_says_so(clip: Path) -> None:
    low = load_backbone(str(clip), device="cpu", compute="bfloat16")
    full = load_backbone(str(clip), device="cpu")
    assert (low.compute, full.compute) == ("bfloat16", "float32")
    difference = np.abs(texts_of(low) - texts_of(full)).max()
    assert 0 < difference < 0.05
