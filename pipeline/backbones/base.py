"""The interface of a frozen backbone, with a default for all but four of its members.

Levels of an encoder: ``pooled`` is one vector of an input; ``tokens`` are the tokens of the last
layer, as the library's forward pass returns them; ``layer-K`` are the hidden states after block K,
so that the blocks above can run on these states elsewhere; ``layer-0`` are the embeddings, which
the first block takes.

Legend: B inputs of a batch, T tokens of an input, D width of the embedding.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from features.errors import UserError

TokenIds = npt.NDArray[np.int64]
"""(T,) ids of one text, special tokens included, without padding; the length is the cost."""
Vectors = npt.NDArray[np.float32]


class UnavailableError(UserError):
    """The weights of a backbone are not on this machine and cannot be downloaded."""


POOLED = "pooled"
TOKENS = "tokens"
_LAYER = "layer-"

POOLINGS = ("cls", "mean", "own")
"""Poolings that may follow ``@`` after the name of a backbone: the class token, the mean of the
tokens, or the model's own pooling."""


def level_names(blocks: int, *, tokens: bool = True) -> tuple[str, ...]:
    """Return the names of the levels of an encoder.

    Args:
        blocks: Number of blocks after which the encoder can be cut.
        tokens: Whether the tokens of the last layer are available.
    """
    return (POOLED, *([TOKENS] * tokens), *(f"{_LAYER}{k}" for k in range(blocks)))


def split_pooling(name: str) -> tuple[str, str | None]:
    """Split ``NAME@cls`` into the name and the pooling; the pooling is None if none is given."""
    base, _, pooling = name.rpartition("@")
    return (base, pooling) if base and pooling in POOLINGS else (name, None)


def split_max_tokens(name: str) -> tuple[str, int | None]:
    """Split ``NAME@30`` into the name and the most tokens of a text; None if none are given."""
    match = re.fullmatch(r"(.+)@([0-9]{1,9})", name)
    return (match[1], int(match[2])) if match else (name, None)


def split_mask(name: str) -> tuple[str, int | None]:
    """Split ``NAME@mask-75`` into the name and the percentage of masked patches, or None."""
    match = re.fullmatch(r"(.+)@mask-([0-9]{1,9})", name)
    return (match[1], int(match[2])) if match else (name, None)


def folder_files(folder: Path) -> tuple[Path, ...]:
    """Return the paths of all files of a folder, of its subfolders too, in order."""
    return tuple(sorted(path for path in folder.rglob("*") if path.is_file()))


def block_of(level: str) -> int | None:
    """Return K of ``layer-K``, and None for the other levels."""
    return int(level.removeprefix(_LAYER)) if level.startswith(_LAYER) else None


@dataclass(frozen=True, kw_only=True, slots=True)
class InputBatch:
    """Inputs of one forward pass, as :meth:`Backbone.image` and :meth:`Backbone.texts` return them.

    A batch holds images or texts. If it holds both, they are of the same number, and each image
    and its text are one joint input.
    """

    images: Sequence[Any] = ()
    texts: Sequence[TokenIds] = ()

    @property
    def modality(self) -> str:
        """``image`` (also for the frames of videos), ``text`` or ``joint``."""
        if len(self.images) and len(self.texts):
            assert len(self.images) == len(self.texts)
            return "joint"
        return "text" if len(self.texts) else "image"

    def __len__(self) -> int:
        return max(len(self.images), len(self.texts))


