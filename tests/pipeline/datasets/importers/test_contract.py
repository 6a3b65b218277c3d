"""The contract of every importer in the registry: its example becomes canonical tables."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from features.errors import UserError
from features.schema import INTERACTIONS_SCHEMA, ITEMS_SCHEMA
from features.warehouse import Warehouse
from pipeline.datasets.importers.base import Importer
from pipeline.datasets.importers.registry import IMPORTERS
from pipeline.datasets.raw_files import locate_files, raw_format
from tests.pipeline.datasets.raws import folder, items_of, prepared, sequences_of

each_importer = pytest.mark.parametrize("name", list(IMPORTERS))


each_importer_of_users = pytest.mark.parametrize(
    "name", [name for name, importer in IMPORTERS.items() if "interactions" in importer.files]
)


def _examples(importer: Importer) -> dict[str, str | bytes]:
    return dict(importer.example)


@each_importer
def test_the_example_becomes_canonical_tables(
    warehouse: Warehouse, tmp_path: Path, name: str
) -> None:
    importer = IMPORTERS[name]
    info = prepared(warehouse, tmp_path / "raw", _examples(importer), format=name)
    assert info.format == name
    tables = warehouse.dataset_dir("mine")
    assert pq.read_schema(tables / "items/part-00000.parquet").equals(ITEMS_SCHEMA)
    interactions = pq.read_table(tables / "interactions")
    assert interactions.schema.equals(INTERACTIONS_SCHEMA)
    assert interactions["timestamp"].null_count == (0 if info.timestamps else info.interactions)
    sequences = sequences_of(warehouse)
    assert sum(map(len, sequences.values())) == info.interactions
    assert len(sequences) == info.users
    assert (info.interactions > info.users) == ("interactions" in importer.files)
    items = items_of(warehouse)
    assert len({row["item_id"] for row in items}) == info.items == len(items)
    assert any(row["text"] for row in items)  # an example shows how text is given


@each_importer
def test_the_same_example_gives_the_same_bytes(
    warehouse: Warehouse, tmp_path: Path, name: str
) -> None:
    def prepare_and_read() -> list[bytes]:
        prepared(warehouse, tmp_path / "raw", _examples(IMPORTERS[name]), format=name)
        return [path.read_bytes() for path in sorted(warehouse.root.rglob("*.parquet"))]

    assert prepare_and_read() == prepare_and_read()


@each_importer_of_users
def test_a_file_without_interactions_is_named(tmp_path: Path, name: str) -> None:
    warehouse = Warehouse(tmp_path / "new")
    raw = folder(tmp_path / "raw", _examples(IMPORTERS[name]))
    (path,) = locate_files("mine", raw_format("mine", name), raw, {})["interactions"]
    path.write_bytes(b"")
    with pytest.raises(UserError) as caught:
        prepared(warehouse, raw, {}, format=name)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not warehouse.root.exists()


@each_importer
def test_a_missing_file_is_named_with_its_role(tmp_path: Path, name: str) -> None:
    importer = IMPORTERS[name]
    format = raw_format("mine", name)
    assert importer.required[0] in ("interactions", "items")
    for role in importer.required:
        raw = folder(tmp_path / role, _examples(importer))
        for path in locate_files("mine", format, raw, {})[role]:
            path.unlink()
        with pytest.raises(UserError, match=rf"{role} of mine.*--file {role}=PATH"):
            locate_files("mine", format, raw, {})


@each_importer
def test_the_summary_is_one_line(name: str) -> None:
    assert IMPORTERS[name].summary
    assert "\n" not in IMPORTERS[name].summary
