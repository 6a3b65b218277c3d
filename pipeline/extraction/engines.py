"""The registry of engines: the ways to run the backbones of an extraction.

A new engine is a file with a class that has the methods of :class:`Engine`, a function in this
file that imports the class, and one line in :data:`ENGINES`.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Protocol

from features.registry import Registry
from pipeline.extraction.deduplication import Deduplicator, ExtractionCounts
from pipeline.extraction.tasks import EncodeTask, Input


class Engine(Protocol):
    """Run the backbones of one extraction."""

    def session(self) -> AbstractContextManager[None]:
        """Start the processes of the engine, and stop them at the end of the block.

        Raises:
            UserError: The engine is not installed.
        """
        ...

    def encode(
        self,
        task: EncodeTask,
        inputs: Iterable[tuple[int, Input]],
        *,
        deduplicator: Deduplicator,
        report: Callable[[ExtractionCounts], None],
        notify: Callable[[str], None],
    ) -> None:
        """Encode inputs and pass the results to the deduplicator.

        Args:
            task: The modality to encode, and its backbone.
            inputs: Pairs (item, input) in the order of ``item``.
            deduplicator: Decides which inputs are encoded, and receives the results.
            report: Called with the counts so far.
            notify: Called with messages for the user.
        """
        ...


def _local() -> Engine:
    from pipeline.extraction.local_engine import LocalEngine

    return LocalEngine()


def _ray() -> Engine:
    from pipeline.extraction.ray_engine import RayEngine

    return RayEngine()


ENGINES: Registry[Callable[[], Engine]] = Registry("engine", {"local": _local, "ray": _ray})
"""``local`` encodes in this process; ``ray`` on Ray Data actors, on this machine or a cluster."""
