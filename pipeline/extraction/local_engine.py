"""Encode in this process: threads read and decode, and the main thread runs the backbone."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from pipeline.extraction.deduplication import Deduplicator, ExtractionCounts
from pipeline.extraction.encoder import InputEncoder
from pipeline.extraction.tasks import EncodeTask, Input
from pipeline.media.reader import MediaReader


class LocalEngine:
    """Engine that encodes in this process."""

    @contextmanager
    def session(self) -> Iterator[None]:
        """Do nothing, because this engine has no other processes."""
        yield

    def encode(
        self,
        task: EncodeTask,
        inputs: Iterable[tuple[int, Input]],
        *,
        deduplicator: Deduplicator,
        report: Callable[[ExtractionCounts], None],
        notify: Callable[[str], None],
    ) -> None:
        """Encode inputs; see :meth:`pipeline.extraction.engines.Engine.encode`."""
        media = MediaReader(task.raw, task.prepared)
        try:
            encoder = InputEncoder(
                backbone=task.backbone,
                options=task.options,
                deduplicator=deduplicator,
                media=media,
                report=report,
                notify=notify,
            )
            encoder.encode(inputs)
        finally:
            media.close()
