"""The regions of a picture: what a detector of torchvision finds, as features of its boxes.

Faster R-CNN with a ResNet-50 and a feature pyramid, trained on COCO; a region is what its box head
makes of a box, 1,024 wide, before the classes are told apart.

Legend: B pictures of a batch, V regions of a picture, D width of a region, CHW a picture's planes.
"""

import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
import torch
import torchvision
from huggingface_hub import constants
from PIL import Image
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights, fasterrcnn_resnet50_fpn
from torchvision.models.detection.image_list import ImageList

from features.checkpoint_fingerprint import fingerprint
from pipeline.backbones import hub, torch_utils
from pipeline.backbones.base import UnavailableError
from pipeline.media.errors import one_line

MOST = 36
"""Regions of a picture at most, those with the best scores first; as VisualBERT's authors took."""
SIDES = (800, 1333)
"""Pixels of the shorter side that pictures are resized to, and the most of the longer."""
_WEIGHTS = FasterRCNN_ResNet50_FPN_Weights.COCO_V1


def weights(name: str) -> Path:
    """Give the local file of the detector's weights, fetched when torch's cache lacks it.

    Raises:
        UnavailableError: It is neither there nor to be had.
    """
    path = hub.torch_file(Path(urlparse(_WEIGHTS.url).path).name)
    if path.is_file():
        return path
    try:
        if constants.is_offline_mode():
            raise OSError("HF_HUB_OFFLINE is set")
        question = urllib.request.Request(_WEIGHTS.url, method="HEAD")
        urllib.request.urlopen(question, timeout=hub.PATIENCE).close()  # asked once, with a bound
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(_WEIGHTS.url, str(path), path.stem[-8:], progress=False)
    except Exception as error:
        raise UnavailableError(
            f"backbone {name!r}: the weights of torchvision's detector are not in {path.parent} and"
            f" cannot be fetched ({one_line(error)}); put {path.name} there"
        ) from None
    return path


class Regions:
    """A frozen detector that shows a picture's regions.

    Args:
        weights: File of its state.
        device: Where it runs.

    Raises:
        RuntimeError, pickle.UnpicklingError: The file is no state of this detector.
    """

    width = 1024

    def __init__(self, weights: Path, device: torch.device) -> None:
        state = torch.load(weights, map_location="cpu", weights_only=True)
        sides = SIDES
        model: Any = fasterrcnn_resnet50_fpn(
            weights=None, weights_backbone=None, min_size=sides[0], max_size=sides[1]
        )
        model.load_state_dict(state)
        kind = {"detector": type(model).__name__, "regions": MOST, "sides": sides}
        self.checkpoint = fingerprint(model.state_dict(), kind)
        torch_utils.ready(model, device)
        self._model = model
        self._device = device
        self._sides = sides
        self.input_size = sides[0]
        self.batch_size = 4 if device.type == "cpu" else 16
        self.libraries = {"torchvision": torchvision.__version__}

    def describe(self) -> str:
        """Name the steps for a table's provenance."""
        return (
            f"sides to {self._sides[0]}, at most {self._sides[1]}; {MOST} regions of Faster R-CNN"
        )

    def image(self, picture: Image.Image) -> torch.Tensor:
        """Normalise and resize as the detector does: (C, H, W) float32."""
        x_CHW = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float().div_(255)
        x_CHW, _ = self._model.transform.resize(self._model.transform.normalize(x_CHW), None)
        return torch.as_tensor(x_CHW)

    def parts(self, images: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Show the regions: (B, V, D), and (B, V) which of them are no padding.

        A picture in which nothing is found is one region. One picture after another: padding
        would change what the detector sees at a picture's edge.
        """
        with torch.autocast(self._device.type, enabled=False):
            found = [self._regions(x_CHW) for x_CHW in images]
        lengths_B1 = torch.tensor([[len(one)] for one in found], device=self._device)
        padded_BVD = torch.nn.utils.rnn.pad_sequence(found, batch_first=True)
        mask_BV = torch.arange(padded_BVD.shape[1], device=self._device) < lengths_B1
        return padded_BVD, mask_BV.long()

    def _regions(self, x_CHW: torch.Tensor) -> torch.Tensor:
        model = self._model
        size = (int(x_CHW.shape[1]), int(x_CHW.shape[2]))
        batch = model.transform.batch_images([x_CHW.to(self._device)], size_divisible=32)
        features = model.backbone(batch)
        proposals, _ = model.rpn(ImageList(batch, [size]), features, None)
        (found,), _ = model.roi_heads(features, proposals, [size], None)
        boxes = found["boxes"][:MOST]
        if not len(boxes):
            boxes = boxes.new_tensor([[0.0, 0.0, size[1], size[0]]])
        pooled = model.roi_heads.box_roi_pool(features, [boxes], [size])
        return torch.as_tensor(model.roi_heads.box_head(pooled))
