"""Encode the inputs of one modality in batches.

Legend: B inputs of a batch, T tokens of an input, D width of the embedding.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.backbones.base import Backbone, InputBatch, Vectors
from pipeline.extraction.batching import prefetch, token_batches
from pipeline.extraction.deduplication import Deduplicator, EncodedRow, ExtractionCounts
from pipeline.extraction.forward import ForwardPass
from pipeline.extraction.loading import LoadedInput, TextWindow, VisualLoader, load_texts
from pipeline.extraction.tasks import EncodeOptions, Input
from pipeline.media.errors import MediaError
from pipeline.media.reader import MediaReader

TOKENS_PER_TEXT = 64
"""Most tokens of a batch of texts, padding included, divided by the batch size."""


class InputEncoder:
    """Encode the inputs of one modality with one backbone, in the order of ``item``.

    Args:
        backbone: The backbone.
        options: The modality, the level and the sizes of batches.
        deduplicator: Decides which inputs are encoded, and receives the results.
        media: Reads images and videos.
        report: Called with the counts after every batch.
        notify: Called with messages for the user.
    """

    def __init__(
        self,
        *,
        backbone: Backbone,
        options: EncodeOptions,
        deduplicator: Deduplicator,
        media: MediaReader,
        report: Callable[[ExtractionCounts], None],
        notify: Callable[[str], None],
    ) -> None:
        self._backbone = backbone
        self._options = options
        self._deduplicator = deduplicator
        self._media = media
        self._report = report
        self._forward = ForwardPass(backbone, options.level, notify)

    def encode(self, inputs: Iterable[tuple[int, Input]]) -> None:
        """Encode pairs (item, input); duplicates get their vectors at the end.

        Raises:
            UserError: The device has no memory for a single input; with ``strict``, an input
                cannot be used.
        """
        if self._options.modality == "text":
            for window in load_texts(inputs, self._backbone, self._deduplicator):
                self._encode_texts(window)
        else:
            self._encode_visuals(inputs)
        self._deduplicator.share()
        self._report(self._deduplicator.counts)

    def _encode_texts(self, window: TextWindow) -> None:
        size = self._options.batch_size
        lengths = np.asarray([len(ids) for ids in window.token_ids], dtype=np.int64)
        for indices in token_batches(
            lengths, max_tokens=size * TOKENS_PER_TEXT, max_texts=4 * size
        ):
            vectors = self._forward(InputBatch(texts=[window.token_ids[i] for i in indices]))
            for i, vector in zip(indices, vectors, strict=True):
                if isinstance(vector, MediaError):
                    self._deduplicator.fail(
                        window.items[i], window.contents[i], vector, window.texts[i]
                    )
                    continue
                row = EncodedRow(
                    item=window.items[i],
                    content=window.contents[i],
                    vector=vector,
                    tokens=int(lengths[i]) if self._options.is_pooled else len(vector),
                )
                self._deduplicator.add(row, window.texts[i])
            self._report(self._deduplicator.counts)

    def _encode_visuals(self, inputs: Iterable[tuple[int, Input]]) -> None:
        size, threads = self._options.batch_size, self._options.threads
        loader = VisualLoader(self._backbone, self._options, self._deduplicator, self._media)
        ahead = threads + (2 if self._options.modality == "video" else 2 * size)
        waiting: list[tuple[_FrameMean, Any]] = []  # (input, its image or one of its frames)
        for loaded in prefetch(loader.load, inputs, threads=threads, ahead=ahead):
            if loaded.error is not None or loaded.inputs is None:
                self._record_unencoded(loaded)
                continue
            frame_mean = _FrameMean(loaded=loaded, n_frames=len(loaded.inputs))
            waiting.extend((frame_mean, image) for image in loaded.inputs)
            while len(waiting) >= size:
                self._encode_images(waiting[:size])
                del waiting[:size]
        if waiting:
            self._encode_images(waiting)

    def _record_unencoded(self, loaded: LoadedInput) -> None:
        if loaded.error is None:
            self._deduplicator.skip(loaded.item, loaded.content, loaded.source)
        elif loaded.content:
            self._deduplicator.fail(loaded.item, loaded.content, loaded.error, loaded.source)
        else:
            self._deduplicator.fail_unread(loaded.item, loaded.error, loaded.source)
        self._report(self._deduplicator.counts)

    def _encode_images(self, batch: list[tuple["_FrameMean", Any]]) -> None:
        texts = [entry.loaded.text for entry, _ in batch if entry.loaded.text is not None]
        vectors = self._forward(InputBatch(images=[image for _, image in batch], texts=texts))
        for (frame_mean, _), vector in zip(batch, vectors, strict=True):
            loaded = frame_mean.loaded
            if isinstance(vector, MediaError):
                if not frame_mean.has_failed:
                    self._deduplicator.fail(loaded.item, loaded.content, vector, loaded.source)
                frame_mean.has_failed = True
            elif not self._options.is_pooled:
                row = EncodedRow(
                    item=loaded.item, content=loaded.content, vector=vector, tokens=len(vector)
                )
                self._deduplicator.add(row, loaded.source)
            elif (mean := frame_mean.add(vector)) is not None:
                row = EncodedRow(
                    item=loaded.item,
                    content=loaded.content,
                    vector=mean,
                    frames=frame_mean.n_frames if self._options.modality == "video" else None,
                    partial=loaded.partial,
                )
                self._deduplicator.add(row, loaded.source)
        self._report(self._deduplicator.counts)


@dataclass(kw_only=True, slots=True)
class _FrameMean:
    """The mean over the frames of one input; an image is one frame."""

    loaded: LoadedInput
    n_frames: int
    n_added: int = 0
    has_failed: bool = False
    total: Any = 0.0  # (D,) sum of the vectors so far

    def add(self, vector: Vectors) -> Vectors | None:
        """Add the vector (D,) of one frame; return the mean (D,) after the last frame."""
        self.total = self.total + vector
        self.n_added += 1
        if self.n_added < self.n_frames:
            return None
        mean: Vectors = (self.total / self.n_frames).astype(np.float32)
        return mean
