"""Describe the backbones of the registry, without loading one and without torch."""

from typing import Any

from pipeline.backbones import hub
from pipeline.backbones.entries import BackboneEntry
from pipeline.backbones.registry import BACKBONES, OFFLINE, WEIGHTLESS


def list_backbones() -> list[dict[str, Any]]:
    """Return one row for each short name.

    Returns:
        Rows with ``name``, ``modalities``, ``dim``, ``blocks`` (of the deepest encoder that can be
        cut), ``levels``, ``library``, ``checkpoint``, ``licence`` (of the weights), ``note``,
        ``offline`` (whether the backbone works without a network on this machine), and ``origin``
        (the package that provides the entry).
    """
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
            "offline": is_offline(entry),
            "origin": BACKBONES.origin(name),
        }
        for name, entry in BACKBONES.items()
    ]


def is_offline(entry: BackboneEntry) -> bool:
    """Return whether a backbone works without a network on this machine."""
    if entry.tokenizer and not hub.has_tokenizer(entry.tokenizer):
        return False
    if entry.package is not None and (not entry.hub or entry.package.find() is not None):
        return entry.package.find() is not None
    return all(
        hub.torch_file(weights).is_file() if weights.endswith(".pth") else hub.is_cached(weights)
        for weights in (entry.hub, *entry.other_weights)
        if weights
    )


def offline_backbone(modality: str) -> str:
    """Return the backbone of a modality that needs no network: with weights, if they are installed.

    Args:
        modality: ``image``, ``text``, ``video`` or ``joint``.

    Returns:
        The name in :data:`OFFLINE` if its weights are on this machine, else :data:`WEIGHTLESS`.
    """
    name = OFFLINE.get(modality, WEIGHTLESS)
    return name if is_offline(BACKBONES.find(name)) else WEIGHTLESS
