"""Encode on Ray Data: actors run the backbone, and this process writes the table.

The inputs are sent in shards, and the results come back in order. Of several inputs with the same
content, the first is therefore encoded, and the table equals that of the local engine. If a worker
dies, another worker gets its shard. This process has the reference or the text of every item in
memory. Ray starts on this machine unless ``RAY_ADDRESS`` names a cluster; the raw files must have
the same path on all machines of a cluster.

Legend: T tokens of an input, D width of the embedding.
"""

import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from features.errors import UserError
from pipeline.backbones.loading import load_backbone
from pipeline.extraction.deduplication import (
    Deduplicator,
    EncodedRow,
    ExtractionCounts,
    RowStore,
    content_hash,
)
from pipeline.extraction.encoder import InputEncoder
from pipeline.extraction.loading import hash_video, read_image
from pipeline.extraction.tasks import EncodeOptions, EncodeTask, Input, split_input
from pipeline.media.errors import MediaError
from pipeline.media.images import quiet_decoders
from pipeline.media.raw_storage import RawStorage
from pipeline.media.reader import MediaReader

INPUTS_PER_HASH_SHARD = 512
"""Number of inputs of a shard that is only read and hashed."""
_MOST_REASON = 200  # characters of Ray's message
_RAY_ENDED = (
    "error: a process of Ray has ended, so the extraction stops; what is written is kept;"
    " free memory and run the command again, or leave --engine out"
)
_MESSAGE = -1  # value of `item` in a row whose `reason` is a message for the user
_RESULTS = pa.schema(
    [
        ("item", pa.int32()),
        ("content", pa.string()),
        ("vector", pa.large_binary()),  # (D,) or (T, D) float32; null if there is none
        ("frames", pa.int32()),
        ("tokens", pa.int32()),
        ("partial", pa.bool_()),
        ("stage", pa.string()),
        ("reason", pa.string()),
    ]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerConfig:
    """The part of an :class:`EncodeTask` that is sent to other processes."""

    backbone_name: str
    device: str | None
    compute: str
    options: EncodeOptions
    raw: Path | RawStorage
    prepared: Path


# -- in this process ----------------------------------------------------------------------------


class RayEngine:
    """Engine that encodes on actors of Ray Data."""

    @contextmanager
    def session(self) -> Iterator[None]:
        """Start Ray or use the running Ray, and restore its settings at the end of the block.

        Raises:
            UserError: Ray is not installed, or a worker fails in the block.
        """
        # Errors come back as exceptions, so the logs of Ray's processes are not shown.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        try:
            ray, data = import_module("ray"), import_module("ray.data")
        except ImportError:
            raise UserError(
                "--engine ray needs Ray; install it by: pip install 'mmrec[ray]', or leave it out"
            ) from None
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        is_started_here = not ray.is_initialized()
        if is_started_here:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                _start_ray(ray)
        context = data.DataContext.get_current()
        before = context.execution_options.preserve_order, context.enable_progress_bars
        context.execution_options.preserve_order, context.enable_progress_bars = True, False
        try:
            with _message_at_exit():
                yield
        except ray.exceptions.RayError as error:
            line = " ".join(str(error).split())
            raise UserError(
                f"a worker of Ray failed: {line[-300:]}; repair the cause, or leave --engine out"
            ) from None
        finally:
            context.execution_options.preserve_order, context.enable_progress_bars = before
            if is_started_here:
                ray.shutdown()

    def encode(
        self,
        task: EncodeTask,
        inputs: Iterable[tuple[int, Input]],
        *,
        deduplicator: Deduplicator,
        report: Callable[[ExtractionCounts], None],
        notify: Callable[[str], None],
    ) -> None:
        """Encode inputs inside a session; see :meth:`pipeline.extraction.engines.Engine.encode`."""
        data = import_module("ray.data")
        device = worker_device(task.device)
        config = WorkerConfig(
            backbone_name=task.backbone_name,
            device=device,
            compute=task.compute,
            options=task.options,
            raw=task.raw.resolve(),
            prepared=task.prepared.resolve(),
        )
        pairs = dict(inputs)
        contents: dict[int, str] = {}  # content hash of each item to encode
        for item, content, error in _hash_inputs(data, config, pairs):
            source = split_input(pairs[item])[0]
            if error is not None:
                deduplicator.fail_unread(item, error, source)
            elif deduplicator.claim(item, content):
                contents[item] = content
            else:
                deduplicator.skip(item, content, source)
            report(deduplicator.counts)
        if contents:
            messages: set[str] = set()
            workers = task.workers or default_workers(device)
            claimed = {item: pairs[item] for item in contents}
            for row in _encode_inputs(data, config, claimed, workers):
                item = row["item"]
                if item == _MESSAGE:
                    if row["reason"] not in messages:  # every shard may send the same message
                        notify(row["reason"])
                    messages.add(row["reason"])
                    continue
                source = split_input(pairs[item])[0]
                record_result(deduplicator, row, contents[item], source, task.token_dim)
                report(deduplicator.counts)
        deduplicator.share()
        report(deduplicator.counts)


def _start_ray(ray: Any) -> None:
    """Start Ray or connect to it.

    Raises:
        UserError: Ray does not start.
    """
    try:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # Ray raises plain exceptions too
        reason = " ".join(str(error).split())[:_MOST_REASON]
        raise UserError(
            f"Ray does not start ({reason}); free memory and run the command again, or leave"
            " --engine out"
        ) from None


@contextmanager
def _message_at_exit() -> Iterator[None]:
    """Print one line if this process ends within the body.

    Ray ends the process without an exception when one of its own processes (raylet, agent, GCS)
    has ended. A shell therefore waits for the end of this process and prints the line.
    """
    command = ["sh", "-c", 'read -r end || printf "%s\\n" "$0" >&2', _RAY_ENDED]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as shell:
        try:
            yield
        finally:
            assert shell.stdin is not None
            with suppress(BrokenPipeError):
                shell.stdin.write(b"end\n")
                shell.stdin.flush()


def record_result(
    deduplicator: Deduplicator,
    row: dict[str, Any],
    content: str,
    source: str,
    token_dim: int | None,
) -> None:
    """Pass one row of a worker's results to the deduplicator.

    Args:
        deduplicator: Receives a vector or a failure.
        row: The row: item, content, vector, frames, tokens, partial, stage and reason.
        content: Content hash of the input when it was claimed.
        source: The reference or the text.
        token_dim: Width D of a token, or None if the row has one vector.
    """
    error = None
    if row["vector"] is None:
        error = MediaError(row["stage"], row["reason"])
    elif row["content"] != content:
        error = MediaError("read", "changed while it was read")
    if error is not None:
        deduplicator.fail(row["item"], content, error, source)
        return
    vector = np.frombuffer(row["vector"], np.float32)
    if token_dim is not None:
        vector = vector.reshape(-1, token_dim)
    columns = ("item", "content", "frames", "tokens", "partial")
    deduplicator.add(EncodedRow(vector=vector, **{name: row[name] for name in columns}), source)


def worker_device(device: str | None) -> str | None:
    """Return the device of a worker's backbone: ``cuda`` if this machine has a GPU.

    Ray assigns a GPU only to workers that request one; with ``cuda``, each worker requests one.
    """
    torch = sys.modules.get("torch")  # a backbone without weights has not imported torch
    if device is None and torch is not None and torch.cuda.is_available():
        return "cuda"
    return "cuda" if device is not None and device.startswith("cuda") else device


def default_workers(device: str | None) -> int:
    """Return the number of workers: one per GPU of this machine, or one per four cores."""
    if device is not None and device.startswith("cuda"):
        import torch

        return max(1, torch.cuda.device_count())
    return max(1, (os.cpu_count() or 1) // 4)


def _hash_inputs(
    data: Any, config: WorkerConfig, pairs: dict[int, Input]
) -> Iterator[tuple[int, str, MediaError | None]]:
    """Yield (item, content hash, error) in order; texts are hashed in this process."""
    if config.options.modality == "text":
        for item, text in pairs.items():
            yield item, content_hash(str(text).encode()), None
        return
    mapped = data.from_arrow(make_shards(pairs, INPUTS_PER_HASH_SHARD)).map_batches(
        hash_shard, batch_size=None, batch_format="pyarrow", fn_kwargs={"config": config}
    )
    for row in _rows(mapped):
        error = MediaError(row["stage"], row["reason"]) if row["stage"] else None
        yield row["item"], row["content"] or "", error


def _encode_inputs(
    data: Any, config: WorkerConfig, pairs: dict[int, Input], workers: int
) -> Iterator[dict[str, Any]]:
    """Send shards through actors; yield the rows of their results in the order of the pairs."""
    shards = make_shards(pairs, 4 * config.options.batch_size)
    mapped = data.from_arrow(shards).map_batches(
        EncodeWorker,
        batch_size=None,  # a whole shard
        batch_format="pyarrow",
        fn_constructor_kwargs={"config": config},
        compute=data.ActorPoolStrategy(size=max(1, min(workers, len(shards)))),
        num_gpus=1 if (config.device or "").startswith("cuda") else 0,
    )
    yield from _rows(mapped)


def _rows(mapped: Any) -> Iterator[dict[str, Any]]:
    for batch in mapped.iter_batches(batch_size=None, batch_format="pyarrow"):
        yield from batch.to_pylist()


# -- in the workers -----------------------------------------------------------------------------


class EncodeWorker:
    """Actor that loads the backbone once and encodes one shard per call."""

    def __init__(self, config: WorkerConfig) -> None:
        self._backbone = load_backbone(
            config.backbone_name, device=config.device, compute=config.compute
        )
        self._options = config.options
        self._media = MediaReader(config.raw, config.prepared)

    def __call__(self, shard: pa.Table) -> pa.Table:
        """Encode a shard (item, source, text) into a table of results."""
        messages: list[str] = []
        rows = _ResultRows()
        deduplicator = Deduplicator(rows, "float32")
        encoder = InputEncoder(
            backbone=self._backbone,
            options=self._options,
            deduplicator=deduplicator,
            media=self._media,
            report=lambda counts: None,
            notify=messages.append,
        )
        with quiet_decoders():
            encoder.encode(_pairs(shard))
        results: list[dict[str, Any]] = [{"item": item, **row} for item, row in rows.rows.items()]
        results += [
            {"item": failure.item, "stage": failure.stage, "reason": failure.reason}
            for failure in deduplicator.counts.failures
        ]
        results.sort(key=lambda row: int(row["item"]))
        results += [{"item": _MESSAGE, "reason": message} for message in messages]
        return pa.Table.from_pylist(results, schema=_RESULTS)


def hash_shard(shard: pa.Table, config: WorkerConfig) -> pa.Table:
    """Read a shard (item, source, text) and return the content hashes or the failures."""
    media = MediaReader(config.raw, config.prepared)
    results = []
    for item, value in _pairs(shard):
        row: dict[str, Any] = {"item": item}
        try:
            if config.options.modality == "video":
                row["content"] = hash_video(media, str(value))
            else:
                row["content"] = read_image(media, value)[0]
        except MediaError as error:
            row |= {"stage": error.stage, "reason": error.reason}
        results.append(row)
    media.close()
    return pa.Table.from_pylist(results, schema=_RESULTS)


class _ResultRows(RowStore):
    """Rows in memory, by item, as dictionaries of the result columns."""

    def __init__(self) -> None:
        self.rows: dict[int, dict[str, Any]] = {}

    def add(self, row: EncodedRow) -> None:
        self.rows[row.item] = {
            "content": row.content, "vector": row.vector.tobytes(), "frames": row.frames,
            "tokens": row.tokens, "partial": row.partial,
        }  # fmt: skip

    def copy(self, contents: dict[int, str]) -> None:
        by_content = {row["content"]: row for row in self.rows.values()}
        self.rows |= {item: by_content[content] for item, content in contents.items()}


# -- between the processes ----------------------------------------------------------------------


def make_shards(pairs: dict[int, Input], size: int) -> list[pa.Table]:
    """Divide inputs (by item) into tables (item, source, text) of at most ``size`` rows."""
    rows = iter(pairs.items())
    return [_shard(part) for part in iter(lambda: list(islice(rows, size)), [])]


def _shard(pairs: list[tuple[int, Input]]) -> pa.Table:
    sources_and_texts = [split_input(value) for _, value in pairs]
    return pa.table(
        {
            "item": pa.array([item for item, _ in pairs], pa.int32()),
            "source": pa.array([source for source, _ in sources_and_texts], pa.string()),
            "text": pa.array([text for _, text in sources_and_texts], pa.string()),
        }
    )


def _pairs(shard: pa.Table) -> Iterator[tuple[int, Input]]:
    for row in shard.to_pylist():
        yield row["item"], row["source"] if row["text"] is None else (row["source"], row["text"])
