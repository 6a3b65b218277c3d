"""The task of an engine: encode one modality of a dataset with one backbone."""

from dataclasses import dataclass
from pathlib import Path

from pipeline.backbones.base import POOLED, Backbone
from pipeline.media.raw_storage import RawStorage

Input = str | tuple[str, str]
"""A reference or a text; for a joint input, the reference of the image and the text."""


def split_input(value: Input) -> tuple[str, str | None]:
    """Return the source of an input, and the text of a joint input."""
    return value if isinstance(value, tuple) else (value, None)


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodeOptions:
    """Options of encoding the inputs of one modality."""

    modality: str
    """``image``, ``text``, ``video`` or ``joint``."""
    level: str = POOLED
    """``pooled``, ``tokens`` or ``layer-K``."""
    batch_size: int
    """Images, frames or texts per forward pass."""
    threads: int
    """Number of threads that read and decode."""
    draft: int | None = None
    """Pixels that the shorter side of a JPEG keeps when it is scaled down in decoding. None
    decodes all pixels."""
    frames: int | None = None
    """Number of evenly spread frames of a video. None takes one frame per second."""

    @property
    def is_pooled(self) -> bool:
        """True if an input gives one vector; False if it gives one vector per token."""
        return self.level == POOLED


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodeTask:
    """One modality of a dataset and the backbone that encodes it."""

    backbone: Backbone
    """The loaded backbone."""
    backbone_name: str
    """The name that :func:`pipeline.backbones.registry.load_backbone` takes."""
    options: EncodeOptions
    device: str | None
    """The device that the user gave, or None."""
    compute: str
    """Arithmetic of the forward pass."""
    workers: int | None
    """Number of processes of a distributed engine. None lets the engine choose."""
    raw: Path | RawStorage
    """Folder of the raw files."""
    prepared: Path
    """Folder of the prepared dataset."""

    @property
    def token_dim(self) -> int | None:
        """Width of one token; None at the level ``pooled``."""
        if self.options.is_pooled:
            return None
        return self.backbone.token_dim(self.options.level, self.options.modality)
