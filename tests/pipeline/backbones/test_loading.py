"""Names and folders of backbones: what they load, and how wrong ones are refused."""

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import transformers
from huggingface_hub import constants

from features.errors import UserError
from features.warehouse import Warehouse, slug
from pipeline.backbones.base import (
    block_of,
    level_names,
    split_mask,
    split_max_tokens,
    split_pooling,
)
from pipeline.backbones.listing import list_backbones
from pipeline.backbones.loading import check_modality, load_backbone
from pipeline.backbones.registry import BACKBONES
from pipeline.extraction.job import extract_features
from pipeline.extraction.options import ExtractOptions
from tests.pipeline.backbones.checkpoints import (
    CLIP_CONFIG,
    RESNET,
    bert_folder,
    clip_folder,
    flava_folder,
    open_clip_folder,
    vision_folder,
    visualbert_folder,
)
from tests.pipeline.backbones.inputs import images, pairs
from tests.pipeline.backbones.tiny import picture, prepare


def test_a_fingerprint_is_of_the_weights_and_not_of_the_folder(clip: Path, tmp_path: Path) -> None:
    here = load_backbone(str(clip), device="cpu").checkpoint
    moved = open_clip_folder(tmp_path / "elsewhere")
    assert load_backbone(str(moved), device="cpu").checkpoint == here
    open_clip_folder(moved, seed=1)
    assert load_backbone(str(moved), device="cpu").checkpoint != here
    bert = bert_folder(tmp_path / "bert")
    first = load_backbone(str(bert), device="cpu").checkpoint
    config = json.loads((bert / "config.json").read_text())
    (bert / "config.json").write_text(json.dumps({**config, "transformers_version": "9.9"}))
    assert load_backbone(str(bert), device="cpu").checkpoint == first
    (bert / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    assert load_backbone(str(bert), device="cpu").checkpoint != first


def test_the_table_lists_itself_without_torch() -> None:
    script = (
        "import sys\nfrom pipeline.backbones.listing import list_backbones\n"
        "rows = list_backbones()\n"
        "heavy = {'torch', 'transformers', 'open_clip', 'av'} & set(sys.modules)\n"
        "assert not heavy, heavy\nprint(len(rows))\n"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=root, check=True, capture_output=True, text=True
    )
    assert int(done.stdout) == len(BACKBONES)
    rows = {row["name"]: row for row in list_backbones()}
    assert rows["hashed"]["offline"] is True
    assert rows["clip-vit-b-32"]["checkpoint"] == "ViT-B-32/openai"
    assert "CC BY-NC 4.0" in rows["mae-b-mask-50"]["note"]
    for row in rows.values():
        assert row["dim"] > 0
        assert slug(row["name"]) == row["name"]  # the folder bears the name itself


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nope", "unknown backbone 'nope'; known: hashed, clip-vit-b-32"),
        ("open_clip:ViT-B-32", "names no weights; give open_clip:ARCH/TAG"),
        ("open_clip:Zip/openai", "open_clip has no architecture 'Zip'"),
        ("open_clip:ViT-B-32/zip", r"'zip' is neither a file nor a tag of ViT-B-32 \(tags: openai"),
        ("hf:", "unknown backbone 'hf:'"),
        ("", "the name of a backbone is empty; known: hashed, clip"),
    ],
)
def test_names_that_are_wrong(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_backbone(name)


def test_folders_that_are_wrong(tmp_path: Path, clip: Path) -> None:
    def refused(folder: Path) -> str:
        with pytest.raises(UserError) as caught:
            load_backbone(str(folder), device="cpu")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "holds neither open_clip_config.json nor config.json" in refused(tmp_path)
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "open_clip_config.json").write_bytes((clip / "open_clip_config.json").read_bytes())
    assert "holds no weights" in refused(bare)  # never random weights in silence
    (bare / "open_clip_model.safetensors").write_bytes(b"no weights")
    assert "open_clip cannot load" in refused(bare)
    (bare / "open_clip_config.json").write_text("{}")
    assert "open_clip_config.json cannot be used (KeyError" in refused(bare)
    odd = open_clip_folder(tmp_path / "odd")
    config = json.loads((odd / "open_clip_config.json").read_text())
    odd_configs: list[dict[str, Any]] = [{"model_cfg": []}, {"preprocess_cfg": {"mean": "x"}}]
    for wrong in odd_configs:
        (odd / "open_clip_config.json").write_text(json.dumps({**config, **wrong}))
        assert f"open_clip cannot load {odd}" in refused(odd)
    encoder = tmp_path / "t5"
    config = transformers.T5Config(
        vocab_size=57, d_model=16, d_kv=8, num_layers=1, num_heads=2, d_ff=16
    )
    transformers.T5Model(config).save_pretrained(encoder)
    assert "an encoder-decoder gives no single vector" in refused(encoder)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: _cut(folder / "config.json"), "not a valid JSON file"),
        (lambda folder: (folder / "config.json").write_text("[]"), "Unrecognized model"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no file named model.safetensors"),
        (lambda folder: _cut(folder / "model.safetensors"), "SafetensorError"),
        (lambda folder: _cut(folder / "tokenizer.json"), "JSONDecodeError"),
        (lambda folder: (folder / "modules.json").write_text("[1]"), "TypeError"),
        (lambda folder: [path.unlink() for path in folder.glob("*[vt]o*")], "has no vocabulary"),
    ],
)
def test_damaged_folders_of_transformers(
    tmp_path: Path, spoil: Callable[[Path], object], message: str
) -> None:
    folder = bert_folder(tmp_path / "bert")
    spoil(folder)
    with pytest.raises(UserError, match=f"transformers cannot load {folder} .*{message}") as no:
        load_backbone(str(folder), device="cpu")
    assert "\n" not in str(no.value)


