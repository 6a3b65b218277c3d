"""Images of which a masked autoencoder sees a part: tables of several ratios side by side."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from huggingface_hub import constants

from features.errors import UserError
from features.store import FeatureStore
from features.warehouse import Warehouse
from pipeline.backbones import patch_masking
from pipeline.backbones.loading import load_backbone
from pipeline.extraction.job import extract_features
from pipeline.extraction.options import ExtractOptions
from tests.pipeline.backbones.checkpoints import vision_folder
from tests.pipeline.backbones.inputs import images, pictures
from tests.pipeline.backbones.references import library, near, processor_of
from tests.pipeline.backbones.tiny import picture, prepare
from trainer.data.feature_tables import choose_tables

IDS = ["a", "b", "c"]


@pytest.fixture
def tiny(warehouse: Warehouse, tmp_path: Path) -> Warehouse:
    raw = tmp_path / "raw"
    image = [str(picture(raw / f"{seed}.png", seed).name) for seed in range(len(IDS))]
    prepare(warehouse, raw, ids=IDS, text=["one", "two", "three"], image=image)
    return warehouse


def vectors(warehouse: Warehouse, request: str) -> npt.NDArray[np.float32]:
    """Read the table that ``--features`` names."""
    (table,) = choose_tables(FeatureStore(warehouse), "tiny", [request])
    info = warehouse.info("tiny")
    matrix = table.read(info.items, info.fingerprint, info.inputs_of("image"))
    return np.asarray(matrix.vectors, dtype=np.float32)


def names_in_provenance(warehouse: Warehouse) -> list[str]:
    made = [table.provenance() for table in FeatureStore(warehouse).tables("tiny")]
    return [provenance.backbone for provenance in made if provenance]


@pytest.mark.parametrize("percent", [25, 50, 75])
def test_a_masked_image_is_what_the_library_makes_of_the_same_patches(
    tmp_path: Path, percent: int
) -> None:
    folder = vision_folder(tmp_path / "mae", kind="ViTMAE")
    ours = load_backbone(f"{folder}@mask-{percent}", device="cpu")
    assert ours.name == f"mae@mask-{percent}"
    assert f"{percent}% of the patches masked" in ours.preprocessing("image")
    model, processor = library(folder), processor_of(folder)
    model.config.mask_ratio = percent / 100
    noise_BL = patch_masking.noise(images(ours).images, 16, percent / 100)
    with torch.inference_mode():
        states = model(
            **processor(images=pictures(), return_tensors="pt"), noise=noise_BL
        ).last_hidden_state
    assert states.shape[1] == 1 + 16 - 16 * percent // 100
    assert near(ours.embed(images(ours)), states[:, 0])


def test_tables_of_several_ratios_are_side_by_side(tiny: Warehouse, tmp_path: Path) -> None:
    folder = str(vision_folder(tmp_path / "mae", kind="ViTMAE"))
    for ratio in (None, 0.25, 0.75):
        extract_features(tiny, "tiny", ExtractOptions(image=folder, mask_ratio=ratio, device="cpu"))
    assert names_in_provenance(tiny) == ["mae", "mae@mask-25", "mae@mask-75"]
    whole, quarter, most = (
        vectors(tiny, f"image={name}") for name in ("mae", "mae@mask-25", "mae-mask-75")
    )
    assert not np.allclose(whole, quarter, atol=1e-3)
    assert not np.allclose(quarter, most, atol=1e-3)
    again = ExtractOptions(image=f"{folder}@mask-25", mask_ratio=0.25, device="cpu")
    assert extract_features(tiny, "tiny", again).tables[0].reused == 3
    with pytest.raises(UserError, match=r"run: mmrec extract --dataset tiny --image mae@mask-50"):
        choose_tables(FeatureStore(tiny), "tiny", ["image=mae@mask-50"])


def test_a_short_name_and_the_option_are_one_table(
    tiny: Warehouse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "cache" / "models--facebook--vit-mae-base"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    vision_folder(repository / "snapshots" / "abc", kind="ViTMAE")
    names = ("mae-b-mask-75", "mae-b@mask-75")
    options = [ExtractOptions(image=name, device="cpu") for name in names]
    options.append(ExtractOptions(image="mae-b", mask_ratio=0.75, device="cpu"))
    reports = [extract_features(tiny, "tiny", option).tables[0] for option in options]
    assert [row.encoded for row in reports] == [3, 0, 0]
    assert names_in_provenance(tiny) == ["mae-b-mask-75"]
    extract_features(tiny, "tiny", ExtractOptions(image="mae-b", mask_ratio=0.25, device="cpu"))
    assert sorted(names_in_provenance(tiny)) == ["mae-b-mask-75", "mae-b@mask-25"]
    with pytest.raises(UserError, match=r"masks 75% already .*25%.*mae-b"):
        load_backbone("mae-b-mask-75@mask-25")


def test_the_at_of_a_folders_name_is_no_mask(tmp_path: Path) -> None:
    folder = vision_folder(tmp_path / "mae@mask-75", kind="ViTMAE")
    ours = load_backbone(str(folder), device="cpu")
    assert "masked" not in ours.preprocessing("image")
    assert "50%" in load_backbone(f"{folder}@mask-50", device="cpu").preprocessing("image")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": "hashed", "mask_ratio": 0.0}, r"--mask-ratio 0\.0 .*0\.01 to 0\.99"),
        ({"image": "hashed", "mask_ratio": 1.0}, r"--mask-ratio 1\.0 .*0\.01 to 0\.99"),
        ({"image": "hashed", "mask_ratio": 0.333}, r"--mask-ratio 0\.333 .*steps of 0\.01"),
        ({"image": "hashed", "mask_ratio": float("nan")}, r"--mask-ratio nan .*0\.01 to 0\.99"),
        (
            {"text": "hashed", "mask_ratio": 0.5},
            r"--mask-ratio 0\.5 applies to images; give --image",
        ),
        ({"image": "hashed", "mask_ratio": 0.5}, r"'hashed' cannot mask 50%.*mae-b"),
        ({"image": "hashed@mask-50", "mask_ratio": 0.25}, r"hashed@mask-50.*0\.25.*give one"),
        ({"image": "{folder}@mask-0"}, r"'mae' cannot mask 0%.*0\.01 to 0\.99"),
        ({"image": "{folder}@mask-100"}, r"'mae' cannot mask 100%.*0\.01 to 0\.99"),
        ({"image": "all-minilm-l6-v2@mask-50"}, r"takes text, not image"),
    ],
)
def test_ratios_that_do_not_fit_are_refused(
    tiny: Warehouse, tmp_path: Path, options: dict[str, object], message: str
) -> None:
    folder = vision_folder(tmp_path / "mae", kind="ViTMAE")
    given = {
        key: value.format(folder=folder) if isinstance(value, str) else value
        for key, value in options.items()
    }
    with pytest.raises(UserError, match=message) as error:
        extract_features(tiny, "tiny", ExtractOptions(device="cpu", **given))  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
    assert not FeatureStore(tiny).tables("tiny")
