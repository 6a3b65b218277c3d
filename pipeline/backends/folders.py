"""A folder in the format of transformers, opened by the class that fits its kind of model."""

import json
from pathlib import Path

from features.errors import UserError
from pipeline.backends.contract import Backbone


def open_folder(
    name: str, folder: Path, device: str | None, compute: str, *, mask: float = 0.0
) -> Backbone:
    """Load a checkpoint of whatever kind; see the classes for what they raise.

    A folder of VisualBERT holds the encoder of its pictures in a folder ``vision``.

    Raises:
        UserError: It cannot be loaded.
    """
    from pipeline.backends.hf import Transformer
    from pipeline.backends.joint import Flava, Vilt
    from pipeline.backends.visualbert import VisualBert

    kind = _kind(folder)
    if kind == "flava":
        return Flava(name, folder, device, compute)
    if kind == "vilt":
        return Vilt(name, folder, device, compute)
    if kind == "visual_bert":
        if not (folder / "vision" / "config.json").is_file():
            raise UserError(
                f"backbone {name!r}: {folder} holds no folder 'vision' with the encoder of its"
                " pictures, such as microsoft/resnet-50; put it there"
            )
        return VisualBert(name, folder, device, compute, vision=folder / "vision")
    return Transformer(name, folder, device, compute, mask=mask)


def _kind(folder: Path) -> str:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""  # told by the library, or by a sentence encoder's modules
    return str(config.get("model_type", "")) if isinstance(config, dict) else ""
