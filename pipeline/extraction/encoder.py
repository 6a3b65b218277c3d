"""The loop of one extraction: inputs in, rows of a table and failures out.

Legend: B inputs of a batch, T tokens of an input, D width of the embedding.
"""

import gc
import hashlib
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from features.errors import UserError
from pipeline.backbones.base import POOLED, Backbone, InputBatch, TokenIds, Vectors
from pipeline.extraction.batching import prefetch, token_batches
from pipeline.extraction.deduplication import (
    Deduplicator,
    ExtractionCounts,
    content_hash,
    is_out_of_memory,
)
from pipeline.media.errors import MediaError, one_line
from pipeline.media.images import decode_image
from pipeline.media.reader import MediaReader
from pipeline.media.video import sample_frames

TEXT_WINDOW = 4096  # texts that are sorted by length together
TEXT_MOST = 1 << 16  # characters of a text that a backbone is given; tokenizers take what they get
TOKENS_EACH = 64  # the token budget of a batch, per text of its size

Input = str | tuple[str, str]
"""A reference or a text; of a joint input both, the picture's reference first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodeOptions:
    """How the inputs of one modality are encoded."""

    modality: str
    level: str = POOLED
    batch_size: int
    threads: int
    """That read and decode."""
    draft: int | None = None
    """Decode JPEGs scaled down; see :func:`pipeline.media.images.decode_image`."""
    frames: int | None = None
    """Of a clip, evenly spread; none: one a second."""


@dataclass(kw_only=True, slots=True)
class _Loaded:
    """One picture, pair or clip on its way from the threads to the model."""

    item: int
    source: str
    content: str = ""
    inputs: list[Any] | None = None
    """What the backbone made of the picture or the frames; None: nothing to encode."""
    text: TokenIds | None = None
    """The other half of a joint input."""
    partial: bool | None = None
    """Of a clip: whether its file is damaged."""
    error: MediaError | None = None
    total: Any = 0.0  # (D,) sum of the vectors of its frames so far
    seen: int = 0


class Encoder:
    """Runs one backbone over one modality of the items, in the order of ``item``.

    Args:
        backbone: The model.
        choices: What it is to do.
        book: Knows what is encoded already, and takes the rest down.
        media: Where pictures and clips are read.
        report: Called after every batch.
        notify: Told what the person at the terminal should know.
    """

    def __init__(
        self,
        *,
        backbone: Backbone,
        choices: EncodeOptions,
        book: Deduplicator,
        media: MediaReader,
        report: Callable[[ExtractionCounts], None],
        notify: Callable[[str], None],
    ) -> None:
        self._backbone = backbone
        self._choices = choices
        self._book = book
        self._media = media
        self._batch = choices.batch_size
        self._room = math.inf  # inputs, times tokens of the longest text, that memory has room for
        self._report = report
        self._notify = notify

    def run(self, inputs: Iterable[tuple[int, Input]]) -> None:
        """Encode ``(item, input)`` pairs; twins of other items come last."""
        if self._choices.modality == "text":
            self._texts(inputs)
        else:
            self._visuals(inputs)
        self._book.share()
        self._report(self._book.tally)

    # -- pictures, pairs and clips ------------------------------------------------------------

    def _visuals(self, inputs: Iterable[tuple[int, Input]]) -> None:
        threads = self._choices.threads
        waiting: list[tuple[_Loaded, Any]] = []
        ahead = threads + (2 if self._choices.modality == "video" else 2 * self._batch)
        for loaded in prefetch(self._load, inputs, threads=threads, ahead=ahead):
            if not self._to_encode(loaded):
                self._report(self._book.tally)
                continue
            assert loaded.inputs is not None
            waiting.extend((loaded, one) for one in loaded.inputs)
            while len(waiting) >= self._batch:
                self._embed_visuals(waiting[: self._batch])
                del waiting[: self._batch]
        if waiting:
            self._embed_visuals(waiting)

    def _load(self, pair: tuple[int, Input]) -> _Loaded:
        """Read, hash and decode one input, in a thread; nothing is decoded that is known."""
        item, given = pair
        source, text = given if isinstance(given, tuple) else (given, None)
        loaded = _Loaded(item=item, source=source)
        try:
            if self._choices.modality == "video":
                with self._media.open(source) as stream:
                    loaded.content = _clip_hash(stream)
                    if self._book.claim(item, loaded.content):
                        stream.seek(0)
                        loaded.inputs, loaded.partial = sample_frames(
                            stream, self._prepare, self._choices.frames
                        )
                return loaded
            loaded.content, data = read_picture(self._media, given)
            if self._book.claim(item, loaded.content):
                loaded.inputs = [self._prepare(decode_image(data, self._choices.draft))]
                if text is not None:
                    loaded.text = self._backbone.texts([text[:TEXT_MOST]])[0]
        except MediaError as error:
            loaded.error = error
        return loaded

    def _prepare(self, picture: Image.Image) -> Any:
        try:
            return self._backbone.image(picture)
        except Exception as error:  # a transform that cannot take this size or shape
            raise MediaError("encode", one_line(error)) from None

    def _to_encode(self, loaded: _Loaded) -> bool:
        """Book an input that needs no encoding; whether this one does."""
        if loaded.error is not None:
            if loaded.content:
                self._book.fail(loaded.item, loaded.content, loaded.error, loaded.source)
            else:
                self._book.unread(loaded.item, loaded.error, loaded.source)
            return False
        if loaded.inputs is not None:
            return True
        self._book.known(loaded.item, loaded.content, loaded.source)
        return False

    def _embed_visuals(self, group: list[tuple[_Loaded, Any]]) -> None:
        texts = [loaded.text for loaded, _ in group if loaded.text is not None]
        found = self._embed(InputBatch(images=[one for _, one in group], texts=texts))
        pooled = self._choices.level == POOLED
        for (loaded, _), vector in zip(group, found, strict=True):
            assert loaded.inputs is not None
            if not pooled:
                self._book.take(
                    loaded.item, loaded.content, vector, loaded.source, tokens=len(vector)
                )
                continue
            loaded.total = loaded.total + vector
            loaded.seen += 1
            if loaded.seen == len(loaded.inputs):
                self._book.take(
                    loaded.item,
                    loaded.content,
                    (loaded.total / loaded.seen).astype(np.float32),
                    loaded.source,
                    frames=loaded.seen if self._choices.modality == "video" else None,
                    partial=loaded.partial,
                )
        self._report(self._book.tally)

    # -- texts ------------------------------------------------------------------------------

    def _texts(self, inputs: Iterable[tuple[int, Input]]) -> None:
        pooled = self._choices.level == POOLED
        windows = self._text_windows(inputs)
        for window, tokens in prefetch(self._tokenise, windows, threads=1, ahead=2):
            lengths = np.asarray([len(ids) for ids in tokens], dtype=np.int64)
            budget = self._batch * TOKENS_EACH
            for chosen in token_batches(lengths, budget=budget, most=4 * self._batch):
                found = self._embed(InputBatch(texts=[tokens[i] for i in chosen]))
                for i, vector in zip(chosen, found, strict=True):
                    item, content, text = window[i]
                    count = int(lengths[i]) if pooled else len(vector)
                    self._book.take(item, content, vector, text, tokens=count)
                self._report(self._book.tally)

    def _text_windows(
        self, inputs: Iterable[tuple[int, Input]]
    ) -> Iterator[list[tuple[int, str, str]]]:
        window: list[tuple[int, str, str]] = []
        for item, text in inputs:
            assert isinstance(text, str)
            content = content_hash(text.encode())
            if self._book.claim(item, content):
                window.append((item, content, text[:TEXT_MOST]))
            else:
                self._book.known(item, content, text)
            if len(window) == TEXT_WINDOW:
                yield window
                window = []
        if window:
            yield window

    def _tokenise(
        self, window: list[tuple[int, str, str]]
    ) -> tuple[list[tuple[int, str, str]], list[TokenIds]]:
        return window, self._backbone.texts([text for _, _, text in window])

    # -- both -------------------------------------------------------------------------------

    def _embed(self, batch: InputBatch) -> Sequence[Vectors]:
        """Encode a batch, in halves where the device has no room for it at once.

        Gives one vector (D,) for each input, or its tokens (T, D).
        """
        size = max(len(batch.images), len(batch.texts))
        half = size // 2
        cost = size * max(map(len, batch.texts), default=1)
        if size < 2 or cost <= self._room:
            try:
                return self._forward(batch, size)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                reason = one_line(error)
            if size < 2:
                raise UserError(
                    f"out of memory with a single input ({reason}); give --device cpu, --compute"
                    " bfloat16 or a smaller backbone (what is encoded is kept)"
                )
            self._room = cost // 2
            self._notify(f"out of memory with {size} inputs ({reason}); going on with {half}")
            _free()
        parts = [
            InputBatch(images=batch.images[start:end], texts=batch.texts[start:end])
            for start, end in ((0, half), (half, size))
        ]
        return [vector for part in parts for vector in self._embed(part)]

    def _forward(self, batch: InputBatch, size: int) -> Sequence[Vectors]:
        if self._choices.level != POOLED:
            return self._backbone.tokens(batch, self._choices.level)
        vectors_BD = self._backbone.embed(batch)
        assert vectors_BD.shape == (size, self._backbone.dim)
        return list(vectors_BD)


def read_picture(media: MediaReader, given: Input) -> tuple[str, bytes | Image.Image]:
    """Read a picture, or that of a pair: the fingerprint of the content, and what was read.

    Raises:
        MediaError: There is nothing to read.
    """
    source, text = given if isinstance(given, tuple) else (given, None)
    data = media.read(source)
    content = content_hash(data)
    if text is not None:
        content = content_hash(f"{content} {text}".encode())
    return content, data


def hash_clip(media: MediaReader, source: str) -> str:
    """Read a clip for the fingerprint of its content.

    Raises:
        MediaError: There is nothing to read.
    """
    with media.open(source) as stream:
        return _clip_hash(stream)


def _clip_hash(stream: BinaryIO) -> str:
    return hashlib.file_digest(stream, "sha256").hexdigest()[:32]  # type: ignore[arg-type]


def _free() -> None:
    """Give back what a failed forward pass holds; torch is not imported for it."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
