"""The same tables on Ray's actors as in this process; a worker that dies costs nothing."""

import os
import warnings
from collections.abc import Iterator
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
from pipeline.extraction.deduplication import Deduplicator
from pipeline.extraction.encoder import EncodeOptions
from pipeline.extraction.job import extract
from pipeline.extraction.options import Options
from pipeline.extraction.reports import ExtractReport
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
    clips: list[str | None] = [None] * N
    for n in range(3):
        clips[n] = write_video(raw / f"{n}.mkv", frames=150 + n, gop=10, noise=9).name
    whole = (raw / "1.mkv").read_bytes()
    (raw / "1.mkv").write_bytes(whole[: len(whole) // 3])
    texts = [f"number {n % 40}" for n in range(N)]
    prepare(warehouse, raw, ids=[f"i{n}" for n in range(N)], text=texts, image=images, video=clips)
    return warehouse


def rows(house: Warehouse, modality: str, level: str) -> pa.Table:
    table = FeatureStore(house).table("tiny", "hashed", modality, level)
    parts = [pa.parquet.read_table(part) for part in table.parts()]
    return pa.concat_tables(parts).sort_by("item").replace_schema_metadata(None)


def both(house: Warehouse, options: Options) -> tuple[ExtractReport, ExtractReport]:
    """Extract locally, keep the rows, and again on two workers."""
    local = extract(house, "tiny", options)
    kept = [rows(house, one.modality, one.level) for one in local.tables]
    for one in local.tables:
        FeatureStore(house).table("tiny", "hashed", one.modality, one.level).clear()
    again = {name: getattr(options, name) for name in Options.__slots__}
    far = extract(house, "tiny", Options(**{**again, "engine": "ray", "workers": 2}))
    for one, before in zip(far.tables, kept, strict=True):
        assert rows(house, one.modality, one.level).equals(before)
    return local, far


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
@pytest.mark.filterwarnings("ignore")
def test_two_workers_write_the_tokens_that_one_process_writes(world: Warehouse) -> None:
    both(world, Options(joint="hashed", level="tokens", batch_size=4))


class Mortal(ray_engine.Worker):
    """Dies at its first shard, once."""

    def __call__(self, shard: pa.Table) -> pa.Table:
        mark = Path(self._media.raw, "died")
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
    monkeypatch.setattr(ray_engine, "Worker", Mortal)
    local, far = both(world, Options(image="hashed", video="hashed", batch_size=4))
    assert (tmp_path / "raw" / "died").exists()
    for ours, theirs in zip(local.tables, far.tables, strict=True):
        for field in ("encoded", "shared", "reused", "absent", "failed", "partial", "bytes"):
            assert getattr(ours, field) == getattr(theirs, field), field
    assert local.tables[0].encoded == 49
    assert local.tables[0].failed == {"not an image in a known format": 2, "file not found": 1}
    assert local.tables[1].partial == 1
    again = extract(world, "tiny", Options(image="hashed", batch_size=4, engine="ray")).tables[0]
    assert (again.encoded, again.shared, again.reused) == (0, 0, 57)


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
@pytest.mark.filterwarnings("ignore")
def test_strict_and_a_worker_that_cannot_work_are_one_line(world: Warehouse) -> None:
    with pytest.raises(UserError, match=r"item 'i7', 'missing\.png': file not found"):
        extract(world, "tiny", Options(image="hashed", engine="ray", strict=True))
    work = ray_engine.Work(
        backbone="no such backbone", device=None, compute="float32",
        choices=EncodeOptions(modality="text", batch_size=4, threads=1),
        raw=Path(), prepared=Path(),
    )  # fmt: skip
    found = Deduplicator(ray_engine._Found(), "float32")
    with pytest.raises(UserError, match="a worker of Ray cannot work"), ray_engine.session():
        ray_engine.run(
            work,
            [(0, "x")],
            book=found,
            workers=1,
            width=None,
            report=ray_engine._ignore,
            notify=print,
        )


def test_what_ray_is_told_without_being_asked_for() -> None:
    with pytest.raises(UserError, match="--workers 2 needs --engine ray"):
        Options(workers=2)
    with pytest.raises(UserError, match="unknown engine 'spark'"):
        Options(engine="spark")
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
    assert ray_engine.place(given) == placed
    if placed == "cuda":
        assert ray_engine.default_workers(placed) == gpus


def test_a_worker_says_when_it_goes_on_with_less(monkeypatch: pytest.MonkeyPatch) -> None:
    def embed(self: Hashed, batch: InputBatch) -> Vectors:
        if len(batch.texts) > 2:
            raise MemoryError("out of memory")
        return whole(self, batch)

    whole = Hashed.embed
    monkeypatch.setattr(Hashed, "embed", embed)
    choices = EncodeOptions(modality="text", batch_size=4, threads=1)
    work = ray_engine.Work(
        backbone="hashed", device=None, compute="float32", choices=choices, raw=Path(),
        prepared=Path(),
    )  # fmt: skip
    (shard,) = ray_engine._shards([(item, f"text {item}") for item in range(4)], 9)
    found = ray_engine.Worker(work)(shard).to_pylist()
    assert [row["item"] for row in found] == [0, 1, 2, 3, -1]
    assert all(row["vector"] for row in found[:4])
    assert "out of memory with 4 inputs" in found[4]["reason"]


def test_vectors_travel_as_they_are() -> None:
    found = ray_engine._Found()
    book = Deduplicator(found, "float32")
    vector = np.arange(6, dtype=np.float32)
    row = {
        "item": 3, "content": "c", "vector": vector.tobytes(), "frames": None, "tokens": 2,
        "partial": False, "stage": None, "reason": None,
    }  # fmt: skip
    ray_engine._book(book, {**row, "item": 4}, "other", "s", 3)
    assert book.tally.failures[0].reason == "changed while it was read"
    ray_engine._book(book, row, "c", "s", 3)
    stored = np.frombuffer(found.rows[3]["vector"], np.float32)
    assert (stored == vector).all()
    assert found.rows[3]["tokens"] == 2
