"""One extraction on Ray Data: actors hold the backbone, this process holds the table.

The items go out in shards and come back in order, so the first of several with the same content is
the one that is encoded, and the table is the one that a local run writes. A shard whose worker
dies is given to another. This process holds every item's reference or text meanwhile. Ray starts
on this machine unless ``RAY_ADDRESS`` names a cluster; there the raw files must lie under the same
path on every machine.

Legend: T tokens of an input, D width of the embedding.
"""

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from features.errors import UserError
from pipeline.backbones.registry import load_backbone
from pipeline.extraction.deduplication import Deduplicator, ExtractionCounts, content_hash
from pipeline.extraction.encoder import EncodeOptions, Encoder, Input, hash_clip, read_picture
from pipeline.media.errors import MediaError
from pipeline.media.images import quiet_decoders
from pipeline.media.reader import MediaReader

_NOBODY = -1  # in place of an item: its reason is for the person at the terminal
HASHED_EACH = 512  # inputs of a shard that is only read
_FOUND = pa.schema(
    [
        ("item", pa.int32()),
        ("content", pa.string()),
        ("vector", pa.large_binary()),  # (D,) or (T, D) float32; null where there is none
        ("frames", pa.int32()),
        ("tokens", pa.int32()),
        ("partial", pa.bool_()),
        ("stage", pa.string()),
        ("reason", pa.string()),
    ]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What a worker must know; it is sent to other processes."""

    backbone: str
    device: str | None
    compute: str
    choices: EncodeOptions
    raw: Path
    prepared: Path


class _Found:
    """Stands in for a table's rows: keeps what would be written."""

    def __init__(self) -> None:
        self.rows: dict[int, dict[str, Any]] = {}

    def has(self, item: int, content: str) -> bool:
        return False

    def knows(self, content: str) -> bool:
        return False

    def keep(self, item: int) -> None:
        pass

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
        self.rows[item] = {
            "content": content, "vector": vector.tobytes(), "frames": frames, "tokens": tokens,
            "partial": partial,
        }  # fmt: skip

    def copy(self, wanted: dict[int, str]) -> int:
        by_content = {row["content"]: row for row in self.rows.values()}
        self.rows |= {item: by_content[content] for item, content in wanted.items()}
        return len(wanted)


class Worker:
    """An actor: loads the backbone once, and encodes one shard a call."""

    def __init__(self, work: Work) -> None:
        self._backbone = load_backbone(work.backbone, device=work.device, compute=work.compute)
        self._choices = work.choices
        self._media = MediaReader(work.raw, work.prepared)

    def __call__(self, shard: pa.Table) -> pa.Table:
        """Encode a shard of (item, source, text) into rows of what was found."""
        said: list[str] = []
        found = _Found()
        book = Deduplicator(found, "float32")
        encoder = Encoder(
            backbone=self._backbone,
            choices=self._choices,
            book=book,
            media=self._media,
            report=_ignore,
            notify=said.append,
        )
        with quiet_decoders():
            encoder.run(_pairs(shard))
        rows = [{"item": item, **row} for item, row in found.rows.items()]
        rows += [
            {"item": one.item, "stage": one.stage, "reason": one.reason}
            for one in book.tally.failures
        ]
        rows.sort(key=lambda row: int(row["item"]))
        rows += [{"item": _NOBODY, "reason": line} for line in said]
        return pa.Table.from_pylist(rows, schema=_FOUND)


def read_shard(shard: pa.Table, work: Work) -> pa.Table:
    """A task: read a shard of (item, source, text) for the fingerprints of its content."""
    media = MediaReader(work.raw, work.prepared)
    rows = []
    for item, given in _pairs(shard):
        row: dict[str, Any] = {"item": item}
        try:
            if work.choices.modality == "video":
                row["content"] = hash_clip(media, str(given))
            else:
                row["content"] = read_picture(media, given)[0]
        except MediaError as error:
            row |= {"stage": error.stage, "reason": error.reason}
        rows.append(row)
    media.close()
    return pa.Table.from_pylist(rows, schema=_FOUND)


def run(
    work: Work,
    inputs: Iterable[tuple[int, Input]],
    *,
    book: Deduplicator,
    workers: int,
    width: int | None,
    report: Callable[[ExtractionCounts], None],
    notify: Callable[[str], None],
) -> None:
    """Encode ``(item, input)`` pairs with actors inside a session, and take their results down.

    Args:
        work: What the actors must know.
        inputs: The pairs.
        book: Knows what is encoded already.
        workers: How many actors.
        width: D of a token; none: one vector an input.
        report: Called with what is known so far.
        notify: Told what the person at the terminal should know.
    """
    data = import_module("ray.data")
    pairs = list(inputs)
    of_item = dict(pairs)
    todo: dict[int, str] = {}  # item: content
    contents: Iterator[tuple[int, str | None, MediaError | None]]
    if work.choices.modality == "text":
        contents = ((item, content_hash(str(text).encode()), None) for item, text in pairs)
    else:
        contents = _contents(data, work, pairs)
    for item, content, error in contents:
        source = _source(of_item[item])
        if error is not None:
            book.unread(item, error, source)
        elif book.claim(item, str(content)):
            todo[item] = str(content)
        else:
            book.known(item, str(content), source)
        report(book.tally)
    if todo:
        chosen = [(item, of_item[item]) for item in todo]
        heard: set[str] = set()
        for row in _encoded(data, work, chosen, workers):
            item = row["item"]
            if item == _NOBODY:
                if row["reason"] not in heard:  # each shard finds it out anew
                    notify(row["reason"])
                heard.add(row["reason"])
                continue
            _book(book, row, todo[item], _source(of_item[item]), width)
            report(book.tally)
    book.share()
    report(book.tally)


def _contents(
    data: Any, work: Work, pairs: list[tuple[int, Input]]
) -> Iterator[tuple[int, str | None, MediaError | None]]:
    shards = data.from_arrow(_shards(pairs, HASHED_EACH))
    mapped = shards.map_batches(
        read_shard, batch_size=None, batch_format="pyarrow", fn_kwargs={"work": work}
    )
    for row in _rows(mapped):
        error = MediaError(row["stage"], row["reason"]) if row["stage"] else None
        yield row["item"], row["content"], error


def _encoded(
    data: Any, work: Work, pairs: list[tuple[int, Input]], workers: int
) -> Iterator[dict[str, Any]]:
    """Send shards of pairs through actors; give their rows in the order of the pairs."""
    shards = _shards(pairs, 4 * work.choices.batch_size)
    mapped = data.from_arrow(shards).map_batches(
        Worker,
        batch_size=None,  # a whole shard
        batch_format="pyarrow",
        fn_constructor_kwargs={"work": work},
        compute=data.ActorPoolStrategy(size=max(1, min(workers, len(shards)))),
        num_gpus=1 if (work.device or "").startswith("cuda") else 0,
    )
    yield from _rows(mapped)


def _rows(mapped: Any) -> Iterator[dict[str, Any]]:
    for batch in mapped.iter_batches(batch_size=None, batch_format="pyarrow"):
        yield from batch.to_pylist()


def _shards(pairs: list[tuple[int, Input]], each: int) -> list[pa.Table]:
    rows = iter(pairs)
    return [_shard(part) for part in iter(lambda: list(islice(rows, each)), [])]


def _book(
    book: Deduplicator, row: dict[str, Any], content: str, source: str, width: int | None
) -> None:
    error = None
    if row["vector"] is None:
        error = MediaError(row["stage"], row["reason"])
    elif row["content"] != content:
        error = MediaError("read", "changed while it was read")
    if error is not None:
        book.fail(row["item"], content, error, source)
        return
    vector = np.frombuffer(row["vector"], np.float32)
    if width is not None:
        vector = vector.reshape(-1, width)
    book.take(
        row["item"], row["content"], vector, source, frames=row["frames"], tokens=row["tokens"],
        partial=row["partial"],
    )  # fmt: skip


def _source(given: Input) -> str:
    return given[0] if isinstance(given, tuple) else given


def _shard(pairs: list[tuple[int, Input]]) -> pa.Table:
    both = [given if isinstance(given, tuple) else (given, None) for _, given in pairs]
    return pa.table(
        {
            "item": pa.array([item for item, _ in pairs], pa.int32()),
            "source": pa.array([source for source, _ in both], pa.string()),
            "text": pa.array([text for _, text in both], pa.string()),
        }
    )


def _pairs(shard: pa.Table) -> Iterator[tuple[int, Input]]:
    for row in shard.to_pylist():
        given = row["source"] if row["text"] is None else (row["source"], row["text"])
        yield row["item"], given


def _ignore(tally: ExtractionCounts) -> None:
    pass


@contextmanager
def session() -> Iterator[None]:
    """Start Ray for one extraction, or join what runs already, and leave it as it was.

    Raises:
        UserError: Ray is not installed, or a worker cannot work.
    """
    # What its own processes log is for its developers; errors come back as exceptions.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        ray, data = import_module("ray"), import_module("ray.data")
    except ImportError:
        raise UserError(
            "--engine ray needs Ray; install it by: pip install 'mmrec[ray]', or leave it out"
        ) from None
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    started = not ray.is_initialized()
    if started:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    context = data.DataContext.get_current()
    before = context.execution_options.preserve_order, context.enable_progress_bars
    context.execution_options.preserve_order, context.enable_progress_bars = True, False
    try:
        yield
    except ray.exceptions.RayError as error:
        line = " ".join(str(error).split())
        raise UserError(f"a worker of Ray cannot work: {line[-300:]}") from None
    finally:
        context.execution_options.preserve_order, context.enable_progress_bars = before
        if started:
            ray.shutdown()


def place(device: str | None) -> str | None:
    """Where a worker's backbone runs: on a GPU of its own, the only one it sees, if there are any.

    Ray shows no GPU to a worker that asks for none, and a worker asks for one when told ``cuda``.
    """
    torch = sys.modules.get("torch")  # a backbone without weights has not imported it
    if device is None and torch is not None and torch.cuda.is_available():
        return "cuda"
    return "cuda" if device is not None and device.startswith("cuda") else device


def default_workers(device: str | None) -> int:
    """One worker for each GPU of this machine, or one for every four cores."""
    if device is not None and device.startswith("cuda"):
        import torch

        return max(1, torch.cuda.device_count())
    return max(1, (os.cpu_count() or 1) // 4)
