"""What an extraction is told: backbones, level, and how inputs are read and vectors stored."""

import re
from dataclasses import dataclass

from features.errors import UserError, unknown
from pipeline.backbones.base import POOLED

DTYPES = ("float16", "float32")
COMPUTES = ("float32", "bfloat16")
DECODES = ("exact", "draft")
ENGINES = ("local", "ray")
DEVICES = ("cpu", "cuda", "mps", "xpu")
MOST_FRAMES = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How the tables of one extraction are made; what changes a vector is in their provenance."""

    image: str | None = None
    """Backbone for pictures (see :mod:`pipeline.backbones.registry`)."""
    text: str | None = None
    """Backbone for texts."""
    video: str | None = None
    """Backbone for clips; it sees their frames, and their vectors are averaged."""
    joint: str | None = None
    """Backbone that looks at an item's picture and text together. When no backbone is given: CLIP
    ViT-B/32 for pictures and texts, as far as there are any."""
    level: str = POOLED
    """``pooled``: one vector an input; ``tokens``: those of the last layer; ``layer-K``: the hidden
    states after block K, so that the blocks above can be trained without those below."""
    frames: int | None = None
    """Of each clip, evenly spread; none: one a second."""
    decode: str = "exact"
    """``exact``, or ``draft``: JPEGs of twice the size or more are scaled down in decoding."""
    dtype: str = "float16"
    """How the vectors are stored: ``float16`` or ``float32``."""
    compute: str = "float32"
    """Arithmetic of the forward pass: ``float32`` or ``bfloat16`` (autocast)."""
    device: str | None = None
    """Where the model runs; a CUDA device when there is one, else the CPU."""
    batch_size: int | None = None
    """Pictures, frames or texts of a forward pass; 32 on a CPU, 256 on a GPU."""
    overwrite: bool = False
    """Redo a table whose vectors were made otherwise (another checkpoint, dtype, ...) instead of
    refusing."""
    strict: bool = False
    """Stop at the first input that cannot be used."""
    engine: str = "local"
    """``local``: this process; ``ray``: actors of Ray Data, here or on a cluster."""
    workers: int | None = None
    """Actors of Ray; else one for each GPU here, or for every four cores."""

    def __post_init__(self) -> None:
        for what, value, known in (
            ("dtype", self.dtype, DTYPES),
            ("compute", self.compute, COMPUTES),
            ("decode", self.decode, DECODES),
            ("engine", self.engine, ENGINES),
        ):
            if value not in known:
                raise unknown(what, value, list(known))
        # A backbone without weights would not look at it.
        if self.device is not None and re.sub(r":\d+$", "", self.device) not in DEVICES:
            raise unknown("device", self.device, list(DEVICES))
        if self.batch_size is not None and self.batch_size < 1:
            raise UserError(f"batch size {self.batch_size} is too small; give 1 or more")
        if self.workers is not None and (self.engine == "local" or self.workers < 1):
            raise UserError(f"--workers {self.workers} needs --engine ray, and 1 or more")
        if self.frames is not None and not 1 <= self.frames <= MOST_FRAMES:
            raise UserError(f"--frames {self.frames} is not possible; give 1 to {MOST_FRAMES}")

    def backbones(self) -> dict[str, str | None]:
        """The backbone asked for, by modality."""
        return {
            "image": self.image, "text": self.text, "video": self.video, "joint": self.joint,
        }  # fmt: skip