@pytest.mark.parametrize("kind", ["bert", "vision", "clip"])
def test_shards_out_of_the_folder_are_refused(tmp_path: Path, kind: str) -> None:
    make = {"bert": bert_folder, "vision": vision_folder, "clip": clip_folder}[kind]
    folder = make(tmp_path / "checkpoint")
    (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
    index = {"metadata": {}, "weight_map": {"a": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"index.json.*\.\./model.safetensors.*out of the folder"):
        load_backbone(str(folder), device="cpu")


def test_code_beside_the_weights_is_neither_run_nor_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*_: object) -> str:
        pytest.fail("the user was asked whether to run it")

    monkeypatch.setattr("builtins.input", asked)
    folder = bert_folder(tmp_path / "bert")
    target = tmp_path / "must-not-appear"
    (folder / "mine.py").write_text(f"import os\nos.mkdir({str(target)!r})\nclass C: ...\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.C", "AutoModel": "mine.C"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="contains custom code"):
        load_backbone(str(folder), device="cpu")
    assert not target.exists()


class Attack:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.target),))


def _pickle(what: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(what))


def test_a_pickle_among_the_weights_is_not_executed(clip: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "open_clip_config.json").write_bytes((clip / "open_clip_config.json").read_bytes())
    target = tmp_path / "must-not-appear"
    torch.save({"state_dict": Attack(target)}, folder / "open_clip_pytorch_model.bin")
    with pytest.raises(UserError, match="open_clip cannot load"):
        load_backbone(str(folder), device="cpu")
    assert not target.exists()
    bert = bert_folder(tmp_path / "bert")
    (bert / "model.safetensors").unlink()
    for write in (torch.save, _pickle):
        write(Attack(target), bert / "pytorch_model.bin")
        with pytest.raises(UserError, match=r"transformers cannot load .*UnpicklingError"):
            load_backbone(str(bert), device="cpu")
        assert not target.exists()
    torch.load(folder / "open_clip_pytorch_model.bin", weights_only=False)
    assert target.exists()  # it would have worked


def test_a_wrong_pairing_is_refused_by_name(warehouse: Warehouse, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'bert' takes text, not image"):
        check_modality("bert", "image")
    folder = bert_folder(tmp_path / "my-bert")
    picture(tmp_path / "raw" / "a.png", 0)
    prepare(warehouse, tmp_path / "raw", ids=["a"], image=["a.png"], text=["a"])
    with pytest.raises(UserError, match=r"'.*my-bert' takes text, not image; for --image give one"):
        extract_features(warehouse, "tiny", ExtractOptions(image=str(folder), device="cpu"))


def test_a_device_that_is_not_there(clip: Path) -> None:
    with pytest.raises(UserError, match="device 'cuda:99' cannot be used here"):
        load_backbone(str(clip), device="cuda:99")


def test_levels_and_poolings_have_names() -> None:
    assert level_names(2) == ("pooled", "tokens", "layer-0", "layer-1")
    assert level_names(0) == ("pooled", "tokens")
    assert [block_of(level) for level in ("tokens", "layer-0", "layer-11")] == [None, 0, 11]
    assert split_mask("a@mean@mask-75") == ("a@mean", 75)
    assert split_max_tokens("a@30") == ("a", 30)
    for ending in ("", "x", "9" * 5000):  # int takes no more than 4,300 digits
        assert split_mask(f"a@mask-{ending}") == (f"a@mask-{ending}", None)
        assert split_max_tokens(f"a@{ending}") == (f"a@{ending}", None)
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


@pytest.mark.parametrize("url", ["https://hf.co/a/b", "http://x.org//c?d=1", "s3://bucket/model"])
def test_a_url_is_not_a_backbone(url: str) -> None:
    with pytest.raises(UserError, match="unknown backbone") as refusal:
        load_backbone(url)
    assert repr(url) in str(refusal.value)
    assert "hf:ORG/NAME" in str(refusal.value)


def test_a_very_long_name_is_shortened() -> None:
    with pytest.raises(UserError, match="unknown backbone") as refusal:
        load_backbone("a" * 3000)
    assert "characters left out" in str(refusal.value)
    assert len(str(refusal.value)) < 2000
