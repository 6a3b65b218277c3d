"""Models of timm, against the library's own functions."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import timm.data
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from features.errors import UserError
from features.warehouse import Warehouse, slug
from pipeline.backbones.base import InputBatch, UnavailableError, block_of
from pipeline.backbones.loading import load_backbone
from pipeline.extraction.job import extract_features
from pipeline.extraction.options import ExtractOptions
from tests.pipeline.backbones.checkpoints import TIMM, cached_folder, timm_folder, timm_model
from tests.pipeline.backbones.inputs import images, pictures
from tests.pipeline.backbones.references import Floats, grid
from tests.pipeline.backbones.tiny import picture, prepare

DATA: Any = timm.data
ARCHS = list(TIMM)


def relative(ours: Any, theirs: Any) -> float:
    """Return the largest difference of a row, relative to the length of the library's row."""
    ours, theirs = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    assert ours.shape == theirs.shape
    assert theirs.std() > 1e-3  # random weights, but no constant
    lengths = np.linalg.norm(theirs, axis=-1)
    return float((np.linalg.norm(ours - theirs, axis=-1) / lengths).max())


def pixels(model: Any) -> torch.Tensor:
    """Prepare the images of the tests by timm's own transform: (4, 3, H, W)."""
    transform = DATA.create_transform(**DATA.resolve_model_data_config(model))
    return torch.stack([transform(image) for image in pictures()])


def vectors(model: Any, x_BCHW: torch.Tensor) -> Floats:
    with torch.inference_mode():
        features = model.forward_features(x_BCHW)
        return np.asarray(model.forward_head(features, pre_logits=True))


@pytest.mark.parametrize("arch", ARCHS)
def test_vectors_and_levels_are_those_of_timm(tmp_path: Path, arch: str) -> None:
    ours = load_backbone(str(timm_folder(tmp_path / arch, arch)), device="cpu")
    model = timm_model(arch)
    x_BCHW = pixels(model)
    assert (ours.name, ours.modalities) == (arch, ("image", "video"))
    assert ours.input_size == 40  # 32 / 0.8
    assert '"crop_pct": 0.8' in ours.preprocessing("image")
    assert relative(ours.embed(images(ours)), vectors(model, x_BCHW)) < 1e-5
    first: Any = model.get_submodule(model.feature_info[0]["module"])
    first_inputs: list[torch.Tensor] = []
    first.register_forward_pre_hook(lambda module, inputs: first_inputs.append(inputs[0].clone()))
    with torch.inference_mode():
        last, states = model.forward_intermediates(x_BCHW, norm=False)
    assert ours.blocks == len(states) > 1
    has_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
    for level in ours.levels("image")[1:]:
        k = block_of(level)
        expected = first_inputs[0] if k == 0 else last if k is None else states[k - 1]
        if k in (None, 0) and has_last:
            expected = expected.permute(0, 3, 1, 2)
        tokens = ours.tokens(images(ours), level)
        for tokens_TD, theirs in zip(tokens, expected, strict=True):
            theirs_TD = grid(theirs)
            assert ours.token_dim(level, "image") == theirs_TD.shape[-1]
            # timm's intermediates leave out the class token.
            assert relative(tokens_TD[len(tokens_TD) - len(theirs_TD) :], theirs_TD) < 1e-5


def test_a_folder_and_a_file_are_named_without_their_place(tmp_path: Path) -> None:
    folder = timm_folder(tmp_path / "My Model")
    by_folder = load_backbone(str(folder), device="cpu")
    by_source = load_backbone(f"timm:{folder}", device="cpu")
    file = tmp_path / "weights.safetensors"
    file.write_bytes((folder / "model.safetensors").read_bytes())
    by_file = load_backbone(f"timm:test_efficientnet/{file}", device="cpu")
    pickled = tmp_path / "weights.pth"
    torch.save({"state_dict": load_file(file)}, pickled)
    by_pickle = load_backbone(f"timm:test_efficientnet/{pickled}@own", device="cpu")
    assert (by_folder.name, by_source.name) == ("My Model", "timm:My Model")
    assert by_file.name == "timm:test_efficientnet/weights"
    assert by_pickle.name == "timm:test_efficientnet/weights@own"
    backbones = (by_folder, by_source, by_file, by_pickle)
    assert len({backbone.checkpoint for backbone in backbones}) == 1
    assert all(slug(backbone.name) for backbone in backbones)
    other = load_backbone(str(timm_folder(tmp_path / "other", seed=1)), device="cpu")
    assert other.checkpoint != by_folder.checkpoint


