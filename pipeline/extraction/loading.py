"""Load the inputs of a backbone: read, hash, decode and preprocess them ahead of the model.

An input is decoded only if the deduplicator claims its content.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from PIL import Image

from pipeline.backbones.base import Backbone, TokenIds
from pipeline.extraction.batching import prefetch
from pipeline.extraction.deduplication import Deduplicator, content_hash
from pipeline.extraction.tasks import EncodeOptions, Input, split_input
from pipeline.media.errors import MediaError, one_line
from pipeline.media.images import decode_image
from pipeline.media.reader import MediaReader
from pipeline.media.video import sample_frames

TEXT_WINDOW = 4096
"""Number of texts that are sorted by length together."""
MAX_TEXT_CHARS = 1 << 16
"""First characters of a text that a backbone receives. Tokenizers do not limit the length."""


NO_TOKEN = MediaError("encode", "a text without a token of the backbone's vocabulary")


@dataclass(kw_only=True, slots=True)
class LoadedInput:
    """A loaded image, joint input or video: the result of :meth:`VisualLoader.load`."""

    item: int
    source: str
    content: str = ""
    """Content hash; empty if the input cannot be read."""
    inputs: list[Any] | None = None
    """The preprocessed image or frames; None if the deduplicator has not claimed the content."""
    text: TokenIds | None = None
    """The text of a joint input."""
    partial: bool | None = None
    """Of a video: True if its file is damaged."""
    error: MediaError | None = None


class VisualLoader:
    """Load images, joint inputs and videos. Threads may call :meth:`load` concurrently.

    Args:
        backbone: Prepares images and texts.
        options: The modality, and how it is decoded.
        deduplicator: Claims the contents to encode.
        media: Reads images and videos.
    """

    def __init__(
        self,
        backbone: Backbone,
        options: EncodeOptions,
        deduplicator: Deduplicator,
        media: MediaReader,
    ) -> None:
        self._backbone = backbone
        self._options = options
        self._deduplicator = deduplicator
        self._media = media

    def load(self, pair: tuple[int, Input]) -> LoadedInput:
        """Load the input of one item. A MediaError is returned in ``error``, not raised."""
        item, value = pair
        loaded = LoadedInput(item=item, source=split_input(value)[0])
        try:
            if self._options.modality == "video":
                self._load_video(loaded)
            else:
                self._load_image(loaded, value)
        except MediaError as error:
            loaded.error = error
        return loaded

    def _load_image(self, loaded: LoadedInput, value: Input) -> None:
        loaded.content, data = read_image(self._media, value)
        if not self._deduplicator.claim(loaded.item, loaded.content):
            return
        loaded.inputs = [self._prepare(decode_image(data, self._options.draft))]
        text = split_input(value)[1]
        if text is not None:
            loaded.text = self._backbone.texts([text[:MAX_TEXT_CHARS]])[0]
            if not len(loaded.text):
                raise NO_TOKEN

    def _load_video(self, loaded: LoadedInput) -> None:
        with self._media.open(loaded.source) as stream:
            loaded.content = _hash_stream(stream)
            if not self._deduplicator.claim(loaded.item, loaded.content):
                return
            stream.seek(0)
            loaded.inputs, loaded.partial = sample_frames(
                stream, self._prepare, self._options.frames
            )

    def _prepare(self, image: Image.Image) -> Any:
        try:
            return self._backbone.image(image)
        except Exception as error:  # for example, the transform cannot take this size
            raise MediaError("encode", one_line(error)) from None


@dataclass(frozen=True, kw_only=True, slots=True)
class TextWindow:
    """Consecutive texts to encode: R items, their content hashes, texts and token ids."""

    items: list[int]
    contents: list[str]
    texts: list[str]
    token_ids: list[TokenIds]


def load_texts(
    inputs: Iterable[tuple[int, Input]], backbone: Backbone, deduplicator: Deduplicator
) -> Iterator[TextWindow]:
    """Yield the texts that the deduplicator claims, tokenised one window ahead of the consumer."""

    def tokenise(rows: list[tuple[int, str, str]]) -> TextWindow:
        items, contents, texts = (list(column) for column in zip(*rows, strict=True))
        token_ids = backbone.texts(texts)
        return TextWindow(items=items, contents=contents, texts=texts, token_ids=token_ids)

    for window in prefetch(tokenise, _claimed_texts(inputs, deduplicator), threads=1, ahead=2):
        yield _without_empty(window, deduplicator)


def _without_empty(window: TextWindow, deduplicator: Deduplicator) -> TextWindow:
    """Record the texts of a window that have no token as failures; return the others."""
    keep = []
    for index, ids in enumerate(window.token_ids):
        if len(ids):
            keep.append(index)
        else:
            row = (window.items[index], window.contents[index])
            deduplicator.fail(*row, NO_TOKEN, window.texts[index])
    return TextWindow(
        items=[window.items[i] for i in keep],
        contents=[window.contents[i] for i in keep],
        texts=[window.texts[i] for i in keep],
        token_ids=[window.token_ids[i] for i in keep],
    )


def _claimed_texts(
    inputs: Iterable[tuple[int, Input]], deduplicator: Deduplicator
) -> Iterator[list[tuple[int, str, str]]]:
    """Yield windows of (item, content hash, text)."""
    window: list[tuple[int, str, str]] = []
    for item, text in inputs:
        assert isinstance(text, str)
        content = content_hash(text.encode())
        if deduplicator.claim(item, content):
            window.append((item, content, text[:MAX_TEXT_CHARS]))
        else:
            deduplicator.skip(item, content, text)
        if len(window) == TEXT_WINDOW:
            yield window
            window = []
    if window:
        yield window


def read_image(media: MediaReader, value: Input) -> tuple[str, bytes | Image.Image]:
    """Read an image, or the image of a joint input.

    Returns:
        The content hash, which for a joint input includes the text, and the bytes or the image.

    Raises:
        MediaError: The image cannot be read.
    """
    source, text = split_input(value)
    data = media.read(source)
    content = content_hash(data)
    if text is not None:
        content = content_hash(f"{content} {text}".encode())
    return content, data


def hash_video(media: MediaReader, source: str) -> str:
    """Read a video and return its content hash.

    Raises:
        MediaError: The video cannot be read.
    """
    with media.open(source) as stream:
        return _hash_stream(stream)


def _hash_stream(stream: BinaryIO) -> str:
    return hashlib.file_digest(stream, "sha256").hexdigest()[:32]  # type: ignore[arg-type]
