"""A deterministic backbone without weights: similar inputs get similar vectors.

Images are described by statistics of colours, of a colour histogram and of edges; texts by hashed
words and character n-grams. Both go through a fixed random projection, which nearly keeps the
angles between sparse descriptions (Johnson and Lindenstrauss, 1984; Weinberger et al., "Feature
Hashing for Large Scale Multitask Learning", 2009). The backbone serves trial runs, the demo and
tests; it knows nothing about meaning. Its tokens are the words of a text and the cells of an
image's grid.

Legend: B inputs of a batch, T tokens of an input, G n-grams of a text, C cells of an image's grid,
D width of the embedding.
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

from pipeline.backbones.base import POOLED, TOKENS, Backbone, InputBatch, TokenIds, Vectors

DIM = 128
_SIDE = 32  # pixels of the square to which images are resized
_GRID = 4  # cells a side
_BUCKETS = 1 << 14
_WORD = re.compile(r"\w+")
_N_GRAMS = (3, 4)
_ANGLES = 8  # bins of the directions of edges
_MAX_GRAMS = 4096  # of one text: about 500 words

Floats = npt.NDArray[np.float32]


class Hashed(Backbone):
    """The backbone ``hashed``."""

    name = "hashed"
    modalities = ("image", "text", "video", "joint")
    dim = DIM
    checkpoint = "hashed-1"  # raise the number if any vector changes
    input_size = _SIDE
    token_limit = _MAX_GRAMS
    licence = "Apache-2.0"

    def __init__(
        self, name: str | None = None, *, device: str | None = None, compute: str = "float32"
    ) -> None:
        super().__init__(name)
        self.weight_files = ()
        self.libraries = {"numpy": np.__version__, "pillow": PIL.__version__}

    def image_preprocessing(self) -> str:
        """Describe the statistics of an image."""
        return f"{_SIDE}x{_SIDE} box; colours and edges on a {_GRID}x{_GRID} grid, colour histogram"

    def text_preprocessing(self) -> str:
        """Describe the n-grams of a text."""
        words = "words" if self.max_tokens is None else f"first {self.max_tokens} words"
        return (
            f"lower case; {words} and their {_N_GRAMS}-grams, at most {_MAX_GRAMS},"
            f" hashed into {_BUCKETS} buckets"
        )

    def pooling(self, modality: str, level: str = POOLED) -> str:
        """Describe how one vector is made, or what the tokens are."""
        if level == TOKENS:
            words, cells = "the words of a text", f"the {_GRID}x{_GRID} cells of a picture"
            both = f"{cells}, then {words}"
            tokens = {"text": words, "joint": both}.get(modality, cells)
            return f"fixed random projection, unit length, of {tokens}"
        projection = "fixed random projection, unit length"
        return f"{projection}; mean of picture and text" if modality == "joint" else projection

    def levels(self, modality: str) -> tuple[str, ...]:
        """Return ``pooled`` and, except for videos, ``tokens``; there are no blocks."""
        return (POOLED,) if modality == "video" else (POOLED, TOKENS)

    def image(self, image: Image.Image) -> Floats:
        """Describe one image by statistics of its cells."""
        small = image.resize((_SIDE, _SIDE), Image.Resampling.BOX, reducing_gap=2.0)
        return _describe(np.asarray(small, dtype=np.float32) / 255.0)

    def texts(self, texts: Sequence[str]) -> list[TokenIds]:
        """Hash the words and n-grams of each text; a text without a word is one word.

        ``_BUCKETS`` is added to the first id of a word, that of the word itself.
        """
        return [_hash_text(text, self.max_tokens) for text in texts]

    def count_tokens(self, text: str) -> int:
        """Return the number of words of a text."""
        return int((self.texts([text])[0] >= _BUCKETS).sum())

    def embed(self, batch: InputBatch) -> Vectors:
        """Project descriptions to (B, D) unit vectors; a pair becomes the mean of its two."""
        if batch.modality == "joint":
            parts = [
                self.embed(InputBatch(images=batch.images)),
                self.embed(InputBatch(texts=batch.texts)),
            ]
            return np.asarray((parts[0] + parts[1]) / 2, dtype=np.float32)
        if batch.modality == "image":
            return _unit(np.stack(batch.images) @ self._image_projection)
        starts_B = np.cumsum([0, *(len(ids) for ids in batch.texts[:-1])])
        return self._sums(np.concatenate(batch.texts), starts_B)

    def tokens(self, batch: InputBatch, level: str) -> list[Vectors]:
        """Project each cell of an image's grid, and each word of a text with its n-grams."""
        assert level == TOKENS
        tokens = [np.zeros((0, DIM), dtype=np.float32)] * len(batch)
        for i, description in enumerate(batch.images):
            tokens[i] = _unit(_cells(description) @ self._cell_projection)
        for i, ids_G in enumerate(batch.texts):
            words_TD = self._sums(ids_G, np.flatnonzero(ids_G >= _BUCKETS))
            tokens[i] = np.concatenate([tokens[i], words_TD])
        return tokens

    def _sums(self, ids_G: TokenIds, starts: npt.NDArray[np.int64]) -> Floats:
        """Sum the projected n-grams from each start to the next, and scale to unit length."""
        rows_GD = self._text_projection[ids_G % _BUCKETS]
        return _unit(np.add.reduceat(rows_GD, starts, axis=0))

    # RandomState's streams are frozen by numpy's policy (NEP 19); a Generator's are not.

    @cached_property
    def _image_projection(self) -> Floats:
        width = len(_describe(np.zeros((_SIDE, _SIDE, 3), dtype=np.float32)))
        return np.random.RandomState(1).standard_normal((width, DIM)).astype(np.float32)

    @cached_property
    def _text_projection(self) -> Floats:
        return np.random.RandomState(2).standard_normal((_BUCKETS, DIM)).astype(np.float32)

    @cached_property
    def _cell_projection(self) -> Floats:
        return np.random.RandomState(3).standard_normal((3 + _ANGLES, DIM)).astype(np.float32)


