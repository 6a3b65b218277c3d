"""Encode identical content once, and count what happens to every input of an extraction.

A content is identified by its hash, 32 hexadecimal digits. The hashes are in plain sets and lists;
a hash takes about 125 bytes of memory, so 10 million items take 1.2 GB.

Legend: T tokens of an input, D width of the embedding.
"""

import hashlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from features.errors import UserError
from pipeline.media.errors import MediaError

_MAX_SOURCE_CHARS = 120  # first characters of a text that a failure stores


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedRow:
    """One row of a feature table: the vector of one item, or its tokens."""

    item: int
    content: str
    """Content hash of the input."""
    vector: npt.NDArray[Any]
    """(D,), or (T, D) at a level of tokens."""
    frames: int | None = None
    """Number of encoded frames of a video."""
    tokens: int | None = None
    """Number of tokens of a text; at a level of tokens, of any input."""
    partial: bool | None = None
    """Of a video: True if its file is damaged and only the frames before the damage are used."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """An input that cannot be used."""

    item: int
    stage: str
    """``read``, ``decode`` or ``encode``."""
    reason: str
    source: str
    """The reference, or the beginning of the text."""


@dataclass(kw_only=True, slots=True)
class ExtractionCounts:
    """Counts of the items processed so far, by outcome."""

    encoded: int = 0
    shared: int = 0
    reused: int = 0
    partial: int = 0
    failures: list[Failure] = field(default_factory=list)

    @property
    def done(self) -> int:
        """Number of items whose outcome is known."""
        return self.encoded + self.shared + self.reused + len(self.failures)


class RowStore(ABC):
    """The rows that a :class:`Deduplicator` reads and adds. By default no rows are stored yet."""

    def has(self, item: int, content: str) -> bool:
        """Return True if the item has a row from an earlier run, made from this content."""
        return False

    def has_content(self, content: str) -> bool:
        """Return True if an earlier run has stored a row made from this content."""
        return False

    def keep(self, item: int) -> None:  # noqa: B027 - an empty store has nothing to keep
        """Keep the item's row from an earlier run, if there is one."""

    @abstractmethod
    def add(self, row: EncodedRow) -> None:
        """Add one new row."""

    @abstractmethod
    def copy(self, contents: dict[int, str]) -> None:
        """Give each item (key) a copy of the row of its content (value)."""


class Deduplicator:
    """Decide which inputs are encoded, pass the results to the rows, and count the outcomes.

    Args:
        rows: The rows of the table, of earlier runs and of this one.
        dtype: Type of a stored element, such as ``float16``.
        item_id: Function that returns the id of an item, for messages.
        strict: Raise an error at the first failure.
    """

    def __init__(
        self,
        rows: RowStore,
        dtype: str,
        *,
        item_id: Callable[[int], str] = str,
        strict: bool = False,
    ) -> None:
        self.counts = ExtractionCounts()
        self._rows = rows
        self._dtype = np.dtype(dtype)
        self._item_id = item_id
        self._strict = strict
        self._claimed: set[str] = set()  # contents that this run encodes or has failed to encode
        self._claim_lock = threading.Lock()
        self._duplicates: dict[int, tuple[str, str]] = {}  # item: (content, source)
        self._failed: dict[str, tuple[str, str]] = {}  # content: (stage, reason)

    def claim(self, item: int, content: str) -> bool:
        """Return True if the caller must encode this content. Threads may call concurrently."""
        if self._rows.has(item, content) or self._rows.has_content(content):
            return False
        with self._claim_lock:
            is_new = content not in self._claimed
            self._claimed.add(content)
            return is_new

    def skip(self, item: int, content: str, source: str) -> None:
        """Record an input that :meth:`claim` refused: its item or another item has its content."""
        if self._rows.has(item, content):
            self._rows.keep(item)
            self.counts.reused += 1
        else:
            self._duplicates[item] = (content, source[:_MAX_SOURCE_CHARS])

    def add(self, row: EncodedRow, source: str) -> None:
        """Store a new float32 vector, or record a failure if its elements do not fit the dtype."""
        with np.errstate(over="ignore"):
            stored = row.vector.astype(self._dtype)
        if not np.isfinite(stored).all():
            is_finite = bool(np.isfinite(row.vector).all())
            reason = f"beyond the range of {self._dtype}" if is_finite else "not a finite vector"
            self.fail(row.item, row.content, MediaError("encode", reason), source)
            return
        self._rows.add(replace(row, vector=stored))
        self.counts.encoded += 1
        self.counts.partial += bool(row.partial)

    def fail_unread(self, item: int, error: MediaError, source: str) -> None:
        """Record an input that cannot be read, and keep its row from an earlier run."""
        self._rows.keep(item)
        self.fail(item, "", error, source)

    def fail(self, item: int, content: str, error: MediaError, source: str) -> None:
        """Record an input that cannot be used.

        Raises:
            UserError: ``strict`` is set.
        """
        source = source[:_MAX_SOURCE_CHARS]
        if self._strict:
            raise UserError(
                f"item {self._item_id(item)!r}, {source!r}: {error.reason} ({error.stage});"
                " repair the input, or leave --strict out (encoded items are kept)"
            )
        if content:
            self._failed[content] = (error.stage, error.reason)
        self.counts.failures.append(
            Failure(item=item, stage=error.stage, reason=error.reason, source=source)
        )

    def share(self) -> None:
        """Give each duplicate the vector, or the failure, of the item with the same content."""
        contents: dict[int, str] = {}
        for item, (content, source) in self._duplicates.items():
            if content in self._failed:
                self.fail(item, content, MediaError(*self._failed[content]), source)
            else:
                contents[item] = content
        if contents:
            self._rows.copy(contents)
            self.counts.shared += len(contents)


def content_hash(data: bytes | Image.Image) -> str:
    """Return the 128-bit hash of an input's content as 32 hexadecimal digits."""
    if isinstance(data, Image.Image):
        data = f"{data.mode} {data.size}".encode() + data.tobytes()
    return hashlib.sha256(data).hexdigest()[:32]
