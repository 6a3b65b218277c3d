"""Options of an extraction: the backbones, the level, and how inputs are read and stored.

Names that a user can give are checked against registries.
"""

import re
from dataclasses import dataclass

from features.errors import UserError
from features.registry import Registry
from pipeline.backbones.base import POOLED
from pipeline.extraction.engines import ENGINES

DTYPES = Registry("dtype", {"float16": "2 bytes", "float32": "4 bytes"})
"""Types of a stored element, and their size."""
COMPUTE_TYPES = Registry("compute type", {"float32": "full precision", "bfloat16": "autocast"})
"""Arithmetic of the forward pass."""
DECODE_MODES = Registry(
    "decode mode",
    {"exact": "all pixels", "draft": "JPEGs of twice the size or more are scaled down in decoding"},
)
"""Ways to decode an image."""
DEVICES = Registry(
    "device", {"cpu": "processor", "cuda": "NVIDIA GPU", "mps": "Apple GPU", "xpu": "Intel GPU"}
)
"""Kinds of devices; ``:N`` after the name selects one of several devices."""
MAX_FRAMES = 1024
"""Largest number of evenly spread frames of a video."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtractOptions:
    """Options of one extraction. Those that change a vector are part of its provenance.

    Raises:
        UserError: A choice is unknown, or a number is out of its range.
    """

    image: str | None = None
    """Backbone for images (see :mod:`pipeline.backbones.registry`)."""
    text: str | None = None
    """Backbone for texts."""
    video: str | None = None
    """Backbone for videos. It encodes the frames, and their vectors are averaged."""
    joint: str | None = None
    """Backbone that encodes an item's image and text together. If no backbone is given for any
    modality, CLIP ViT-B/32 encodes the images and the texts."""
    level: str = POOLED
    """``pooled``: one vector per input; ``tokens``: the tokens of the last layer; ``layer-K``: the
    hidden states after block K, from which ``--tune-blocks`` trains the blocks above."""
    max_tokens: int | None = None
    """Most tokens of a text, special ones included. The name of the backbones of texts and pairs
    gets ``@max_tokens``, so that tables of several lengths are different tables. None takes the
    length of the backbone."""
    mask_ratio: float | None = None
    """Share of the patches that a masked autoencoder does not see, in steps of 0.01. The name of
    the backbones of images and videos gets ``@mask-PERCENT``, so that tables of several ratios are
    different tables. None masks nothing."""
    frames: int | None = None
    """Number of evenly spread frames of each video. None takes one frame per second."""
    decode: str = "exact"
    """A name of :data:`DECODE_MODES`."""
    dtype: str = "float16"
    """A name of :data:`DTYPES`."""
    compute: str = "float32"
    """A name of :data:`COMPUTE_TYPES`."""
    device: str | None = None
    """A name of :data:`DEVICES`, optionally with ``:N``. None takes a CUDA device if there is one,
    else the CPU."""
    batch_size: int | None = None
    """Images, frames or texts per forward pass. None takes 32 on a CPU and 256 on a GPU."""
    overwrite: bool = False
    """Extract a table again if its vectors have another provenance (checkpoint, dtype, ...)."""
    strict: bool = False
    """Stop at the first input that cannot be used."""
    engine: str = "local"
    """A name of :data:`pipeline.extraction.engines.ENGINES`."""
    workers: int | None = None
    """Number of Ray actors. None takes one per GPU of this machine, or one per four cores."""

    def __post_init__(self) -> None:
        DTYPES.find(self.dtype)
        COMPUTE_TYPES.find(self.compute)
        DECODE_MODES.find(self.decode)
        ENGINES.find(self.engine)
        if self.device is not None:  # a backbone without weights does not check its device
            DEVICES.find(re.sub(r":\d+$", "", self.device))
        if self.batch_size is not None and self.batch_size < 1:
            raise UserError(f"--batch-size {self.batch_size} is too small; give 1 or more")
        if self.workers is not None and (self.engine == "local" or self.workers < 1):
            raise UserError(f"--workers {self.workers} needs --engine ray, and 1 or more")
        if self.mask_ratio is not None:
            percent = self.mask_ratio * 100
            if not 1 <= percent <= 99 or abs(percent - round(percent)) > 1e-6:
                raise UserError(
                    f"--mask-ratio {self.mask_ratio} is no share of the patches; give 0.01 to 0.99"
                    " in steps of 0.01, or leave it out to mask none"
                )
        if self.frames is not None and not 1 <= self.frames <= MAX_FRAMES:
            raise UserError(f"--frames {self.frames} is out of range; give 1 to {MAX_FRAMES}")

    def backbones(self) -> dict[str, str]:
        """Return the names of the chosen backbones by modality."""
        names = {"image": self.image, "text": self.text, "video": self.video, "joint": self.joint}
        return {modality: name for modality, name in names.items() if name is not None}
