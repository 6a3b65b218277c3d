from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from features.catalogue import VIEWS, query, view_name
from features.errors import UserError
from features.schema import feature_schema
from features.store import FeatureStore, Provenance, embedding_array
from features.warehouse import Warehouse
from tests.pipeline import tiny


def add_table(warehouse: Warehouse, backbone: str, modality: str, dim: int) -> None:
    vectors = np.eye(3, dim, dtype=np.float16)
    rows = pa.Table.from_arrays(
        [
            pa.array([0, 1, 2], pa.int32()),
            pa.array(["a", "b", "c"]),
            pa.array(["h"] * 3),
            pa.nulls(3, pa.int32()),
            pa.nulls(3, pa.int32()),
            embedding_array(vectors),
        ],
        schema=feature_schema(dim, "float16"),
    )
    provenance = Provenance(
        backbone=backbone,
        checkpoint="c",
        preprocessing="p",
        pooling="mean",
        modality=modality,
        level="pooled",
        compute="float32",
        dtype="float16",
        dim=dim,
    )
    FeatureStore(warehouse).table("tiny", backbone, modality).append(rows, provenance)


def value(warehouse: Warehouse, sql: str) -> object:
    return query(warehouse, sql).column(0)[0].as_py()


def test_every_view_is_there_before_anything_is(warehouse: Warehouse) -> None:
    for view in VIEWS:
        assert value(warehouse, f"SELECT count(*) FROM {view}") == 0


def test_one_width_is_an_array_and_two_are_lists(warehouse: Warehouse, tmp_path: Path) -> None:
    tiny.prepare(warehouse, tmp_path, ids=["a", "b", "c"])
    kind = "SELECT DISTINCT typeof(embedding) FROM "
    add_table(warehouse, "hashed", "image", 4)
    assert value(warehouse, kind + "features") == "FLOAT[4]"
    assert (
        value(
            warehouse,
            "SELECT array_cosine_similarity(a.embedding, b.embedding)"
            " FROM features a, features b WHERE a.item = 0 AND b.item = 0",
        )
        == 1
    )
    add_table(warehouse, "other:Model/x", "text", 5)
    assert value(warehouse, kind + "features") == "FLOAT[]"
    assert value(warehouse, kind + "features_tiny_other_model_x_text") == "FLOAT[5]"
    assert value(warehouse, "SELECT count(*) FROM features WHERE dataset = 'tiny'") == 6
    tables = FeatureStore(warehouse).tables("tiny")
    assert [view_name(table) for table in tables] == [
        "features_tiny_hashed_image",
        "features_tiny_other_model_x_text",
    ]


def test_names_with_quotes_are_names(tmp_path: Path) -> None:
    warehouse = Warehouse(tmp_path / "it's a [house]*?")
    warehouse.create()
    tiny.prepare(warehouse, tmp_path, ids=["a", "b'; DROP VIEW items; --"])
    assert value(warehouse, "SELECT count(*) FROM items WHERE item_id LIKE '%DROP%'") == 1


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TABLE t AS SELECT 1",
        "COPY items TO 'x.csv'",
        "EXPLAIN ANALYZE COPY (SELECT 1) TO 'x.csv'",
        "ATTACH 'x.db'",
        "INSTALL httpfs",
        "SET enable_external_access = true",
        "PRAGMA database_size",
        "DELETE FROM runs",
    ],
)
def test_nothing_is_written(
    warehouse: Warehouse, statement: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="only reads"):
        query(warehouse, statement)
    assert not list(tmp_path.glob("x.*"))


@pytest.mark.parametrize(
    "source", ["read_text('/etc/hostname')", "'/etc/hostname'", "glob('/etc/*')"]
)
def test_nothing_outside_is_read(warehouse: Warehouse, source: str) -> None:
    with pytest.raises(UserError, match="SQL: ") as caught:
        query(warehouse, f"SELECT * FROM {source}")
    assert "\n" not in str(caught.value)


def test_a_damaged_run_is_named(warehouse: Warehouse) -> None:
    folder = warehouse.runs_dir / "broken"
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text("run = ")
    with pytest.raises(UserError, match=r"broken/config\.toml is damaged"):
        query(warehouse, "SELECT 1")


@pytest.mark.parametrize(
    "inside", ["COPY (SELECT 1 AS a) TO '{root}/x.parquet'", "DELETE FROM runs RETURNING run"]
)
def test_nothing_is_written_from_inside_a_with(warehouse: Warehouse, inside: str) -> None:
    inside = inside.format(root=warehouse.root)
    with pytest.raises(UserError, match="SQL: "):
        query(warehouse, f"WITH x AS ({inside}) SELECT 1;")
    assert not (warehouse.root / "x.parquet").exists()
    assert value(warehouse, "WITH x AS (SELECT 1 AS a) SELECT a FROM x -- fine") == 1
