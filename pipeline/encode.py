"""The loop of one extraction: inputs in, rows of a table and failures out.

Legend: B inputs of a batch, D width of the embedding.
"""

import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.backends.contract import Backbone, Batch, Tokens, Vectors
from pipeline.ledger import Ledger
from pipeline.media import Media, MediaError, decode_image, one_line
from pipeline.stream import prefetch, token_batches
from pipeline.video import sample

TEXT_WINDOW = 4096  # texts that are sorted by length together
TOKENS_EACH = 64  # the token budget of a batch, per text of its size
_SOURCE = 120  # characters of a text that a failure remembers


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """An input that could not be used."""

    item: int
    stage: str
    """``read``, ``decode`` or ``encode``."""
    reason: str
    source: str


@dataclass(kw_only=True, slots=True)
class Tally:
    """What became of the items so far."""

    encoded: int = 0
    shared: int = 0
    reused: int = 0
    partial: int = 0
    failures: list[Failure] = field(default_factory=list)

    @property
    def done(self) -> int:
        """Items whose fate is known."""
        return self.encoded + self.shared + self.reused + len(self.failures)


@dataclass(kw_only=True, slots=True)
class _Loaded:
    """One picture or clip on its way from the threads to the model."""

    item: int
    source: str
    content: str = ""
    inputs: list[Any] | None = None
    """What the backbone made of the picture or the frames; None: nothing to encode."""
    partial: bool = False
    error: MediaError | None = None
    total: Any = 0.0  # (D,) sum of the vectors of its frames so far
    seen: int = 0


