"""Models of sentence-transformers, against the library's own ``encode``."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import constants

from features.errors import UserError
from pipeline.backbones.base import InputBatch, UnavailableError
from pipeline.backbones.loading import load_backbone
from tests.pipeline.backbones.checkpoints import cached_folder, sentence_folder
from tests.pipeline.backbones.inputs import TEXTS
from tests.pipeline.backbones.references import LONG_TEXTS, check_levels, library, tokenizer_of

sentence_transformers = pytest.importorskip(
    "sentence_transformers", reason="the extra offline is not installed"
)


def encoded(folder: Path, **options: Any) -> Any:
    model = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    return model.encode(LONG_TEXTS, show_progress_bar=False, **options)


@pytest.mark.parametrize(
    ("options", "dim"),
    [
        ({}, 32),
        ({"mode": "cls"}, 32),
        ({"mode": "weightedmean"}, 32),
        ({"dense": 12}, 12),
        ({"prompts": {"item": "item: "}, "default_prompt_name": "item"}, 32),
    ],
    ids=["mean", "cls", "weightedmean", "dense", "prompt"],
)
def test_vectors_equal_the_encode_of_the_library(
    tmp_path: Path, options: dict[str, Any], dim: int
) -> None:
    folder = sentence_folder(tmp_path / "sentence", **options)
    ours = load_backbone(f"sentence-transformers:{folder}", device="cpu")
    assert (ours.name, ours.dim) == ("sentence-transformers:sentence", dim)
    assert (ours.modalities, ours.blocks) == (("text",), 2)
    theirs = encoded(folder)
    vectors = ours.embed(InputBatch(texts=ours.texts(LONG_TEXTS)))
    assert float(np.ptp(theirs, axis=0).max()) > 1e-3
    assert np.abs(vectors - theirs).max() < 1e-6  # of unit length
    assert ("item: " in ours.preprocessing("text")) == ("prompts" in options)
    assert "at most 24 tokens" in ours.preprocessing("text")
    assert ("Dense" in ours.pooling("text")) == ("dense" in options)


def test_levels_are_those_of_the_transformer(tmp_path: Path) -> None:
    folder = sentence_folder(tmp_path / "sentence")
    ours = load_backbone(f"sentence-transformers:{folder}", device="cpu")
    model, tokenizer = library(folder), tokenizer_of(folder)

    def bare(i: int) -> Any:
        inputs = tokenizer(TEXTS[i], truncation=True, max_length=24, return_tensors="pt")
        return model(**inputs, output_hidden_states=True)

    check_levels(ours, InputBatch(texts=ours.texts(TEXTS)), bare, levels=4)


def test_weights_in_the_cache_are_found_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name, repository in {"tiny": "sentence-transformers/tiny", "org/tiny": "org/tiny"}.items():
        with pytest.raises(UnavailableError, match=rf"{repository}.*; give a local folder"):
            load_backbone(f"sentence-transformers:{name}")
        folder = cached_folder(tmp_path, repository)
        sentence_folder(folder)
        ours = load_backbone(f"sentence-transformers:{name}", device="cpu")
        assert ours.name == f"sentence-transformers:{name}"


def test_a_checkpoint_is_its_weights_and_its_modules(tmp_path: Path) -> None:
    folders = {
        "first": sentence_folder(tmp_path / "first"),
        "moved": sentence_folder(tmp_path / "moved"),
        "cls": sentence_folder(tmp_path / "cls", mode="cls"),
        "other": sentence_folder(tmp_path / "other", seed=1),
    }
    checkpoints = {
        name: load_backbone(f"sentence-transformers:{folder}", device="cpu").checkpoint
        for name, folder in folders.items()
    }
    assert checkpoints["first"] == checkpoints["moved"]
    assert len(set(checkpoints.values())) == 3


def _modules(folder: Path, **changed: str) -> None:
    modules = json.loads((folder / "modules.json").read_text())
    modules[0] |= changed
    (folder / "modules.json").write_text(json.dumps(modules))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"type": "os.path.Transformer"}, r"'os\.path\.Transformer', which is not one of"),
        ({"path": "../other"}, r"modules\.json.*out of the folder"),
        (
            {"type": "sentence_transformers.models.StaticEmbedding"},
            "first module is StaticEmbedding",
        ),
    ],
)
def test_modules_that_are_refused(tmp_path: Path, changed: dict[str, str], message: str) -> None:
    folder = sentence_folder(tmp_path / "sentence")
    _modules(folder, **changed)
    with pytest.raises(UserError, match=message):
        load_backbone(f"sentence-transformers:{folder}", device="cpu")


def test_damaged_folders_and_poolings_are_one_line(tmp_path: Path) -> None:
    folder = sentence_folder(tmp_path / "sentence")
    with pytest.raises(UserError, match="its folder gives the pooling; after the @ give own"):
        load_backbone(f"sentence-transformers:{folder}@cls", device="cpu")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="sentence-transformers cannot load") as error:
        load_backbone(f"sentence-transformers:{folder}", device="cpu")
    assert "\n" not in str(error.value)
