"""Folders and parts that are removed while an extraction writes them."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from features.errors import UserError
from features.store import FeatureStore
from features.warehouse import Warehouse
from pipeline.backbones.base import Vectors
from pipeline.backbones.registry import BACKBONES
from pipeline.extraction import table_writer
from pipeline.extraction.job import extract_features
from pipeline.extraction.options import ExtractOptions
from tests.pipeline.backbones.tiny import prepare
from tests.pipeline.extraction.fakes import Watched, entry


def remove_table(table: Path) -> None:
    shutil.rmtree(table)


def remove_dataset(table: Path) -> None:
    shutil.rmtree(table.parents[3])


def remove_first_part(table: Path) -> None:
    (table / "part-00000.parquet").unlink()


def replace_table(table: Path) -> None:
    table.rename(table.with_name("moved"))
    shutil.copytree(table.with_name("moved"), table)


@pytest.mark.parametrize("batch", [2, 4])
@pytest.mark.parametrize("remove", [remove_table, remove_dataset, remove_first_part, replace_table])
def test_an_extraction_whose_files_were_removed_does_not_succeed(
    warehouse: Warehouse,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    remove: Callable[[Path], None],
    batch: int,
) -> None:
    prepare(
        warehouse,
        tmp_path,
        ids=[f"id{i}" for i in range(40)],
        text=[f"item {i // 2}" for i in range(40)],  # duplicates get copies of stored rows
    )
    monkeypatch.setattr(table_writer, "SECONDS_PER_PART", 0.0)
    backbone = Watched("watched", tmp_path / "log.txt")
    monkeypatch.setitem(BACKBONES, "watched", entry(backbone))
    table = FeatureStore(warehouse).table("tiny", "watched", "text")
    batches = 0

    def remove_in_batch(vectors: Vectors) -> Vectors:
        nonlocal batches
        batches += 1
        if batches == batch:
            remove(table.path)
        return vectors

    backbone.after = remove_in_batch
    options = ExtractOptions(text="watched", batch_size=1)
    with pytest.raises(UserError, match="removed"):
        extract_features(warehouse, "tiny", options)
    assert batches >= batch
    if warehouse.is_prepared("tiny") and remove is not replace_table:
        report = extract_features(warehouse, "tiny", options).tables[0]
        assert report.encoded + report.shared + report.reused == 40
        assert len(table.small_columns()) == 40
