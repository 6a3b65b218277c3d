"""What the extraction job asks of a backbone, and nothing else.

Levels: ``pooled`` is one vector of an input; ``tokens`` are the last layer's, as the library's
forward pass gives them; ``layer-K`` are the hidden states after block K, so that the blocks above
can run on them elsewhere.

Legend: B inputs of a batch, T tokens of an input, D width of the embedding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from features.errors import UserError

TokenIds = npt.NDArray[np.int64]
"""(T,) ids of one text, special tokens included, no padding; its length is its cost."""
Vectors = npt.NDArray[np.float32]


class UnavailableError(UserError):
    """The weights of a backbone are neither here nor to be had; another one may be."""


POOLED = "pooled"
TOKENS = "tokens"
_LAYER = "layer-"

POOLINGS = ("cls", "mean", "own")
"""What may follow ``@`` behind a backbone's name: its class token, the mean of its tokens, or the
model's own pooling."""


def level_names(blocks: int, *, tokens: bool = True) -> tuple[str, ...]:
    """Name the levels of an encoder with so many blocks that it can be cut behind."""
    return (POOLED, *([TOKENS] * tokens), *(f"{_LAYER}{k}" for k in range(1, blocks)))


def split_pooling(name: str) -> tuple[str, str | None]:
    """Take ``NAME@cls`` apart; none: what the backbone does when it is not asked."""
    base, _, word = name.rpartition("@")
    return (base, word) if base and word in POOLINGS else (name, None)


def block_of(level: str) -> int:
    """K of ``layer-K``; 0 for the other levels."""
    return int(level.removeprefix(_LAYER)) if level.startswith(_LAYER) else 0


@dataclass(frozen=True, kw_only=True, slots=True)
class InputBatch:
    """Inputs that one forward pass takes together, as the backbone made them.

    Pictures or texts; with both, of the same number, each pair is one joint input.
    """

    images: Sequence[Any] = ()
    texts: Sequence[TokenIds] = ()

    @property
    def modality(self) -> str:
        """``image`` (frames of clips as well), ``text`` or ``joint``."""
        if len(self.images) and len(self.texts):
            assert len(self.images) == len(self.texts)
            return "joint"
        return "text" if len(self.texts) else "image"


class Backbone(Protocol):
    """A frozen encoder. Loading, batching, resuming and writing are the caller's."""

    name: str
    """As the user wrote it, or a local folder's own name; its slug is the table's folder."""
    modalities: tuple[str, ...]
    """Of image, text, video, joint; whoever takes pictures takes the frames of clips too."""
    dim: int
    """D."""
    checkpoint: str
    """Fingerprint of the weights and of the configuration that gives them their meaning."""
    compute: str
    """Arithmetic of the forward pass: ``float32`` or ``bfloat16``."""
    batch_size: int
    """Inputs of a forward pass that suit the device."""
    libraries: dict[str, str]
    """Versions of the libraries that do the work."""

    @property
    def blocks(self) -> int:
        """Blocks of the deepest encoder that can be cut; 0: none."""
        ...

    @property
    def input_size(self) -> int | None:
        """Pixels of the side that pictures are resized to; none: it takes no pictures."""
        ...

    def preprocessing(self, modality: str) -> str:
        """Say what :meth:`image` or :meth:`texts` does to an input, for the table's provenance."""
        ...

    def pooling(self, modality: str, level: str = POOLED) -> str:
        """Say how one vector is made of the last layer's outputs, or what the tokens are."""
        ...

    def levels(self, modality: str) -> tuple[str, ...]:
        """Name what can be had of a modality: ``pooled``, ``tokens``, ``layer-1``, ..."""
        ...

    def token_dim(self, level: str, modality: str) -> int:
        """D of one token at a level other than ``pooled``."""
        ...

    def image(self, picture: Image.Image) -> Any:
        """Prepare one RGB picture for :meth:`embed`; called in several threads at once."""
        ...

    def texts(self, texts: Sequence[str]) -> list[TokenIds]:
        """Turn texts into token ids, truncated to what the backbone takes."""
        ...

    def embed(self, batch: InputBatch) -> Vectors:
        """Encode a batch of pictures, texts or pairs: (B, D) float32, not normalised by us."""
        ...

    def tokens(self, batch: InputBatch, level: str) -> list[Vectors]:
        """Encode a batch to tokens: (T, D) float32 for each input, without padding.

        Texts: their own tokens, special ones included. Pictures: all tokens, the class token
        first where there is one. Blocks above ``layer-K`` are not run.
        """
        ...
