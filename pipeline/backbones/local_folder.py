"""A folder in the format of transformers, opened by the class that fits its kind of model."""

import json
from pathlib import Path

from features.errors import UserError
from pipeline.backbones.base import Backbone


def open_folder(
    name: str, folder: Path, device: str | None, compute: str, *, mask: float = 0.0
) -> Backbone:
    """Load a checkpoint of whatever kind; see the classes for what they raise.

    A folder of VisualBERT holds what shows the parts of its pictures: the folder ``vision`` of a
    vision encoder, or ``detector.pth``, the weights of torchvision's Faster R-CNN.

    Raises:
        UserError: It cannot be loaded.
    """
    from pipeline.backbones.image_text import Flava, Vilt
    from pipeline.backbones.transformers import TransformersBackbone
    from pipeline.backbones.visualbert import VisualBert

    kind = _kind(folder)
    if kind == "flava":
        return Flava(name, folder, device, compute)
    if kind == "vilt":
        return Vilt(name, folder, device, compute)
    if kind == "visual_bert":
        eyes = [folder / "vision", folder / "detector.pth"]
        there = [path for path in eyes if path.exists()]
        if not there:
            raise UserError(
                f"backbone {name!r}: {folder} holds no folder 'vision' with a vision encoder, such"
                " as microsoft/resnet-50, and no 'detector.pth'; put one there"
            )
        return VisualBert(name, folder, device, compute, vision=there[0])
    return TransformersBackbone(name, folder, device, compute, mask=mask)


def _kind(folder: Path) -> str:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""  # told by the library, or by a sentence encoder's modules
    return str(config.get("model_type", "")) if isinstance(config, dict) else ""