class Backbone(ABC):
    """A frozen encoder of images, texts, or both.

    A subclass must define ``name``, ``modalities``, ``dim`` and :meth:`embed`; every other member
    has a default. Define ``name``, ``modalities`` and ``dim`` on the class: ``mmrec backbones``
    lists a class of an installed package without creating an object of it. Loading, batching,
    resuming and writing are done by the extraction job.

    Args:
        name: Name that the user typed; by default the name that the class defines.
        device: Device to run on; None lets the backbone choose.
        compute: Arithmetic that the user asked for. A backbone that follows it sets
            :attr:`compute`.

    Examples:
        >>> class Letters(Backbone):
        ...     name, modalities, dim = "letters", ("text",), 26
        ...     def embed(self, batch):
        ...         counts = [np.bincount(ids % 26, minlength=26) for ids in batch.texts]
        ...         return np.stack(counts).astype(np.float32)
        >>> letters = Letters()
        >>> letters.embed(InputBatch(texts=letters.texts(["red shoe", "blue hat"]))).shape
        (2, 26)
    """

    name: str
    """Name as the user typed it, or the name of a local folder; its slug is the table's folder."""
    modalities: tuple[str, ...]
    """Some of image, text, video and joint. A backbone that takes images takes video frames."""
    dim: int
    """D, the width of the vectors of :meth:`embed`."""

    # Members with a default.
    checkpoint: str = "1"
    """Fingerprint of the weights and their configuration; it must change if any vector does."""
    compute: str = "float32"
    """Arithmetic of the forward pass: ``float32`` or ``bfloat16``."""
    batch_size: int = 32
    """Number of inputs of a forward pass that suits the device."""
    blocks: int = 0
    """Number of blocks of the deepest encoder that can be cut; 0 if none can."""
    input_size: int | None = None
    """Pixels of the side to which images are resized; None if the backbone takes no images or
    images of any size."""
    licence: str = ""
    """Licence of the weights, for ``mmrec backbones``."""
    token_limit: int = 0
    """Most tokens of a text that the backbone takes, special tokens included; 0 if
    :meth:`limit_tokens` is not available."""
    max_tokens: int | None = None
    """Tokens to which :meth:`texts` truncates, as :meth:`limit_tokens` has set them; None
    truncates to the length that the backbone takes."""

    def __init__(
        self, name: str | None = None, *, device: str | None = None, compute: str = "float32"
    ) -> None:
        if name is not None:
            self.name = name
        self.libraries: dict[str, str] = {}
        """Versions of the libraries that compute the vectors."""
        self.source: dict[str, Any] = {}
        """Location of the checkpoint, from which ``--tune-blocks`` loads the upper blocks."""
        self.weight_files: tuple[Path, ...] | None = None
        """Files that decide the vectors; None if they are unknown. A repeated extraction loads the
        backbone only if one of them has changed, or if they are unknown."""

    @abstractmethod
    def embed(self, batch: InputBatch) -> Vectors:
        """Encode a batch of images, texts or pairs to vectors.

        Returns:
            (B, D) float32. The vectors are not normalized afterwards.
        """

    def image(self, image: Image.Image) -> Any:
        """Prepare one RGB image for :meth:`embed`; several threads call this at once.

        The default returns the pixels: (height, width, 3) uint8.
        """
        return np.asarray(image)

    def texts(self, texts: Sequence[str]) -> list[TokenIds]:
        """Turn texts into token ids, truncated to the length that the backbone takes.

        The default returns the Unicode code points of each text, at least one id.
        """
        return [np.asarray([ord(char) for char in text] or [0], dtype=np.int64) for text in texts]

    def limit_tokens(self, max_tokens: int) -> None:
        """Truncate texts to fewer tokens than the backbone takes; the name gets ``@max_tokens``.

        A subclass sets :attr:`token_limit`, and :meth:`texts` and :meth:`text_preprocessing` read
        :attr:`max_tokens`.

        Args:
            max_tokens: Most tokens of a text. Special tokens count, as in ``max_length`` of the
                tokenizers of transformers.

        Raises:
            UserError: The backbone takes no texts, cannot truncate them, takes fewer tokens, or
                no token of a text would be left.
        """
        if not {"text", "joint"} & set(self.modalities):
            raise UserError(
                f"backbone {self.name!r} takes no texts, so {max_tokens} tokens do not apply; leave"
                f" out --max-tokens and @{max_tokens}"
            )
        if not self.token_limit:
            raise UserError(
                f"backbone {self.name!r} cannot truncate texts to {max_tokens} tokens; leave out"
                f" --max-tokens and @{max_tokens}"
            )
        fewest = self.count_tokens("a")
        if not fewest <= max_tokens <= self.token_limit:
            raise UserError(
                f"backbone {self.name!r} cannot take {max_tokens} tokens of a text; give"
                f" --max-tokens {fewest} to {self.token_limit} (special tokens count)"
            )
        self.max_tokens = max_tokens
        self.name = f"{self.name}@{max_tokens}"

    def count_tokens(self, text: str) -> int:
        """Return the number of tokens of a text, special ones included, without padding."""
        return len(self.texts([text])[0])

    def mask_patches(self, percent: int) -> None:
        """Encode images without a share of their patches; the name gets ``@mask-PERCENT``.

        Args:
            percent: Percentage of the patches that the encoder does not see.

        Raises:
            UserError: The backbone is no masked autoencoder, or the percentage is not 1 to 99.
        """
        raise UserError(
            f"backbone {self.name!r} cannot mask {percent}% of the patches; give a masked"
            f" autoencoder such as mae-b, or leave out --mask-ratio and @mask-{percent}"
        )

    def image_preprocessing(self) -> str:
        """Describe :meth:`image` for the provenance of a feature table."""
        return "8-bit RGB pixels"

    def text_preprocessing(self) -> str:
        """Describe :meth:`texts` for the provenance of a feature table."""
        return "Unicode code points"

    def preprocessing(self, modality: str) -> str:
        """Describe the preparation of the inputs of a modality, for the provenance of a table."""
        if modality == "text":
            return self.text_preprocessing()
        if modality == "joint":
            return f"{self.image_preprocessing()}; {self.text_preprocessing()}"
        return self.image_preprocessing()

    def pooling(self, modality: str, level: str = POOLED) -> str:
        """Describe how a vector is made of the last layer's outputs, or what the tokens are."""
        return "the backbone's own pooling"

    def levels(self, modality: str) -> tuple[str, ...]:
        """Return the levels that are available for a modality: ``pooled``, ``tokens``, ..."""
        return (POOLED,)

    def token_dim(self, level: str, modality: str) -> int:
        """Return the width of one token at a level other than ``pooled``."""
        return self.dim

    def tokens(self, batch: InputBatch, level: str) -> list[Vectors]:
        """Encode a batch to tokens; blocks above ``layer-K`` are not run.

        Returns:
            (T, D) float32 for each input, without padding. The tokens of a text include the
            special ones. The tokens of an image are all tokens, the class token first if there is
            one.

        Raises:
            UserError: The backbone gives pooled vectors only.
        """
        raise UserError(
            f"backbone {self.name!r} has no level {level!r}; give --level {POOLED}, or leave it out"
        )
