import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from features.arrow_columns import embedding_array
from features.atomic_files import write_table
from features.errors import UserError
from features.provenance import Provenance
from features.schema import FAILURES_SCHEMA, PREDICTIONS_SCHEMA, feature_schema
from features.sql_feature_views import view_name
from features.sql_views import VIEWS, query
from features.store import FeatureStore
from features.warehouse import Warehouse
from tests.pipeline.backbones import tiny

ROOT = Path(__file__).parents[2]


def add_table(warehouse: Warehouse, backbone: str, modality: str, dim: int) -> None:
    vectors = np.eye(3, dim, dtype=np.float16)
    rows = pa.Table.from_arrays(
        [
            pa.array([0, 1, 2], pa.int32()),
            pa.array(["a", "b", "c"]),
            pa.array(["h"] * 3),
            pa.nulls(3, pa.int32()),
            pa.nulls(3, pa.int32()),
            pa.nulls(3, pa.bool_()),
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
    table = FeatureStore(warehouse).table("tiny", backbone, modality)
    table.append(rows, provenance)
    info = warehouse.info("tiny")
    table.finish(info.fingerprint, provenance, inputs=info.inputs[modality])


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
    warehouse = Warehouse(tmp_path / "it's a [warehouse]*?")
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
    with pytest.raises(UserError, match="runs a SELECT, DESCRIBE or SHOW, not "):
        query(warehouse, statement)
    assert not list(tmp_path.glob("x.*"))


@pytest.mark.parametrize(
    "source", ["read_text('/etc/hostname')", "'/etc/hostname'", "glob('/etc/*')"]
)
def test_nothing_outside_is_read(warehouse: Warehouse, source: str) -> None:
    with pytest.raises(UserError, match="SQL: ") as caught:
        query(warehouse, f"SELECT * FROM {source}")
    assert "\n" not in str(caught.value)


def test_what_is_damaged_is_named_and_the_rest_answers(
    warehouse: Warehouse, tmp_path: Path
) -> None:
    tiny.prepare(warehouse, tmp_path, ids=["a", "b", "c"])
    add_table(warehouse, "whole", "image", 4)
    add_table(warehouse, "cut", "image", 4)
    part = next((warehouse.dataset_dir("tiny") / "features" / "cut").rglob("part-*"))
    part.write_bytes(part.read_bytes()[:200])
    add_table(warehouse, "old", "image", 4)
    old = next((warehouse.dataset_dir("tiny") / "features" / "old").rglob("part-*"))
    pq.write_table(pq.read_table(old).drop_columns(["n_frames"]), old)
    folder = warehouse.runs_dir / "broken"
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text("run = ")
    said: list[str] = []
    assert query(warehouse, "SELECT DISTINCT backbone FROM features", said.append).column(
        0
    ).to_pylist() == ["whole"]
    assert [
        any(f"{path}" in line and "\n" not in line for line in said)
        for path in (part, old, folder / "config.toml")
    ] == [True, True, True]
    assert len(said) == 3


def test_tables_of_an_earlier_preparation_are_left_out_and_failures_find_their_item(
    warehouse: Warehouse, tmp_path: Path
) -> None:
    tiny.prepare(warehouse, tmp_path, ids=["a", "b", "c"])
    add_table(warehouse, "hashed", "image", 4)
    failed = dict.fromkeys(FAILURES_SCHEMA.names, "x") | {"item": 1, "item_id": "b"}
    gone = failed | {"item": 0, "item_id": "a"}
    path = warehouse.dataset_dir("tiny") / "failures" / "hashed-image.parquet"
    write_table(path, pa.Table.from_pylist([gone, failed], FAILURES_SCHEMA))
    tiny.prepare(warehouse, tmp_path / "again", ids=["b", "c"])
    said: list[str] = []
    assert value(warehouse, "SELECT count(*) FROM features") == 0
    query(warehouse, "SELECT 1", said.append)
    assert said == []
    query(warehouse, "SELECT 1 FROM features", said.append)
    assert "image=hashed belongs to an earlier preparation of tiny" in said[0]
    found = query(warehouse, "SELECT item, item_id FROM failures").to_pylist()
    assert found == [{"item": 0, "item_id": "b"}]


def test_names_that_differ_in_a_dash_or_a_capital_have_views_of_their_own(
    warehouse: Warehouse, tmp_path: Path
) -> None:
    tiny.prepare(warehouse, tmp_path, ids=["a", "b", "c"])
    for backbone in ("my-model", "my_model"):
        add_table(warehouse, backbone, "image", 4)
    views = query(warehouse, "SHOW TABLES").column("name").to_pylist()
    own = [name for name in views if name.startswith("features_tiny_my_model_image_")]
    assert len(own) == 2
    assert value(warehouse, "SELECT count(*) FROM features") == 6
    for name in own:
        assert value(warehouse, f"SELECT count(*) FROM {name}") == 3


def test_a_folder_that_looks_like_a_partition_is_a_folder(tmp_path: Path) -> None:
    warehouse = Warehouse(tmp_path / "item=7" / "user_id=x")
    warehouse.create()
    tiny.prepare(warehouse, tmp_path, ids=["a", "b", "c"])
    assert value(warehouse, "SELECT list(item ORDER BY item) FROM items") == [0, 1, 2]


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT ';' AS a; -- end;",
        "-- begin;\nSELECT ';' AS a /* ; */ ;  /* é; */ --",
        "FROM (SELECT ';' AS a)",
    ],
)
def test_remarks_and_semicolons_end_a_statement(warehouse: Warehouse, sql: str) -> None:
    warehouse.create()
    assert query(warehouse, sql).to_pylist() == [{"a": ";"}]


