"""The same tables on Ray's actors as in this process; a worker that dies costs nothing."""

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from features.errors import UserError
from features.store import FeatureStore
from features.warehouse import Warehouse
from pipeline.backbones.base import InputBatch, Vectors
from pipeline.backbones.hashed import Hashed
from pipeline.extraction import ray_engine
from pipeline.extraction.deduplication import Deduplicator, EncodedRow, RowStore
from pipeline.extraction.job import extract_features
from pipeline.extraction.options import ExtractOptions
from pipeline.extraction.ray_engine import EncodeWorker, RayEngine, WorkerConfig, record_result
from pipeline.extraction.reports import ExtractReport
from pipeline.extraction.tasks import EncodeOptions, EncodeTask
from tests.pipeline.backbones.tiny import picture, prepare
from tests.pipeline.media.videos import write_video

pytestmark = pytest.mark.heavy

ray = pytest.importorskip("ray")
N = 60


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One Ray for all tests: to start it takes seconds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ray.init(include_dashboard=False, log_to_driver=False, num_cpus=3, logging_level="ERROR")
        yield
        ray.shutdown()


@pytest.fixture
def world(warehouse: Warehouse, tmp_path: Path) -> Warehouse:
    raw = tmp_path / "raw"
    images = [picture(raw / f"{n % 50}.png", n % 50).name for n in range(N)]
    images[7] = "missing.png"
    (raw / "8.png").write_bytes(b"no picture")
    videos: list[str | None] = [None] * N
    for n in range(3):
        videos[n] = write_video(raw / f"{n}.mkv", frames=150 + n, gop=10, noise=9).name
    whole = (raw / "1.mkv").read_bytes()
    (raw / "1.mkv").write_bytes(whole[: len(whole) // 3])
    texts = [f"number {n % 40}" for n in range(N)]
    prepare(warehouse, raw, ids=[f"i{n}" for n in range(N)], text=texts, image=images, video=videos)
    return warehouse


def rows(warehouse: Warehouse, modality: str, level: str) -> pa.Table:
    table = FeatureStore(warehouse).table("tiny", "hashed", modality, level)
    parts = [pa.parquet.read_table(part) for part in table.parts()]
    return pa.concat_tables(parts).sort_by("item").replace_schema_metadata(None)


def both(warehouse: Warehouse, options: ExtractOptions) -> tuple[ExtractReport, ExtractReport]:
    """Extract locally, keep the rows, and again on two workers."""
    local = extract_features(warehouse, "tiny", options)
    local_rows = [rows(warehouse, table.modality, table.level) for table in local.tables]
    for table in local.tables:
        FeatureStore(warehouse).table("tiny", "hashed", table.modality, table.level).clear()
    remote = extract_features(warehouse, "tiny", replace(options, engine="ray", workers=2))
    for table, before in zip(remote.tables, local_rows, strict=True):
        assert rows(warehouse, table.modality, table.level).equals(before)
    return local, remote


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
@pytest.mark.filterwarnings("ignore")
def test_two_workers_write_the_tokens_that_one_process_writes(world: Warehouse) -> None:
    both(world, ExtractOptions(joint="hashed", level="tokens", batch_size=4))


class ListedRows(RowStore):
    """Rows in memory."""

    def __init__(self) -> None:
        self.rows: list[EncodedRow] = []

    def add(self, row: EncodedRow) -> None:
        self.rows.append(row)

    def copy(self, contents: dict[int, str]) -> None:
        raise NotImplementedError


class MortalWorker(EncodeWorker):
    """A worker that dies at its first shard, once."""

    def __init__(self, config: WorkerConfig) -> None:
        super().__init__(config)
        assert isinstance(config.raw, Path)
        self.raw: Path = config.raw

    def __call__(self, shard: pa.Table) -> pa.Table:
        mark = self.raw / "died"
        if not mark.exists():
            mark.write_text("once")
            os._exit(1)
        return super().__call__(shard)


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
@pytest.mark.filterwarnings("ignore")
def test_two_workers_write_the_table_of_one_process_and_one_may_die(
    world: Warehouse, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(ray_engine, "EncodeWorker", MortalWorker)
    local, remote = both(world, ExtractOptions(image="hashed", video="hashed", batch_size=4))
    assert (tmp_path / "raw" / "died").exists()
    for ours, theirs in zip(local.tables, remote.tables, strict=True):
        for field in ("encoded", "shared", "reused", "absent", "failed", "partial", "bytes"):
            assert getattr(ours, field) == getattr(theirs, field), field
    assert local.tables[0].encoded == 49
    assert local.tables[0].failed == {"not an image in a known format": 2, "file not found": 1}
    assert local.tables[1].partial == 1
    options = ExtractOptions(image="hashed", batch_size=4, engine="ray")
    again = extract_features(world, "tiny", options).tables[0]
    assert (again.encoded, again.shared, again.reused) == (0, 0, 57)


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
@pytest.mark.filterwarnings("ignore")
def test_strict_and_a_worker_that_cannot_work_are_one_line(world: Warehouse) -> None:
    with pytest.raises(UserError, match=r"item 'i7', 'missing\.png': file not found"):
        extract_features(world, "tiny", ExtractOptions(image="hashed", engine="ray", strict=True))
    task = EncodeTask(
        backbone=Hashed(), backbone_name="no such backbone", device=None, compute="float32",
        options=EncodeOptions(modality="text", batch_size=4, threads=1), workers=1,
        raw=Path(), prepared=Path(),
    )  # fmt: skip
    engine = RayEngine()
    deduplicator = Deduplicator(ListedRows(), "float32")
    with pytest.raises(UserError, match=r"worker of Ray .*--engine"), engine.session():
        engine.encode(
            task, [(0, "x")], deduplicator=deduplicator, report=lambda counts: None, notify=print
        )


def test_what_ray_is_told_without_being_asked_for() -> None:
    with pytest.raises(UserError, match="--workers 2 needs --engine ray"):
        ExtractOptions(workers=2)
    with pytest.raises(UserError, match=r"'spark'; known: local, ray"):
        ExtractOptions(engine="spark")
    assert ray_engine.default_workers("cpu") >= 1


@pytest.mark.parametrize(
    ("gpus", "given", "placed"),
    [(2, None, "cuda"), (2, "cuda:1", "cuda"), (2, "cpu", "cpu"), (0, None, None)],
)
def test_a_worker_has_a_gpu_of_its_own_where_there_are_any(
    monkeypatch: pytest.MonkeyPatch, gpus: int, given: str | None, placed: str | None
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert ray_engine.worker_device(given) == placed
    if placed == "cuda":
        assert ray_engine.default_workers(placed) == gpus


def test_a_worker_says_when_it_goes_on_with_less(monkeypatch: pytest.MonkeyPatch) -> None:
    def embed(self: Hashed, batch: InputBatch) -> Vectors:
        if len(batch.texts) > 2:
            raise MemoryError("out of memory")
        return whole(self, batch)

    whole = Hashed.embed
    monkeypatch.setattr(Hashed, "embed", embed)
    config = WorkerConfig(
        backbone_name="hashed", device=None, compute="float32",
        options=EncodeOptions(modality="text", batch_size=4, threads=1), raw=Path(),
        prepared=Path(),
    )  # fmt: skip
    (shard,) = ray_engine.make_shards({item: f"text {item}" for item in range(4)}, 9)
    results = EncodeWorker(config)(shard).to_pylist()
    assert [row["item"] for row in results] == [0, 1, 2, 3, -1]
    assert all(row["vector"] for row in results[:4])
    assert "out of memory with 4 inputs" in results[4]["reason"]


def test_vectors_travel_as_they_are() -> None:
    rows = ListedRows()
    deduplicator = Deduplicator(rows, "float32")
    vector = np.arange(6, dtype=np.float32)
    result = {
        "item": 3, "content": "c", "vector": vector.tobytes(), "frames": None, "tokens": 2,
        "partial": False, "stage": None, "reason": None,
    }  # fmt: skip
    record_result(deduplicator, {**result, "item": 4}, "other", "s", 3)
    assert deduplicator.counts.failures[0].reason == "changed while it was read"
    record_result(deduplicator, result, "c", "s", 3)
    (row,) = rows.rows
    assert row.item == 3
    assert (row.vector == vector.reshape(2, 3)).all()
    assert row.tokens == 2


@pytest.mark.parametrize("is_ended", [True, False])
def test_a_process_that_ray_ends_leaves_one_line(is_ended: bool) -> None:
    """Ray ends the process of mmrec without an exception when one of its own is killed."""
    code = "import os\nfrom pipeline.extraction.ray_engine import _message_at_exit\n"
    code += f"with _message_at_exit():\n    {'os._exit(1)' if is_ended else 'pass'}\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == int(is_ended)
    assert ("a process of Ray has ended" in done.stderr) == is_ended
    assert done.stderr.count("\n") == int(is_ended)
