"""Entries of the registry of backbones: a backbone before it is loaded. Nothing imports torch."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from features.errors import UserError
from pipeline.backbones.base import Backbone, split_pooling
from pipeline.backbones.packages import PackagedWeights, require_library

Maker = Callable[[str, str | None, str], Backbone]
"""Function of the name, the device (None to choose one) and the arithmetic. It imports the
library, and returns the loaded backbone."""

MODALITIES = ("image", "text", "video", "joint")
_DETECTOR = "torchvision fasterrcnn_resnet50_fpn"
_DETECTOR_FILE = "fasterrcnn_resnet50_fpn_coco-258fb6c6.pth"
_APACHE = "Apache-2.0"
_BERT = "google-bert/bert-base-uncased"


@dataclass(frozen=True, kw_only=True, slots=True)
class BackboneEntry:
    """Facts about a backbone, and the function that loads it."""

    modalities: tuple[str, ...]
    dim: int
    library: str
    checkpoint: str
    """Name of the checkpoint in that library."""
    licence: str = ""
    """Licence of the weights, as their authors or their page on the hub give it."""
    note: str = ""
    """Advice to read before using the weights."""
    blocks: int = 0
    """Number of blocks of the deepest encoder that can be cut; 0 if none can."""
    hub: str = ""
    """Repository of the weights on the hub."""
    other_weights: tuple[str, ...] = ()
    """Further repositories whose weights are needed, and files of torch's cache."""
    tokenizer: str = ""
    """Repository of the tokenizer, if it is another one."""
    package: PackagedWeights | None = None
    """Weights in an installable package; the only ones if :attr:`hub` is empty."""
    model_type: str = ""
    """``model_type`` in the ``config.json`` of a transformers checkpoint."""
    implementation: str = ""
    """``module:Class`` that runs this model type, if it is not ``TransformersBackbone``."""
    make: Maker


def of_class(backbone: type[Backbone], *, library: str = "", checkpoint: str = "") -> BackboneEntry:
    """Return the entry of a backbone that is created from its class alone.

    Args:
        backbone: The class; ``name``, ``modalities`` and ``dim`` are read from it.
        library: Library that computes the vectors; by default the package of the class.
        checkpoint: Name of the checkpoint; by default the class's own fingerprint.

    Raises:
        TypeError: A member is missing or has a wrong type.
    """
    missing = sorted(getattr(backbone, "__abstractmethods__", ()))
    if missing:
        raise TypeError(f"{backbone.__name__} does not define {', '.join(missing)}")
    modalities, dim = getattr(backbone, "modalities", None), getattr(backbone, "dim", None)
    if not isinstance(modalities, tuple) or not set(modalities) <= set(MODALITIES):
        raise TypeError(
            f"{backbone.__name__}.modalities is {modalities!r}, not a tuple of some of"
            f" {', '.join(MODALITIES)}"
        )
    if not isinstance(dim, int):
        raise TypeError(f"{backbone.__name__}.dim is {dim!r}, not an int")

    def make(name: str, device: str | None, compute: str) -> Backbone:
        base, pooling = split_pooling(name)
        if pooling:
            raise UserError(f"backbone {name!r}: {base} has one way of pooling; leave out the @")
        return backbone(name, device=device, compute=compute)

    return BackboneEntry(
        modalities=modalities,
        dim=dim,
        library=library or backbone.__module__.partition(".")[0].replace("pipeline", "mmrec"),
        checkpoint=checkpoint or str(backbone.checkpoint),
        licence=backbone.licence,
        blocks=backbone.blocks if isinstance(backbone.blocks, int) else 0,
        make=make,
    )


def of_entry_point(loaded: object) -> object:
    """Return the entry of an installed package's backbone.

    Args:
        loaded: A subclass of :class:`Backbone`, or an entry.

    Raises:
        TypeError: The class is not a backbone, or lacks a member of one.
    """
    if not inspect.isclass(loaded):
        return loaded
    if not issubclass(loaded, Backbone):
        raise TypeError(f"{loaded.__name__} is not a subclass of Backbone")
    return of_class(loaded)


def open_clip(
    arch: str, tag: str, dim: int, repository: str, licence: str = "", blocks: int = 12
) -> BackboneEntry:
    """Return the entry of a pretrained model of open_clip.

    Args:
        arch: Architecture.
        tag: Pretrained tag, or a file of weights.
        dim: Width of the embedding.
        repository: Repository of the weights on the hub; empty for a file.
        licence: Licence of the weights.
        blocks: Number of blocks of the deeper encoder.
    """

    def make(name: str, device: str | None, compute: str) -> Backbone:
        from pipeline.backbones import hub

        # open_clip takes seconds to import; missing weights are reported before that.
        if repository and not hub.is_cached(repository):
            hub.require(name, repository, f"open_clip {arch}/{tag}")
        from pipeline.backbones.open_clip import from_tag

        return from_tag(name, arch, tag, device, compute)

    return BackboneEntry(
        modalities=MODALITIES,
        dim=dim,
        library="open_clip",
        checkpoint=f"{arch}/{tag}",
        licence=licence,
        blocks=blocks,
        hub=repository,
        make=make,
    )