def test_what_is_no_text_is_refused(warehouse: Warehouse) -> None:
    warehouse.create()
    with pytest.raises(UserError, match="not UTF-8"):
        query(warehouse, "SELECT '\udce9'")


def test_columns_of_one_name_all_stay(warehouse: Warehouse) -> None:
    table = query(warehouse, "SELECT 1 AS a, 2 AS a, 3 AS a_1, 4 AS a")
    assert table.column_names == ["a", "a_2", "a_1", "a_3"]
    assert [column[0].as_py() for column in table.columns] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("TIMESTAMP '290000-01-01'", "290000-01-01 00:00:00"),
        ("TIMESTAMPTZ 'infinity'", "infinity"),
        ("TIMESTAMP_S '-infinity'", "-infinity"),
        ("TIMESTAMP_NS '2000-01-01 00:00:00.123456789'", "2000-01-01 00:00:00.123456789"),
        ("DATE '0044-03-15 (BC)'", "0044-03-15 (BC)"),
        ("TIME '24:00:00'", "24:00:00"),
        ("TIMETZ '12:00:00+15:59:59'", "12:00:00+15:59:59"),
        ("INTERVAL 1000000 YEAR", "1000000 years"),
        ("'101'::BIT", "101"),
        (r"'a\xFF'::BLOB", r"a\xFF"),
        (f"{2**128 - 1}::UHUGEINT", str(2**128 - 1)),
        ("1::VARIANT", "1"),
        ("[DATE '290000-01-01']", ["290000-01-01"]),
        (
            "{'DATE]': TIME '24:00:00', 'date': 1, 'kind': 'DATE'::ENUM ('DATE', 'TIME')}",
            {"DATE]": "24:00:00", "date": 1, "kind": "DATE"},
        ),
        ("MAP {'a': DATE 'infinity'}", [("a", "infinity")]),
        ("12", 12),
    ],
)
def test_values_that_python_cannot_hold_are_text(
    warehouse: Warehouse, value: str, text: object
) -> None:
    table = query(warehouse, f"SELECT 1 AS a, {value} AS x, 2 AS a", inexact_as_text=True)
    assert table.column_names == ["a", "x", "a_1"]
    assert table["x"].to_pylist() == [text]


