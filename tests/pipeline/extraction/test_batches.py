"""Inputs of any sizes and texts without tokens: the result does not depend on the batch size."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import transformers
from tokenizers.models import WordLevel
from tokenizers.normalizers import Replace
from tokenizers.pre_tokenizers import WhitespaceSplit

from features.store import FeatureStore
from features.warehouse import Warehouse
from pipeline.backbones.base import InputBatch, Vectors
from pipeline.backbones.hashed import Hashed
from pipeline.backbones.registry import BACKBONES
from pipeline.extraction.job import extract_features
from pipeline.extraction.options import ExtractOptions
from tests.pipeline.backbones.checkpoints import bert_folder, vision_folder
from tests.pipeline.backbones.tiny import picture, prepare
from tests.pipeline.extraction.fakes import entry

SIZES = [(40, 30), (30, 40), (40, 30), (64, 32), (33, 57), (30, 40), (40, 30), (32, 32)]


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    folder = tmp_path / "raw"
    folder.mkdir()
    return folder


def _yolos(folder: Path) -> Path:
    processor = transformers.YolosImageProcessor(size={"shortest_edge": 32, "longest_edge": 64})
    return vision_folder(
        folder,
        kind="Yolos",
        processor=processor,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=[32, 64],
        patch_size=8,
        num_detection_tokens=3,
    )


def _uncropped(folder: Path) -> Path:
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, do_center_crop=False)
    return vision_folder(
        folder,
        kind="ResNet",
        processor=processor,
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        layer_type="basic",
    )


def _extract(
    warehouse: Warehouse, size: int, level: str = "pooled", **given: Any
) -> tuple[dict[int, Vectors], dict[str, int]]:
    options = ExtractOptions(
        **given, batch_size=size, dtype="float32", level=level, overwrite=True, device="cpu"
    )
    report = extract_features(warehouse, "tiny", options).tables[0]
    (table,) = [t for t in FeatureStore(warehouse).tables("tiny") if t.level == level]
    rows = [row for part in table.parts() for row in table.rows(part).to_pylist()]
    table.clear()
    return {row["item"]: np.array(row["embedding"]) for row in rows}, report.failed


@pytest.mark.slow
@pytest.mark.parametrize("make", [_yolos, _uncropped])
@pytest.mark.parametrize("level", ["pooled", "tokens"])
def test_images_of_any_sizes_do_not_depend_on_the_batch(
    make: Any, level: str, warehouse: Warehouse, raw: Path, tmp_path: Path
) -> None:
    names = [picture(raw / f"{i}.png", i, size=size).name for i, size in enumerate(SIZES)]
    prepare(warehouse, raw, ids=names, image=names)
    folder = str(make(tmp_path / "model"))
    single, failed = _extract(warehouse, 1, level, image=folder)
    assert len(single) == len(SIZES)
    assert not failed
    for size in (3, 8):
        batched, failed = _extract(warehouse, size, level, image=folder)
        assert not failed
        for item, vector in single.items():
            np.testing.assert_allclose(batched[item], vector, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 8])
def test_a_text_without_a_token_fails_and_its_neighbours_do_not(
    size: int, warehouse: Warehouse, raw: Path, tmp_path: Path
) -> None:
    folder = bert_folder(tmp_path / "model")
    for file in (*folder.glob("tokenizer*"), folder / "vocab.txt"):
        file.unlink()
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "red", "blue", "shoe", "hat"])}
    tokenizer = tokenizers.Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.normalizer = Replace("!", "")
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast: Any = transformers.PreTrainedTokenizerFast
    fast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    texts = ["red", "!", "blue shoe", "!!", "hat"]
    prepare(warehouse, raw, ids=[str(i) for i in range(5)], text=texts)
    vectors, failed = _extract(warehouse, size, text=str(folder))
    assert sorted(vectors) == [0, 2, 4]
    assert all(np.linalg.norm(vector) > 0 for vector in vectors.values())
    assert list(failed.values()) == [2]
    assert "token" in next(iter(failed))


class Picky(Hashed):
    """Refuse a batch with a long text."""

    def embed(self, batch: InputBatch) -> Vectors:
        if any(len(ids) > 20 for ids in batch.texts):
            raise IndexError("position out of range")
        return super().embed(batch)


@pytest.mark.parametrize("size", [1, 2, 8])
def test_an_input_that_the_model_refuses_fails_alone(
    size: int, warehouse: Warehouse, raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["short", "x" * 30, "brief", "tiny", "y" * 40]
    prepare(warehouse, raw, ids=[str(i) for i in range(5)], text=texts)
    monkeypatch.setitem(BACKBONES, "picky", entry(Picky("picky")))
    vectors, failed = _extract(warehouse, size, text="picky")
    assert sorted(vectors) == [0, 2, 3]
    assert failed == {"IndexError: position out of range": 2}