def hf(
    repository: str,
    model_type: str,
    modalities: tuple[str, ...],
    dim: int,
    licence: str = "",
    *,
    blocks: int = 12,
    implementation: str = "",
    note: str = "",
) -> BackboneEntry:
    """Return the entry of a transformers checkpoint on the hub.

    Args:
        repository: ``ORG/NAME`` on the hub.
        model_type: ``model_type`` in its ``config.json``.
        modalities: Some of image, text, video and joint.
        dim: Width of the embedding.
        licence: Licence of the weights.
        blocks: Number of blocks of the deepest encoder that can be cut.
        implementation: ``module:Class`` that runs this model type, in place of
            ``TransformersBackbone``; it takes a name, a folder, a device and the arithmetic.
        note: Advice to read before using the weights.
    """
    return BackboneEntry(
        modalities=modalities,
        dim=dim,
        library="transformers",
        checkpoint=repository,
        licence=licence,
        note=note,
        blocks=blocks,
        hub=repository,
        model_type=model_type,
        implementation=implementation,
        make=_hf_maker(repository),
    )


def packaged(entry: BackboneEntry, package: PackagedWeights) -> BackboneEntry:
    """Return the entry of a transformers checkpoint whose weights an installable package contains.

    Args:
        entry: The entry of :func:`hf`.
        package: Weights in a folder with all other files of the checkpoint.
    """
    return replace(entry, package=package, make=_hf_maker(entry.hub, package))


def timm(arch: str, dim: int, licence: str, blocks: int, package: PackagedWeights) -> BackboneEntry:
    """Return the entry of a timm model whose weights an installable package contains.

    Args:
        arch: Architecture, whose preprocessing in timm is that of the weights.
        dim: Width of the embedding.
        licence: Licence of the weights.
        blocks: Number of blocks or stages after which the model can be cut.
        package: The weights; their tensors have the order of timm's.
    """

    def make(name: str, device: str | None, compute: str) -> Backbone:
        weights = package.verified(name)
        require_library(name, "timm", "timm")
        # timm takes seconds to import; missing weights are reported before that.
        from pipeline.backbones.timm import from_package

        return from_package(name, arch, weights, device, compute)

    return BackboneEntry(
        modalities=("image", "video"),
        dim=dim,
        library="timm",
        checkpoint=package.distribution,
        licence=licence,
        blocks=blocks,
        package=package,
        make=make,
    )


def masked(entry: BackboneEntry, mask_ratio: float) -> BackboneEntry:
    """Return the entry of a masked autoencoder that does not see a share of the patches.

    Args:
        entry: The entry of :func:`hf`.
        mask_ratio: Share of the patches that are masked.
    """
    return replace(entry, make=_hf_maker(entry.hub, mask_ratio=mask_ratio))


def _hf_maker(repository: str, package: PackagedWeights | None = None, **options: Any) -> Maker:
    """Return the function that loads a transformers checkpoint.

    Args:
        repository: ``ORG/NAME`` on the hub.
        package: Weights in an installable package, which are preferred.
        **options: Further arguments of the class that runs the model type.
    """

    def make(name: str, device: str | None, compute: str) -> Backbone:
        from pipeline.backbones import hub

        if package is not None and package.find() is not None:
            folder = package.verified(name).parent
        else:
            folder = hub.folder(name, repository)
        # transformers takes seconds to import; missing weights are reported before that.
        from pipeline.backbones.local_folder import open_transformers

        return open_transformers(name, folder, device, compute, **options)

    return make


def visualbert(
    repository: str, vision: str = "", *, licence: str = _APACHE, **options: Any
) -> BackboneEntry:
    """Return the entry of VisualBERT over a frozen model of images.

    Args:
        repository: Repository of VisualBERT's checkpoint.
        vision: Repository of a vision encoder; empty for torchvision's detector.
        licence: Licence of the weights of both.
        **options: ``level`` of the vision encoder, or ``regions`` of the detector.
    """

    def make(name: str, device: str | None, compute: str) -> Backbone:
        from pipeline.backbones import hub

        folder, tokenizer = hub.folder(name, repository), hub.tokenizer_folder(name, _BERT)
        if vision:
            path = hub.folder(name, vision)
        else:
            from pipeline.backbones import detector

            path = detector.weights(name)
        from pipeline.backbones.visualbert import PartSource, VisualBert

        parts = PartSource(path=path, **options)
        return VisualBert(name, folder, device, compute, parts=parts, tokenizer=tokenizer)

    return BackboneEntry(
        modalities=("joint",),
        dim=768,
        library="transformers",
        checkpoint=f"{repository} + {vision or _DETECTOR}",
        licence=licence,
        blocks=12,
        hub=repository,
        other_weights=(vision or _DETECTOR_FILE,),
        tokenizer=_BERT,
        model_type="visual_bert",
        implementation="pipeline.backbones.visualbert:VisualBert",
        make=make,
    )
