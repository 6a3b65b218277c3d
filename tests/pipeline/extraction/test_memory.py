"""The memory that an item takes is bounded by its content hash."""

import gc
import tracemalloc
from functools import partial
from pathlib import Path

import pyarrow as pa
import pytest

from features import dataset
from features.errors import UserError
from features.warehouse import Warehouse
from pipeline.extraction import items, loading, table_writer
from pipeline.extraction.job import extract_features
from pipeline.extraction.options import ExtractOptions
from pipeline.extraction.reports import ExtractProgress
from tests.pipeline.backbones.tiny import prepare

BYTES_PER_ITEM = 230  # 81 for a hash, up to 128 for its place in a small set, 9 for the table


def bytes_used(root: Path, n: int) -> int:
    """Return the memory in use at the end of encoding, without what was in use before."""
    warehouse = Warehouse(root / str(n))
    warehouse.create()
    prepare(warehouse, root, ids=[str(i) for i in range(n)], text=[f"item {i}" for i in range(n)])
    used: list[int] = []

    def note(progress: ExtractProgress) -> None:
        if progress.done == progress.total:
            gc.collect()
            used.append(tracemalloc.get_traced_memory()[0])

    gc.collect()
    tracemalloc.start()
    try:
        report = extract_features(warehouse, "tiny", ExtractOptions(text="hashed"), progress=note)
        assert report.tables[0].encoded == n
        return used[-1]
    finally:
        tracemalloc.stop()


def test_an_item_takes_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_writer, "ROWS_PER_PART", 100)
    monkeypatch.setattr(loading, "TEXT_WINDOW", 100)
    monkeypatch.setattr(items, "stream_items", partial(dataset.stream_items, rows=100))
    bytes_used(tmp_path, 150)  # imports and caches
    few, many = bytes_used(tmp_path, 200), bytes_used(tmp_path, 5200)
    assert 0 < (many - few) / 5000 < BYTES_PER_ITEM


def test_arrow_returns_memory_during_the_job_and_keeps_its_pool_after(tmp_path: Path) -> None:
    warehouse = Warehouse(tmp_path / "warehouse")
    warehouse.create()
    prepare(warehouse, tmp_path, ids=["a", "b"], text=["one", "two"])
    before = pa.default_memory_pool().backend_name
    seen: list[str] = []

    def note(progress: ExtractProgress) -> None:
        seen.append(pa.default_memory_pool().backend_name)

    extract_features(warehouse, "tiny", ExtractOptions(text="hashed"), progress=note)
    assert set(seen) == {"system"}
    assert pa.default_memory_pool().backend_name == before
    with pytest.raises(UserError):
        extract_features(warehouse, "tiny", ExtractOptions(image="hashed"))
    assert pa.default_memory_pool().backend_name == before
