"""The number of items must not show in memory: no object stays for any of them."""

import gc
import tracemalloc
from functools import partial
from pathlib import Path

import pyarrow as pa
import pytest

from features import dataset
from features.errors import UserError
from features.warehouse import Warehouse
from pipeline.extraction import encoder, items, table_writer
from pipeline.extraction.job import extract
from pipeline.extraction.options import Options
from pipeline.extraction.reports import ExtractProgress
from tests.pipeline.backbones.tiny import prepare

BYTES_EACH = 80  # 24 for the contents seen, 33 for the rows of the table, and some that pass


def peak(root: Path, n: int) -> int:
    house = Warehouse(root / str(n))
    house.create()
    prepare(house, root, ids=[str(i) for i in range(n)], text=[f"item {i}" for i in range(n)])
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        report = extract(house, "tiny", Options(text="hashed"))
        assert report.tables[0].encoded == n
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def test_an_item_more_costs_some_bytes_and_no_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table_writer, "ROWS_PER_PART", 100)
    monkeypatch.setattr(encoder, "TEXT_WINDOW", 100)
    monkeypatch.setattr(items, "stream_items", partial(dataset.stream_items, rows=100))
    peak(tmp_path, 150)  # what is imported and cached once
    few, many = peak(tmp_path, 200), peak(tmp_path, 1200)
    assert (many - few) / 1000 < BYTES_EACH


def test_arrow_keeps_no_memory_while_it_runs_and_its_own_ways_after(tmp_path: Path) -> None:
    house = Warehouse(tmp_path / "house")
    house.create()
    prepare(house, tmp_path, ids=["a", "b"], text=["one", "two"])
    before = pa.default_memory_pool().backend_name
    seen: list[str] = []

    def note(progress: ExtractProgress) -> None:
        seen.append(pa.default_memory_pool().backend_name)

    extract(house, "tiny", Options(text="hashed"), progress=note)
    assert set(seen) == {"system"}
    assert pa.default_memory_pool().backend_name == before
    with pytest.raises(UserError):
        extract(house, "tiny", Options(image="hashed"))
    assert pa.default_memory_pool().backend_name == before
