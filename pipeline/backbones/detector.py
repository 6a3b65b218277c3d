"""Regions of an image: the boxes that a detector of torchvision finds, as features.

The detector is Faster R-CNN with a ResNet-50 and a feature pyramid, trained on COCO. A region is
the output of its box head for a box, 1,024 wide, before the classification.

Legend: B images of a batch, V regions of an image, D width of a region, CHW the planes of an image.
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

MAX_REGIONS = 36
"""Number of regions kept of an image, those with the highest scores first, as in VisualBERT."""
SIDES = (800, 1333)
"""Pixels to which the shorter side of an image is resized, and the bound of the longer side."""
_WEIGHTS = FasterRCNN_ResNet50_FPN_Weights.COCO_V1


def weights(name: str) -> Path:
    """Return the local file of the detector's weights; download it if torch's cache lacks it.

    Args:
        name: Name of the backbone, for messages.

    Raises:
        UnavailableError: The file is neither in the cache nor can it be downloaded.
    """
    path = hub.torch_file(Path(urlparse(_WEIGHTS.url).path).name)
    if path.is_file():
        return path
    try:
        if constants.is_offline_mode():
            raise OSError("HF_HUB_OFFLINE is set")
        request = urllib.request.Request(_WEIGHTS.url, method="HEAD")
        urllib.request.urlopen(request, timeout=hub.PATIENCE).close()  # fails within the limit
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(_WEIGHTS.url, str(path), path.stem[-8:], progress=False)
    except Exception as error:
        raise UnavailableError(
            f"backbone {name!r}: the weights of torchvision's detector are not in {path.parent} and"
            f" cannot be downloaded ({one_line(error)}); put {path.name} there"
        ) from None
    return path


class RegionEncoder:
    """A frozen detector that encodes the regions of images.

    Args:
        weights: File with the state of the detector.
        device: Device to run on.
        regions: Most regions of an image. The detector finds those with a score above 0.05.

    Raises:
        RuntimeError, pickle.UnpicklingError: The file is not a state of this detector.
    """

    width = 1024

    def __init__(self, weights: Path, device: torch.device, regions: int = MAX_REGIONS) -> None:
        state = torch.load(weights, map_location="cpu", weights_only=True)
        sides = SIDES
        model: Any = fasterrcnn_resnet50_fpn(
            weights=None, weights_backbone=None, min_size=sides[0], max_size=sides[1]
        )
        model.load_state_dict(state)
        kind = {"detector": type(model).__name__, "regions": regions, "sides": sides}
        self.checkpoint = fingerprint(model.state_dict(), kind)
        torch_utils.freeze(model, device)
        self._model = model
        self._device = device
        self._sides = sides
        self._count = regions
        self.input_size: int | None = sides[0]
        self.batch_size = 4 if device.type == "cpu" else 16
        self.libraries = {"torchvision": torchvision.__version__}

    def describe(self) -> str:
        """Describe the steps for the provenance of a table."""
        shorter, longer = self._sides
        return f"sides to {shorter}, at most {longer}; {self._count} regions of Faster R-CNN"

    def image(self, image: Image.Image) -> torch.Tensor:
        """Normalize and resize like the detector: (C, H, W) float32."""
        x_CHW = torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(255)
        x_CHW, _ = self._model.transform.resize(self._model.transform.normalize(x_CHW), None)
        return torch.as_tensor(x_CHW)

    def parts(self, images: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode prepared images to regions (B, V, D) and the mask (B, V), 0 for padding.

        An image without a detection is one region. Images go through the detector one by one:
        padding would change its features at the edge of an image.
        """
        with torch.autocast(self._device.type, enabled=False):
            regions = [self._regions(x_CHW) for x_CHW in images]
        lengths_B1 = torch.tensor([[len(x_VD)] for x_VD in regions], device=self._device)
        padded_BVD = torch.nn.utils.rnn.pad_sequence(regions, batch_first=True)
        mask_BV = torch.arange(padded_BVD.shape[1], device=self._device) < lengths_B1
        return padded_BVD, mask_BV.long()

    def _regions(self, x_CHW: torch.Tensor) -> torch.Tensor:
        model = self._model
        size = (int(x_CHW.shape[1]), int(x_CHW.shape[2]))
        batch = model.transform.batch_images([x_CHW.to(self._device)], size_divisible=32)
        features = model.backbone(batch)
        proposals, _ = model.rpn(ImageList(batch, [size]), features, None)
        (detections,), _ = model.roi_heads(features, proposals, [size], None)
        boxes = detections["boxes"][: self._count]
        if not len(boxes):
            boxes = boxes.new_tensor([[0.0, 0.0, size[1], size[0]]])
        pooled = model.roi_heads.box_roi_pool(features, [boxes], [size])
        return torch.as_tensor(model.roi_heads.box_head(pooled))
