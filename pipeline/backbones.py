"""The table of backbones: a short name to what it is and how it is made.

Beside the short names, ``open_clip:ARCH/TAG`` (TAG may be a file of weights), ``hf:ORG/NAME`` and
a local folder name any checkpoint of those libraries. Nothing here imports torch.
"""

from collections.abc import Callable
from dataclasses import dataclass

from features.errors import UserError, unknown
from features.schema import MODALITIES
from pipeline.backends.contract import Backbone

DEFAULT = "clip-vit-b-32"

Maker = Callable[[str, str | None, str], Backbone]
"""Of the name, the device (or None to choose) and the arithmetic; imports what it needs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """What is known of a backbone before it is loaded."""

    modalities: tuple[str, ...]
    dim: int
    library: str
    checkpoint: str
    """What a person would ask that library for."""
    make: Maker


def _hashed(name: str, device: str | None, compute: str) -> Backbone:
    from pipeline.backends.hashed import Hashed

    return Hashed(name)


BACKBONES: dict[str, Entry] = {
    "hashed": Entry(
        modalities=MODALITIES, dim=128, library="mmrec", checkpoint="none needed", make=_hashed
    ),
}


def load_backbone(name: str, *, device: str | None = None, compute: str = "float32") -> Backbone:
    """Make the backbone that ``name`` stands for, with its weights on the device.

    Args:
        name: A short name, ``open_clip:ARCH/TAG``, ``hf:ORG/NAME`` or a local folder.
        device: Where it runs; a CUDA device when there is one, else the CPU.
        compute: Arithmetic of the forward pass: ``float32`` or ``bfloat16``.

    Raises:
        UserError: The name is unknown, or its weights cannot be had.
    """
    if name in BACKBONES:
        return BACKBONES[name].make(name, device, compute)
    raise unknown("backbone", name, list(BACKBONES))


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