def test_a_classifier_does_not_change_a_checkpoint(tmp_path: Path) -> None:
    weights = timm_model("test_resnet").state_dict()
    whole, headless = tmp_path / "whole.safetensors", tmp_path / "headless.safetensors"
    save_file(weights, whole)
    save_file({key: value for key, value in weights.items() if key[:3] != "fc."}, headless)
    checkpoints = {
        load_backbone(f"timm:test_resnet/{path}", device="cpu").checkpoint
        for path in (whole, headless)
    }
    assert len(checkpoints) == 1


def test_weights_in_the_cache_are_found_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UnavailableError, match=r"timm/test_resnet.r160_in1k.*give a local folder"):
        load_backbone("timm:test_resnet", device="cpu")
    folder = cached_folder(tmp_path, "timm/test_resnet.r160_in1k")
    folder.mkdir(parents=True)
    model = timm.create_model("test_resnet", num_classes=1000)
    save_file(model.state_dict(), folder / "model.safetensors")
    for name in ("timm:test_resnet", "timm:test_resnet.r160_in1k"):
        ours = load_backbone(name, device="cpu")
        assert ours.name == name
        assert relative(ours.embed(images(ours)), vectors(model.eval(), pixels(model))) < 1e-5


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:", "unknown backbone 'timm:'"),
        ("timm:tf_efficientnet_lite9", r"no model 'tf_efficientnet_lite9' \(close: tf_eff"),
        ("timm:test_resnet.zip", "no tag 'zip' of test_resnet; give one of r160_in1k"),
        ("timm:test_resnet/zip", "'zip' is not a file; give timm:ARCH/FILE"),
        ("timm:efficientnet_b8", "has no weights of efficientnet_b8 on the hub"),
    ],
)
def test_names_that_are_wrong(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        load_backbone(name, device="cpu")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["missing", "renamed", "cut", "pickle", "config", "none"])
def test_damaged_weights_are_one_line(tmp_path: Path, damage: str) -> None:
    folder = timm_folder(tmp_path / "model")
    file = folder / "model.safetensors"
    weights = load_file(file)
    target = tmp_path / "must-not-appear"
    if damage == "missing":
        weights.pop("conv_head.weight")
    if damage == "renamed":
        weights["other.weight"] = weights.pop("conv_head.weight")
    save_file(weights, file)
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    if damage in ("pickle", "none"):
        file.unlink()
    if damage == "pickle":

        class Attack:
            def __reduce__(self) -> Any:
                return (Path.mkdir, (target,))

        torch.save({"state_dict": Attack()}, folder / "pytorch_model.bin")
    if damage == "config":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "architecture": "zip"}))
    with pytest.raises(UserError, match="timm cannot load") as error:
        load_backbone(str(folder), device="cpu")
    assert "\n" not in str(error.value)
    assert not target.exists()


def test_the_stored_vector_is_the_vector_in_half_precision(
    warehouse: Warehouse, tmp_path: Path
) -> None:
    from features.store import FeatureStore

    files = [picture(tmp_path / "raw" / f"{i}.png", i).name for i in range(5)]
    info = prepare(warehouse, tmp_path / "raw", ids=list("abcde"), image=files)
    folder = timm_folder(tmp_path / "model")
    extract_features(warehouse, "tiny", ExtractOptions(image=f"timm:{folder}", device="cpu"))
    table = FeatureStore(warehouse).table("tiny", slug("timm:model"), "image")
    stored = table.read(info.items, info.fingerprint, info.inputs["image"]).vectors
    ours = load_backbone(str(folder), device="cpu")
    from PIL import Image

    inputs = [ours.image(Image.open(tmp_path / "raw" / file).convert("RGB")) for file in files]
    embedded = ours.embed(InputBatch(images=inputs))
    assert (np.asarray(stored, dtype=np.float16) == embedded.astype(np.float16)).all()
