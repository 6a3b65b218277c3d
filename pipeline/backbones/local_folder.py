"""Open a folder with a saved model by the class that fits the model."""

import hashlib
import json
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from features.errors import UserError
from features.warehouse import slug
from pipeline.backbones.base import Backbone, split_mask, split_max_tokens, split_pooling
from pipeline.backbones.loading import with_pooling
from pipeline.backbones.packages import require_library
from pipeline.backbones.registry import BACKBONES


def open_folder(folder: Path, pooling: str | None, device: str | None, compute: str) -> Backbone:
    """Load a checkpoint under its folder's name, so that moving the folder changes nothing.

    Args:
        folder: Absolute path of a folder that open_clip, timm or transformers has saved.
        pooling: ``cls``, ``mean`` or ``own``; None leaves the choice to the backbone.
        device: Device to run on; None chooses one.
        compute: ``float32`` or ``bfloat16``.

    Raises:
        UserError: The folder cannot be loaded.
    """
    name = folder.name
    # A part of the folder's name after an @ is no choice of a pooling, of tokens or of a mask.
    endings = split_pooling(name)[1], split_max_tokens(name)[1], split_mask(name)[1]
    if not slug(name) or any(ending is not None for ending in endings):
        name = f"local-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    name = with_pooling(name, pooling)
    if (folder / "open_clip_config.json").is_file():
        from pipeline.backbones.open_clip import from_folder

        return from_folder(name, folder, device, compute)
    if _is_of_timm(folder):
        require_library(name, "timm", "timm")
        from pipeline.backbones.timm import from_folder as timm_folder

        return timm_folder(name, folder, device, compute)
    if (folder / "config.json").is_file() or (folder / "modules.json").is_file():
        return open_transformers(name, folder, device, compute)
    raise UserError(
        f"backbone {str(folder)!r}: the folder holds neither open_clip_config.json nor config.json;"
        " give a folder that open_clip, timm or transformers has saved"
    )


def open_transformers(
    name: str, folder: Path, device: str | None, compute: str, **options: Any
) -> Backbone:
    """Load a transformers checkpoint by the class that the registry gives for its model type.

    Args:
        name: Name of the backbone.
        folder: Folder of the checkpoint. A folder of VisualBERT also contains the model that
            encodes the parts of images: the folder ``vision`` of a vision encoder, or
            ``detector.pth``, the weights of torchvision's Faster R-CNN.
        device: Device to run on; None chooses one.
        compute: ``float32`` or ``bfloat16``.
        **options: Further arguments of the class.

    Raises:
        UserError: The folder cannot be loaded.
    """
    model_type = _model_type(folder)
    implementation = "pipeline.backbones.transformers:TransformersBackbone"
    for entry in BACKBONES.values():
        if entry.implementation and entry.model_type == model_type:
            implementation = entry.implementation
    backbone: Backbone = resolve_name(implementation)(name, folder, device, compute, **options)
    return backbone


def _model_type(folder: Path) -> str:
    return str(_config(folder).get("model_type", ""))


def _is_of_timm(folder: Path) -> bool:
    """Return whether timm has saved the folder; transformers adds a ``model_type``."""
    config = _config(folder)
    return "architecture" in config and "model_type" not in config


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # the library reports it, or the folder has a modules.json
    return config if isinstance(config, dict) else {}
