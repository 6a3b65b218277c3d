"""Recognise a feature table that a repeated extraction would leave as it is.

Loading a backbone takes many CPU seconds. The manifest of a table records the request that made
the table: the name of the backbone, the options that decide the vectors, and the files of the
weights with their sizes and times of modification. If the same request meets the same files and
the same content of every item, there is nothing to encode, and no backbone is loaded.
"""

from collections.abc import Iterator
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import Any

from features.errors import UserError
from features.store import FeatureStore, FeatureTable
from pipeline.backbones.base import Backbone
from pipeline.extraction.batching import prefetch
from pipeline.extraction.deduplication import content_hash
from pipeline.extraction.loading import hash_video, read_image
from pipeline.extraction.plan import ExtractionPlan
from pipeline.extraction.reports import ModalityReport
from pipeline.extraction.tasks import Input
from pipeline.media.errors import MediaError
from pipeline.media.reader import MediaReader

REQUEST = "request"
"""Entry of a table's manifest."""


def request_of(plan: ExtractionPlan, modality: str) -> dict[str, Any]:
    """Return the request of one modality, as a manifest records it."""
    options = plan.options
    return {
        "mmrec": version("mmrec"),
        "backbone": plan.names[modality],
        "modality": modality,
        "level": options.level,
        "compute": options.compute,
        "device": options.device,
        "dtype": options.dtype,
        "decode": options.decode,
        "frames": options.frames,
    }


def weights_of(backbone: Backbone) -> dict[str, list[int]] | None:
    """Return size and time of modification of each file of weights; None if they are unknown."""
    if backbone.weight_files is None:
        return None
    return {str(path.absolute()): _size_and_time(path) for path in backbone.weight_files}


def report_unchanged(plan: ExtractionPlan, modality: str) -> ModalityReport | None:
    """Return the report of an extraction that has nothing to encode, or None if it may have.

    An input that failed in the last extraction may be usable now, so the answer is None.

    Args:
        plan: A plan whose backbones need not be loaded.
        modality: One of the modalities of the plan.
    """
    table = _find_table(plan, modality)
    if table is None or not _is_equal_content(plan, table):
        return None
    provenance = table.provenance()
    assert provenance is not None  # a table with a manifest has parts
    n_inputs = plan.items.counts[modality]
    return ModalityReport(
        modality=modality,
        backbone=provenance.backbone,
        level=table.level,
        dim=provenance.dim,
        items=len(plan.items),
        encoded=0,
        shared=0,
        reused=n_inputs,
        absent=len(plan.items) - n_inputs,
        failed={},
        partial=0,
        seconds=0.0,
        rate=0.0,
        bytes=sum(part.stat().st_size for part in table.parts()),
        path=str(table.path),
    )


def _find_table(plan: ExtractionPlan, modality: str) -> FeatureTable | None:
    """Return the complete table that the same request has made for the same preparation."""
    request, info = request_of(plan, modality), plan.info
    for table in FeatureStore(plan.warehouse).tables(info.name):
        manifest = table.manifest()
        if manifest is None or manifest.get(REQUEST) != request:
            continue
        parts = {part.name for part in table.parts()}
        if parts != set(manifest["parts"]) or not _has_weights(manifest.get("weights")):
            return None
        try:
            table.check(info.fingerprint, info.inputs_of(modality))
        except UserError:
            return None
        return table
    return None


def _has_weights(recorded: object) -> bool:
    """Return True if the recorded files of weights exist with their sizes and times."""
    if not isinstance(recorded, dict):
        return False
    try:
        return all(_size_and_time(Path(path)) == stamp for path, stamp in recorded.items())
    except OSError:
        return False


def _size_and_time(path: Path) -> list[int]:
    state = path.stat()
    return [state.st_size, state.st_mtime_ns]


def _is_equal_content(plan: ExtractionPlan, table: FeatureTable) -> bool:
    """Return True if the table has the row of every input, made from the input's content."""
    columns = table.small_columns(["item", "content_hash"])
    stored = dict(
        zip(columns["item"].to_pylist(), columns["content_hash"].to_pylist(), strict=True)
    )
    if len(stored) != plan.items.counts[table.modality]:
        return False
    try:
        return all(stored.get(item) == content for item, content in _hashes(plan, table.modality))
    except MediaError:
        return False  # the extraction records it as a failure


def _hashes(plan: ExtractionPlan, modality: str) -> Iterator[tuple[int, str]]:
    """Yield (item, content hash) of the inputs.

    Raises:
        MediaError: An input cannot be read.
    """
    media = MediaReader(plan.raw, plan.warehouse.dataset_dir(plan.info.name))

    def hash_pair(pair: tuple[int, Input]) -> tuple[int, str]:
        return pair[0], _hash_input(media, modality, pair[1])

    with closing(media):
        inputs = plan.items.inputs(modality)
        yield from prefetch(hash_pair, inputs, threads=plan.threads, ahead=2 * plan.threads)


def _hash_input(media: MediaReader, modality: str, value: Input) -> str:
    if modality == "text":
        assert isinstance(value, str)
        return content_hash(value.encode())
    if modality == "video":
        assert isinstance(value, str)
        return hash_video(media, value)
    return read_image(media, value)[0]
