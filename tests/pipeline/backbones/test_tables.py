"""Feature tables of real libraries, written by the extraction job."""

from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from features.errors import UserError
from features.store import FeatureStore
from features.warehouse import Warehouse
from pipeline.backbones.hashed import Hashed
from pipeline.extraction.job import extract_features
from pipeline.extraction.options import ExtractOptions
from tests.pipeline.backbones.checkpoints import (
    bert_folder,
    vision_folder,
)
from tests.pipeline.backbones.tiny import picture, prepare


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_table_of_a_real_model_equals_a_bare_loop(
    warehouse: Warehouse, tmp_path: Path, clip: Path, dtype: str
) -> None:
    raw = tmp_path / "raw"
    names = [f"{i}.png" for i in range(11)]
    for seed, name in enumerate(names):
        picture(raw / name, seed, size=(30 + seed, 60 - 3 * seed))
    texts = [f"{'very ' * (i % 5)}nice thing number {i}" for i in range(11)]
    info = prepare(warehouse, raw, ids=names, image=names, text=texts)
    extract_features(
        warehouse,
        "tiny",
        ExtractOptions(image=str(clip), text=str(clip), dtype=dtype, batch_size=4, device="cpu"),
    )
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{clip}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{clip}")
    model.eval()
    with torch.inference_mode():
        opened = [transform(Image.open(raw / name)) for name in names]
        theirs = {
            "image": model.encode_image(torch.stack(opened)).numpy(),
            "text": model.encode_text(tokenizer(texts)).numpy(),
        }
    for modality, expected in theirs.items():
        table = FeatureStore(warehouse).table("tiny", "My CLIP", modality)
        assert table.path.parts[-3] == "my-clip"
        matrix = table.read(info.items, info.fingerprint, info.inputs[modality])
        limit = 1e-5 if dtype == "float32" else 1e-3
        assert np.abs(matrix.vectors.astype(np.float32) - expected).max() < limit


@pytest.mark.parametrize("library", ["open_clip", "transformers"])
def test_every_odd_picture_gives_a_vector_or_a_reason(
    warehouse: Warehouse, tmp_path: Path, clip: Path, real_data: Path, library: str
) -> None:
    raw = real_data / "weird" / "images"
    names = sorted(path.name for path in raw.iterdir())
    prepare(warehouse, raw, ids=names, image=names)
    folder = clip if library == "open_clip" else vision_folder(tmp_path / "vit")
    report = extract_features(
        warehouse, "tiny", ExtractOptions(image=str(folder), device="cpu")
    ).tables[0]
    assert report.encoded == len(names) - 8  # those that test_media names
    assert sum(report.failed.values()) == 8


def test_a_transform_that_fails_is_a_failure_of_its_item(
    warehouse: Warehouse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def image(self: Hashed, one: Image.Image) -> Any:
        if one.width == 13:
            raise ValueError("13 is\nno width")
        return plain(self, one)

    plain = Hashed.image
    monkeypatch.setattr(Hashed, "image", image)
    for seed, width in enumerate([12, 13, 14]):
        picture(tmp_path / f"{seed}.png", seed, size=(width, 10))
    names = [f"{seed}.png" for seed in range(3)]
    prepare(warehouse, tmp_path, ids=names, image=names)
    report = extract_features(warehouse, "tiny", ExtractOptions(image="hashed")).tables[0]
    assert (report.encoded, report.failed) == (2, {"ValueError: 13 is no width": 1})


def test_two_folders_of_one_name_do_not_mix(warehouse: Warehouse, tmp_path: Path) -> None:
    prepare(warehouse, tmp_path, ids=["a"], text=["a"])
    extract_features(
        warehouse,
        "tiny",
        ExtractOptions(text=str(bert_folder(tmp_path / "x" / "model")), device="cpu"),
    )
    other = bert_folder(tmp_path / "y" / "model", seed=1)
    with pytest.raises(UserError, match=r"text=model of tiny holds other vectors \(checkpoint"):
        extract_features(warehouse, "tiny", ExtractOptions(text=str(other), device="cpu"))