def _describe(pixels: Floats) -> Floats:
    """Return the statistics of (side, side, 3) pixels in 0..1, all of comparable weight."""
    cell = _SIDE // _GRID
    blocks = pixels.reshape(_GRID, cell, _GRID, cell, 3)
    # Relative to mid-grey; otherwise the vectors of all images would have one direction.
    colour = blocks.mean(axis=(1, 3)) - 0.5
    code = (np.minimum(pixels * 4, 3).astype(np.int64) * (16, 4, 1)).sum(axis=2)
    histogram = np.sqrt(np.bincount(code.ravel(), minlength=64) / code.size)
    grey = pixels.mean(axis=2)
    down, right = np.gradient(grey)
    strength = np.hypot(down, right)
    turn = (np.arctan2(down, right) % np.pi) * (_ANGLES / np.pi)
    angle = np.minimum(turn, _ANGLES - 1).astype(np.int64)
    row = np.arange(_SIDE) // cell
    bins = (row[:, None] * _GRID + row[None, :]) * _ANGLES + angle
    edges = np.bincount(bins.ravel(), weights=strength.ravel(), minlength=_GRID * _GRID * _ANGLES)
    parts = [colour.ravel() * 2, histogram, np.sqrt(edges / (cell * cell))]
    return np.concatenate(parts).astype(np.float32)


def _cells(description: Floats) -> Floats:
    """Return the colour and the edges of each cell of a description: (C, 3 + angles)."""
    cells = _GRID * _GRID
    colour_C = description[: cells * 3].reshape(cells, 3)
    edges_C = description[-cells * _ANGLES :].reshape(cells, _ANGLES)
    return np.concatenate([colour_C, edges_C], axis=1)


def _unit(vectors: Floats) -> Floats:
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.asarray(vectors / np.maximum(norms, 1e-12), dtype=np.float32)


def _hash_text(text: str, max_words: int | None) -> TokenIds:
    words = (_WORD.findall(text.lower()) or [text])[:max_words]
    return np.asarray(list(islice(_hashes(words), _MAX_GRAMS)), dtype=np.int64)


def _hashes(words: list[str]) -> Iterator[int]:
    for word in words:
        fenced = f"#{word}#"
        yield _hash(fenced) + _BUCKETS
        for n in _N_GRAMS:
            if n < len(fenced):
                yield from (_hash(fenced[i : i + n]) for i in range(len(fenced) - n + 1))


def _hash(gram: str) -> int:
    return zlib.crc32(gram.encode()) % _BUCKETS