def test_a_root_that_is_not_there_is_no_empty_warehouse(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no warehouse in"):
        query(Warehouse(tmp_path / "misspelt"), "SELECT 1")


@pytest.mark.parametrize(
    "inside", ["COPY (SELECT 1 AS a) TO '{root}/x.parquet'", "DELETE FROM runs RETURNING run"]
)
def test_nothing_is_written_from_inside_a_with(warehouse: Warehouse, inside: str) -> None:
    inside = inside.format(root=warehouse.root)
    with pytest.raises(UserError, match="SQL: "):
        query(warehouse, f"WITH x AS ({inside}) SELECT 1;")
    assert not (warehouse.root / "x.parquet").exists()
    assert value(warehouse, "WITH x AS (SELECT 1 AS a) SELECT a FROM x -- fine") == 1


def test_a_damaged_dataset_is_left_out_and_the_others_answer(
    warehouse: Warehouse, tmp_path: Path
) -> None:
    for name in ("good", "empty", "cut", "gone"):
        tiny.prepare(warehouse, tmp_path, ids=["a", "b"], name=name)
    (warehouse.dataset_dir("empty") / "items" / "part-0.parquet").write_bytes(b"")
    cut = warehouse.dataset_dir("cut") / "interactions" / "part-0.parquet"
    cut.write_bytes(cut.read_bytes()[:-9])
    (warehouse.dataset_dir("gone") / "items" / "part-0.parquet").unlink()
    spoilt = warehouse.dataset_dir("good") / "failures" / "x-image.parquet"
    spoilt.parent.mkdir()
    spoilt.write_bytes(b"PAR1")
    said: list[str] = []
    found = query(warehouse, "SELECT DISTINCT dataset FROM items", said.append)
    assert found.column(0).to_pylist() == ["good"]
    assert len(said) == 4
    assert sum("run: mmrec prepare --dataset" in line for line in said) == 3
    assert sum("run: mmrec extract --dataset good" in line for line in said) == 1


def test_predictions_of_another_preparation_and_odd_runs_are_left_out(
    warehouse: Warehouse, tmp_path: Path
) -> None:
    info = tiny.prepare(warehouse, tmp_path, ids=["a", "b"])
    row = {
        "split": "test", "user": 0, "user_id": "u", "item": 1, "item_id": "b", "history": 1,
        "cold": True, "rank_kept": 1, "rank_filtered": 1,
    }  # fmt: skip
    made = {
        "now": (info.fingerprint, "2026-01-01", 1),
        "then": ("other", "2026-01-01", 1),
        "late": (info.fingerprint, "garbage", 1),
        "seed": (info.fingerprint, "2026-01-01", "x"),
    }
    for name, (fingerprint, created, seed) in made.items():
        folder = warehouse.runs_dir / name
        folder.mkdir(parents=True)
        (folder / "config.toml").write_text(
            f'[run]\ndataset = "tiny"\nmodel = "m"\ncreated = "{created}"\nfeatures = []\n'
            f'parameters = 1\nfingerprint = "{fingerprint}"\n[train]\nseed = "{seed}"\n'
        )
        write_table(
            folder / "predictions.parquet", pa.Table.from_pylist([row], schema=PREDICTIONS_SCHEMA)
        )
    said: list[str] = []
    runs = query(warehouse, "SELECT run FROM runs ORDER BY run", said.append)
    assert runs.column(0).to_pylist() == ["now", "then"]
    assert value(warehouse, "SELECT string_agg(run) FROM predictions") == "now"
    assert len(said) == 3
    assert "another preparation of tiny" in "".join(said)


ENDLESS = """
import sys
from features.sql_views import query
from features.warehouse import Warehouse

statement = "SELECT count(*) FROM range(10000000) a, range(10000000) b WHERE a.range < b.range"
print("started", flush=True)
query(Warehouse(sys.argv[1]), statement)
"""


def test_a_query_can_be_interrupted(warehouse: Warehouse) -> None:
    command = [sys.executable, "-c", ENDLESS, str(warehouse.root)]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        for _ in range(60):  # a signal may arrive before the query has begun
            process.send_signal(signal.SIGINT)
            try:
                process.wait(1)
                break
            except subprocess.TimeoutExpired:
                continue
        else:
            process.kill()
    assert process.returncode not in (0, -signal.SIGKILL)


def test_queries_spill_to_a_private_folder_that_is_removed(warehouse: Warehouse) -> None:
    folders = [value(warehouse, "SELECT current_setting('temp_directory')") for _ in range(2)]
    assert folders[0] != folders[1]
    assert not any(Path(str(folder)).exists() for folder in folders)
