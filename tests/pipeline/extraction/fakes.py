"""Backbones for tests: the weightless one, recorded, slow or with other vectors."""

import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from features.schema import FEATURE_MODALITIES
from pipeline.backbones.base import Backbone, InputBatch, Vectors
from pipeline.backbones.entries import BackboneEntry
from pipeline.backbones.hashed import DIM, Hashed


def mark(value: object) -> str:
    """Return the name of an input in the log of :class:`Watched`, a hash of its content."""
    return f"{zlib.crc32(np.ascontiguousarray(value).tobytes()):08x}"


class Watched(Hashed):
    """Log every input that is encoded; may wait, and may call ``after`` with each batch."""

    def __init__(
        self,
        name: str,
        log: Path,
        *,
        seconds: float = 0.0,
        after: Callable[[Vectors], Vectors] = lambda vectors: vectors,
        checkpoint: str = "watched-1",
    ) -> None:
        super().__init__(name)
        self.weight_files = None  # every extraction loads it
        self.log = log
        self.seconds = seconds
        self.after = after
        self.checkpoint = checkpoint

    def embed(self, batch: InputBatch) -> Vectors:
        time.sleep(self.seconds)
        vectors = self.after(super().embed(batch))
        self._note(batch)
        return vectors

    def tokens(self, batch: InputBatch, level: str) -> list[Vectors]:
        time.sleep(self.seconds)
        tokens = super().tokens(batch, level)
        self._note(batch)
        return tokens

    def _note(self, batch: InputBatch) -> None:
        with self.log.open("a") as stream:
            stream.writelines(f"{mark(value)}\n" for value in (*batch.images, *batch.texts))

    def seen(self) -> list[str]:
        """Return the marks of the inputs that were encoded since :meth:`forget`."""
        return self.log.read_text().split() if self.log.exists() else []

    def forget(self) -> None:
        self.log.unlink(missing_ok=True)


class Brief:
    """A loaded backbone that runs only its first batches, then returns their vectors again.

    Its memory is that of any backbone: weights, libraries, transforms and a forward pass.
    """

    def __init__(self, backbone: Any, batches: int = 4) -> None:
        self._backbone = backbone
        self._left = batches
        self._last: Vectors = np.zeros((0, backbone.dim), np.float32)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backbone, name)

    def embed(self, batch: InputBatch) -> Vectors:
        size = max(len(batch.images), len(batch.texts))
        if self._left:
            self._left -= 1
            self._last = self._backbone.embed(batch)
        return np.resize(self._last, (size, self._backbone.dim))


def entry(backbone: Backbone) -> BackboneEntry:
    """Make a registry entry of a backbone that is already loaded."""
    return BackboneEntry(
        modalities=FEATURE_MODALITIES,
        dim=DIM,
        library="tests",
        checkpoint="none",
        make=lambda name, device, compute: backbone,
    )
