"""What became of every input of one extraction: encoded, shared, reused or failed."""

import hashlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from features.errors import UserError
from pipeline.extraction.digests import Digests, digest
from pipeline.media.errors import MediaError

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
class ExtractionCounts:
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


class Rows(Protocol):
    """The rows of a feature table, as deduplication needs them.

    See :class:`pipeline.extraction.table_writer.FeatureTableWriter`.
    """

    def has(self, item: int, content: str) -> bool:
        """Whether the item's own row was made from this content."""
        ...

    def knows(self, content: str) -> bool:
        """Whether some row was made from this content before this run."""
        ...

    def keep(self, item: int) -> None:
        """Say that the item's row, when it has one, is not stale."""
        ...

    def add(
        self,
        item: int,
        content: str,
        vector: npt.NDArray[Any],
        *,
        frames: int | None = None,
        tokens: int | None = None,
        partial: bool | None = None,
    ) -> None:
        """Take one new vector, or its tokens."""
        ...

    def copy(self, wanted: dict[int, str]) -> int:
        """Give items the stored vector of the same content."""
        ...


class Deduplicator:
    """Knows which content is encoded already, and takes down what happens to the rest.

    Args:
        ledger: The table's rows, old and new.
        dtype: How vectors are stored.
        strict: Gives an item's name; with it the first failure ends the job.
        room: How many contents to foresee.
    """

    def __init__(
        self, ledger: Rows, dtype: str, strict: Callable[[int], str] | None = None, room: int = 0
    ) -> None:
        self.tally = ExtractionCounts()
        self._ledger = ledger
        self._dtype = np.dtype(dtype)
        self._strict = strict
        self._claimed = Digests(room)  # contents that this run encodes, or could not
        self._claiming = threading.Lock()
        self._twins: dict[int, tuple[str, str]] = {}  # item: (content, source) met before
        self._bad: dict[str, tuple[str, str]] = {}  # content: (stage, reason)

    def claim(self, item: int, content: str) -> bool:
        """Whether this item is the one that encodes this content; called in several threads."""
        if self._ledger.has(item, content) or self._ledger.knows(content):
            return False
        with self._claiming:
            return self._claimed.add(digest(content))

    def known(self, item: int, content: str, source: str) -> None:
        """Book an input that needs no encoding: it has its row, or another item's will do."""
        if self._ledger.has(item, content):
            self._ledger.keep(item)
            self.tally.reused += 1
        else:
            self._twins[item] = (content, source[:_SOURCE])

    def take(
        self,
        item: int,
        content: str,
        vector: npt.NDArray[np.float32],
        source: str,
        *,
        frames: int | None = None,
        tokens: int | None = None,
        partial: bool | None = None,
    ) -> None:
        """Book one new vector (D,), or its tokens (T, D); partial: whether of a damaged clip."""
        with np.errstate(over="ignore"):
            stored = vector.astype(self._dtype)
        if not np.isfinite(stored).all():
            inside = bool(np.isfinite(vector).all())
            reason = f"beyond the range of {self._dtype}" if inside else "not a finite vector"
            self.fail(item, content, MediaError("encode", reason), source)
            return
        self._ledger.add(item, content, stored, frames=frames, tokens=tokens, partial=partial)
        self.tally.encoded += 1
        self.tally.partial += bool(partial)

    def unread(self, item: int, error: MediaError, source: str) -> None:
        """Book an input that could not be read: what the table has of it may well be right."""
        self._ledger.keep(item)
        self.fail(item, "", error, source)

    def fail(self, item: int, content: str, error: MediaError, source: str) -> None:
        """Book an input that cannot be used.

        Raises:
            UserError: The job is a strict one.
        """
        if self._strict is not None:
            raise UserError(
                f"item {self._strict(item)!r}, {source[:_SOURCE]!r}: {error.reason}"
                f" ({error.stage}); mend it, or leave --strict out (what is encoded is kept)"
            )
        if content:
            self._bad[content] = (error.stage, error.reason)
        failure = Failure(
            item=item, stage=error.stage, reason=error.reason, source=source[:_SOURCE]
        )
        self.tally.failures.append(failure)

    def share(self) -> None:
        """Give the twins the vector, or the failure, of the item that has the same content."""
        wanted: dict[int, str] = {}
        for item, (content, source) in self._twins.items():
            if content in self._bad:
                self.fail(item, content, MediaError(*self._bad[content]), source)
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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a forward pass may succeed with fewer inputs; torch's classes are not imported."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    words = ("out of memory", "not enough memory", "can't allocate memory")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