class Encoder:
    """Runs one backbone over one modality of the items, in the order of ``item``.

    Args:
        backbone: The model.
        modality: ``image``, ``text`` or ``video``.
        dtype: How vectors are stored.
        ledger: The table's rows, old and new.
        media: Where pictures and clips are read.
        batch_size: Pictures, frames or texts of a forward pass.
        threads: Threads that read and decode.
        report: Called after every batch.
    """

    def __init__(
        self,
        *,
        backbone: Backbone,
        modality: str,
        dtype: str,
        ledger: Ledger,
        media: Media,
        batch_size: int,
        threads: int,
        report: Callable[[Tally], None],
    ) -> None:
        self.tally = Tally()
        self._backbone = backbone
        self._modality = modality
        self._dtype = np.dtype(dtype)
        self._ledger = ledger
        self._media = media
        self._batch = batch_size
        self._threads = threads
        self._report = report
        # Contents that this run encodes, or could not; 150 bytes for each.
        self._claimed: set[str] = set()
        self._claiming = threading.Lock()
        self._twins: dict[int, tuple[str, str]] = {}  # item: (content, source) met before
        self._bad: dict[str, tuple[str, str]] = {}  # content: (stage, reason)

    def run(self, inputs: Iterable[tuple[int, str]]) -> None:
        """Encode ``(item, reference or text)`` pairs; twins of other items come last."""
        if self._modality == "text":
            self._texts(inputs)
        else:
            self._visuals(inputs)
        self._share()
        self._report(self.tally)

    # -- pictures and clips -----------------------------------------------------------------

    def _visuals(self, inputs: Iterable[tuple[int, str]]) -> None:
        clips = self._modality == "video"
        waiting: list[tuple[_Loaded, Any]] = []
        ahead = self._threads + (2 if clips else 2 * self._batch)
        for loaded in prefetch(self._load, inputs, threads=self._threads, ahead=ahead):
            if not self._to_encode(loaded):
                self._report(self.tally)
                continue
            assert loaded.inputs is not None
            waiting.extend((loaded, one) for one in loaded.inputs)
            while len(waiting) >= self._batch:
                self._embed_frames(waiting[: self._batch])
                del waiting[: self._batch]
        if waiting:
            self._embed_frames(waiting)

    def _load(self, pair: tuple[int, str]) -> _Loaded:
        """Read, hash and decode one input, in a thread; nothing is decoded that is known."""
        loaded = _Loaded(item=pair[0], source=pair[1])
        try:
            if self._modality == "video":
                with self._media.open(loaded.source) as stream:
                    loaded.content = hashlib.file_digest(stream, "sha256").hexdigest()[:32]
                    if self._claim(loaded.item, loaded.content):
                        stream.seek(0)
                        frames, loaded.partial = sample(stream, self._prepare)
                        loaded.inputs = frames
            else:
                data = self._media.read(loaded.source)
                loaded.content = content_hash(data)
                if self._claim(loaded.item, loaded.content):
                    loaded.inputs = [self._prepare(decode_image(data))]
        except MediaError as error:
            loaded.error = error
        return loaded

    def _prepare(self, picture: Image.Image) -> Any:
        try:
            return self._backbone.image(picture)
        except Exception as error:  # a transform that cannot take this size or shape
            raise MediaError("encode", one_line(error)) from None

    def _claim(self, item: int, content: str) -> bool:
        """Whether this item is the one that encodes this content."""
        if self._ledger.has(item, content) or self._ledger.knows(content):
            return False
        with self._claiming:
            if content in self._claimed:
                return False
            self._claimed.add(content)
            return True

    def _to_encode(self, loaded: _Loaded) -> bool:
        """Book an input that needs no encoding; whether this one does."""
        if loaded.error is not None:
            if not loaded.content:  # not read: what the table has may well be right
                self._ledger.keep(loaded.item)
            self._fail(loaded.item, loaded.content, loaded.error, loaded.source)
            return False
        if loaded.inputs is not None:
            return True
        self._book_known(loaded.item, loaded.content, loaded.source)
        return False

    def _embed_frames(self, batch: list[tuple[_Loaded, Any]]) -> None:
        vectors_BD = self._embed(Batch(images=[one for _, one in batch]))
        for (loaded, _), vector in zip(batch, vectors_BD, strict=True):
            assert loaded.inputs is not None
            loaded.total = loaded.total + vector
            loaded.seen += 1
            if loaded.seen == len(loaded.inputs):
                frames = loaded.seen if self._modality == "video" else None
                mean = (loaded.total / loaded.seen).astype(np.float32)
                self._take(loaded.item, loaded.content, mean, loaded.source, frames=frames)
                self.tally.partial += loaded.partial
        self._report(self.tally)

    # -- texts ------------------------------------------------------------------------------

    def _texts(self, inputs: Iterable[tuple[int, str]]) -> None:
        windows = self._text_windows(inputs)
        for window, tokens in prefetch(self._tokenise, windows, threads=1, ahead=2):
            lengths = np.asarray([len(ids) for ids in tokens], dtype=np.int64)
            budget = self._batch * TOKENS_EACH
            for chosen in token_batches(lengths, budget=budget, most=4 * self._batch):
                vectors_BD = self._embed(Batch(texts=[tokens[i] for i in chosen]))
                for i, vector in zip(chosen, vectors_BD, strict=True):
                    item, content, text = window[i]
                    self._take(item, content, vector, text, tokens=int(lengths[i]))
                self._report(self.tally)

    def _text_windows(
        self, inputs: Iterable[tuple[int, str]]
    ) -> Iterator[list[tuple[int, str, str]]]:
        window: list[tuple[int, str, str]] = []
        for item, text in inputs:
            content = content_hash(text.encode())
            if self._claim(item, content):
                window.append((item, content, text))
            else:
                self._book_known(item, content, text)
            if len(window) == TEXT_WINDOW:
                yield window
                window = []
        if window:
            yield window

    def _tokenise(
        self, window: list[tuple[int, str, str]]
    ) -> tuple[list[tuple[int, str, str]], list[Tokens]]:
        return window, self._backbone.texts([text for _, _, text in window])

    # -- both -------------------------------------------------------------------------------

    def _embed(self, batch: Batch) -> Vectors:
        vectors_BD = self._backbone.embed(batch)
        assert vectors_BD.shape == (len(batch.images) + len(batch.texts), self._backbone.dim)
        return vectors_BD

    def _take(
        self,
        item: int,
        content: str,
        vector: npt.NDArray[np.float32],
        source: str,
        *,
        frames: int | None = None,
        tokens: int | None = None,
    ) -> None:
        with np.errstate(over="ignore"):
            stored = vector.astype(self._dtype)
        if not np.isfinite(stored).all():
            inside = bool(np.isfinite(vector).all())
            reason = f"beyond the range of {self._dtype}" if inside else "not a finite vector"
            self._fail(item, content, MediaError("encode", reason), source)
            return
        self._ledger.add(item, content, stored, frames=frames, tokens=tokens)
        self.tally.encoded += 1

    def _book_known(self, item: int, content: str, source: str) -> None:
        if self._ledger.has(item, content):
            self._ledger.keep(item)
            self.tally.reused += 1
        else:
            self._twins[item] = (content, source[:_SOURCE])

    def _fail(self, item: int, content: str, error: MediaError, source: str) -> None:
        if content:
            self._bad[content] = (error.stage, error.reason)
        failure = Failure(
            item=item, stage=error.stage, reason=error.reason, source=source[:_SOURCE]
        )
        self.tally.failures.append(failure)

    def _share(self) -> None:
        """Give the twins the vector, or the failure, of the item that has the same content."""
        wanted: dict[int, str] = {}
        for item, (content, source) in self._twins.items():
            if content in self._bad:
                self._fail(item, content, MediaError(*self._bad[content]), source)
            else:
                wanted[item] = content
        if wanted:
            self._ledger.copy(wanted)
            self.tally.shared += len(wanted)


def content_hash(data: bytes | Image.Image) -> str:
    """Give the 128-bit fingerprint of an input's content, as 32 hexadecimal digits."""
    if isinstance(data, Image.Image):
        data = f"{data.mode} {data.size}".encode() + data.tobytes()
    return hashlib.sha256(data).hexdigest()[:32]
