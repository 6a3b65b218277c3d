"""The regions of images that VisualBERT reads."""

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.models.detection import fasterrcnn_resnet50_fpn

from features.errors import UserError
from pipeline.backbones import detector as detector_module
from pipeline.backbones.detector import MAX_REGIONS, RegionEncoder
from pipeline.backbones.loading import load_backbone
from tests.marks import heavy_after
from tests.pipeline.backbones.checkpoints import (
    visualbert_folder,
)
from tests.pipeline.backbones.inputs import one_by_one, pairs, pictures
from tests.pipeline.backbones.references import near


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
@pytest.mark.parametrize("regions", heavy_after(1, [MAX_REGIONS, 49, 2]))
def test_regions_are_what_the_detector_makes_of_its_boxes(
    detector: Path, regions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sides = (96, 160)
    monkeypatch.setattr(detector_module, "SIDES", sides)
    ours = RegionEncoder(detector, torch.device("cpu"), regions)
    assert f"; {regions} regions of Faster R-CNN" in ours.describe()
    bare: Any = fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, min_size=sides[0], max_size=sides[1],
        box_detections_per_img=regions,
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
        assert 1 <= len(kept) <= regions
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
