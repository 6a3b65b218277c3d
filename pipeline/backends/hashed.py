"""A deterministic backbone without weights: similar inputs get similar vectors, at once.

Pictures become coarse colour, colour-histogram and edge statistics; texts become hashed words and
character n-grams. Both go through a fixed random projection, which nearly keeps the angles between
sparse descriptions (Johnson and Lindenstrauss, 1984; Weinberger et al., "Feature Hashing for Large
Scale Multitask Learning", 2009). It is made for dry runs, for the demo and for tests; it knows
nothing about meaning.

Legend: B inputs of a batch, T tokens of a text, D width of the embedding.
"""

import re
import zlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import islice

import numpy as np
import numpy.typing as npt
import PIL
from PIL import Image

from pipeline.backends.contract import Batch, Tokens, Vectors

DIM = 128
_SIDE = 32  # pictures are looked at in this size
_GRID = 4  # cells a side
_BUCKETS = 1 << 14
_WORD = re.compile(r"\w+")
_N_GRAMS = (3, 4)
_MAX_GRAMS = 4096  # of one text; some 500 words
_VERSION = "1"  # raise it when any vector would change

Floats = npt.NDArray[np.float32]


class Hashed:
    """The backbone ``hashed``."""

    modalities: tuple[str, ...] = ("image", "text", "video")
    dim = DIM
    checkpoint = f"hashed-{_VERSION}"
    compute = "float32"
    batch_size = 32

    def __init__(self, name: str = "hashed") -> None:
        self.name = name
        self.libraries = {"numpy": np.__version__, "pillow": PIL.__version__}

    def preprocessing(self, modality: str) -> str:
        """Say what is kept of an input."""
        if modality == "text":
            return (
                f"lower case; words and their {_N_GRAMS}-grams, at most {_MAX_GRAMS},"
                f" hashed into {_BUCKETS} buckets"
            )
        return f"{_SIDE}x{_SIDE} box; colours and edges on a {_GRID}x{_GRID} grid, colour histogram"

    def pooling(self, modality: str) -> str:
        """Say how one vector is made."""
        return "fixed random projection, unit length"

    def image(self, picture: Image.Image) -> Floats:
        """Describe one picture by block statistics."""
        small = picture.resize((_SIDE, _SIDE), Image.Resampling.BOX, reducing_gap=2.0)
        return _describe(np.asarray(small, dtype=np.float32) / 255.0)

    def texts(self, texts: Sequence[str]) -> list[Tokens]:
        """Hash the words and n-grams of each text; a text without a word keeps its characters."""
        return [_hash_text(text) for text in texts]

    def embed(self, batch: Batch) -> Vectors:
        """Project descriptions to (B, D) unit vectors."""
        if len(batch.images):
            vectors_BD = np.stack(batch.images) @ self._image_projection
        else:
            starts_B = np.cumsum([0, *(len(ids) for ids in batch.texts[:-1])])
            rows_TD = self._text_projection[np.concatenate(batch.texts)]
            vectors_BD = np.add.reduceat(rows_TD, starts_B, axis=0)
        norms_B1 = np.linalg.norm(vectors_BD, axis=1, keepdims=True)
        return np.asarray(vectors_BD / np.maximum(norms_B1, 1e-12), dtype=np.float32)

    # RandomState's streams are frozen by numpy's policy (NEP 19); a Generator's are not.

    @cached_property
    def _image_projection(self) -> Floats:
        width = len(_describe(np.zeros((_SIDE, _SIDE, 3), dtype=np.float32)))
        return np.random.RandomState(1).standard_normal((width, DIM)).astype(np.float32)

    @cached_property
    def _text_projection(self) -> Floats:
        return np.random.RandomState(2).standard_normal((_BUCKETS, DIM)).astype(np.float32)


def _describe(pixels: Floats) -> Floats:
    """Block statistics of a (side, side, 3) picture in 0..1, each block of comparable weight."""
    cell = _SIDE // _GRID
    blocks = pixels.reshape(_GRID, cell, _GRID, cell, 3)
    # Around mid-grey, or all pictures would point the same way.
    colour = blocks.mean(axis=(1, 3)) - 0.5
    code = (np.minimum(pixels * 4, 3).astype(np.int64) * (16, 4, 1)).sum(axis=2)
    histogram = np.sqrt(np.bincount(code.ravel(), minlength=64) / code.size)
    grey = pixels.mean(axis=2)
    down, right = np.gradient(grey)
    strength = np.hypot(down, right)
    angle = np.minimum((np.arctan2(down, right) % np.pi) * (8 / np.pi), 7).astype(np.int64)
    row = np.arange(_SIDE) // cell
    where = (row[:, None] * _GRID + row[None, :]) * 8 + angle
    edges = np.bincount(where.ravel(), weights=strength.ravel(), minlength=_GRID * _GRID * 8)
    parts = [colour.ravel() * 2, histogram, np.sqrt(edges / (cell * cell))]
    return np.concatenate(parts).astype(np.float32)


def _hash_text(text: str) -> Tokens:
    words = _WORD.findall(text.lower()) or [text]
    hashes = [zlib.crc32(gram.encode()) % _BUCKETS for gram in islice(_grams(words), _MAX_GRAMS)]
    return np.asarray(hashes, dtype=np.int64)


def _grams(words: list[str]) -> Iterator[str]:
    for word in words:
        fenced = f"#{word}#"
        yield fenced
        for n in _N_GRAMS:
            if n < len(fenced):
                yield from (fenced[i : i + n] for i in range(len(fenced) - n + 1))
