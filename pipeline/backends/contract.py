"""What the extraction job asks of a backbone, and nothing else.

Legend: B inputs of a batch, T tokens of a text, D width of the embedding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from features.errors import UserError

Tokens = npt.NDArray[np.int64]
"""(T,) ids of one text, special tokens included, no padding; its length is its cost."""
Vectors = npt.NDArray[np.float32]


class UnavailableError(UserError):
    """The weights of a backbone are neither here nor to be had; another one may be."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Inputs that one forward pass takes together: pictures or texts, as the backbone made them."""

    images: Sequence[Any] = ()
    texts: Sequence[Tokens] = ()


class Backbone(Protocol):
    """A frozen encoder. Loading, batching, resuming and writing are the caller's."""

    name: str
    """As the user wrote it, or a local folder's own name; its slug is the table's folder."""
    modalities: tuple[str, ...]
    """Of ``features.schema.MODALITIES``; whoever takes pictures takes the frames of clips too."""
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

    def preprocessing(self, modality: str) -> str:
        """Say what :meth:`image` or :meth:`texts` does to an input, for the table's provenance."""
        ...

    def pooling(self, modality: str) -> str:
        """Say how one vector is made of the last layer's outputs."""
        ...

    def image(self, picture: Image.Image) -> Any:
        """Prepare one RGB picture for :meth:`embed`; called in several threads at once."""
        ...

    def texts(self, texts: Sequence[str]) -> list[Tokens]:
        """Turn texts into token ids, truncated to what the backbone takes."""
        ...

    def embed(self, batch: Batch) -> Vectors:
        """Encode a batch of pictures or of texts: (B, D) float32, not normalised by us."""
        ...
