import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from features import sql_views
from features.arrow_columns import embedding_array, positions
from features.checksums import read_checksums
from features.errors import UserError
from features.provenance import Provenance
from features.schema import feature_schema
from features.store import FeatureStore, FeatureTable
from features.table_parts import ROWS_PER_PART
from features.warehouse import Warehouse
from tests.pipeline.backbones.tiny import prepare

MADE = Provenance(
    backbone="toy",
    checkpoint="c1",
    preprocessing="none",
    pooling="none",
    modality="image",
    level="pooled",
    compute="float32",
    dtype="float16",
    dim=3,
    libraries={"numpy": "2"},
)


def rows(items: Sequence[int], vectors: npt.NDArray[np.generic], *, tag: str = "") -> pa.Table:
    n, dim = vectors.shape
    columns = [
        pa.array(items, pa.int32()),
        pa.array([f"id{i}" for i in items]),
        pa.array([f"hash{i}{tag}" for i in items]),
        pa.array([None] * n, pa.int32()),
        pa.array(range(n), pa.int32()),
        pa.nulls(n, pa.bool_()),
        embedding_array(vectors),
    ]
    return pa.Table.from_arrays(columns, schema=feature_schema(dim, str(vectors.dtype)))


def numbers(n: int, dim: int = 3, seed: int = 0) -> npt.NDArray[np.float16]:
    return np.random.RandomState(seed).standard_normal((n, dim)).astype(np.float16)


@pytest.fixture
def table(warehouse: Warehouse) -> FeatureTable:
    return FeatureStore(warehouse).table("tiny", "toy", "image")


def test_a_matrix_is_aligned_with_the_items_whatever_the_order_of_rows(
    table: FeatureTable,
) -> None:
    vectors = numbers(5)
    table.append(rows([7, 2], vectors[:2]), MADE)
    table.append(rows([0, 5, 3], vectors[2:]), MADE)
    table.finish("f1", MADE)
    matrix = table.read(9, "f1")
    assert matrix.vectors.shape == (9, 3)
    assert matrix.vectors.dtype == np.float16
    assert matrix.vectors.flags.c_contiguous
    assert matrix.present.tolist() == [True, False, True, True, False, True, False, True, False]
    assert (matrix.vectors[[7, 2, 0, 5, 3]] == vectors).all()
    assert not matrix.vectors[~matrix.present].any()
    assert matrix.provenance == MADE


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(
    n=st.integers(1, 40),
    dim=st.integers(1, 9),
    dtype=st.sampled_from(["float16", "float32"]),
    seed=st.integers(0, 99),
)
def test_vectors_come_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, n: int, dim: int, dtype: str, seed: int
) -> None:
    warehouse = Warehouse(tmp_path_factory.mktemp("w"))
    made = replace(MADE, dim=dim, dtype=dtype)
    here = FeatureStore(warehouse).table("tiny", "toy", "image")
    random = np.random.RandomState(seed)
    vectors = random.standard_normal((n, dim)).astype(dtype)
    where = random.permutation(2 * n)[:n]
    for chunk in np.array_split(np.arange(n), min(n, 3)):
        here.append(rows(where[chunk].tolist(), vectors[chunk]), made)
    here.finish("f", made)
    matrix = here.read(2 * n, "f")
    assert matrix.vectors[where].tobytes() == vectors.tobytes()
    assert matrix.present.sum() == n


def test_the_file_is_laid_out_for_reading(table: FeatureTable) -> None:
    part = table.append(rows([1, 2], numbers(2)), MADE)
    schema = pq.read_schema(part)
    embedding = schema.field("embedding")
    assert not embedding.nullable
    assert str(embedding.type) == "fixed_size_list<element: halffloat not null>[3]"
    group = pq.read_metadata(part).row_group(0)
    by_path = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
    column = by_path["embedding.list.element"]
    assert column.compression == "UNCOMPRESSED"
    assert not column.has_dictionary_page
    assert not column.is_stats_set
    assert by_path["item"].is_stats_set
    kind = duckdb.execute(f"SELECT DISTINCT typeof(embedding) FROM '{part}'").fetchall()
    assert kind == [("FLOAT[]",)]


def test_rows_of_another_provenance_are_refused_by_name(table: FeatureTable) -> None:
    table.append(rows([1], numbers(1)), MADE)
    table.append(rows([2], numbers(1)), replace(MADE, libraries={"numpy": "3"}))
    with pytest.raises(UserError, match="checkpoint 'c1' and 'c2'"):
        table.append(rows([3], numbers(1)), replace(MADE, checkpoint="c2"))
    assert len(table.parts()) == 2


def test_a_mixture_made_by_hand_is_noticed_and_named(
    warehouse: Warehouse, table: FeatureTable
) -> None:
    table.append(rows([1], numbers(1)), MADE)
    other = FeatureStore(warehouse).table("tiny", "other", "image")
    part = other.append(rows([2], numbers(1)), replace(MADE, pooling="mean"))
    part.rename(table.path / "part-00001.parquet")
    with pytest.raises(UserError, match=r"mixes two extractions \(pooling 'none' and 'mean'"):
        table.provenance()
    table.finish("f", MADE)
    with pytest.raises(UserError, match="mixes two extractions"):
        table.read(3, "f")


def test_a_part_without_provenance_is_refused(table: FeatureTable) -> None:
    table.path.mkdir(parents=True)
    pq.write_table(rows([1], numbers(1)), table.path / "part-00000.parquet")
    with pytest.raises(UserError, match="has no provenance"):
        table.provenance()


def test_reading_says_what_is_missing(table: FeatureTable) -> None:
    with pytest.raises(UserError, match="image=toy of tiny does not exist; run: mmrec extract"):
        table.read(3, "f1")
    table.append(rows([1], numbers(1)), MADE)
    with pytest.raises(UserError, match="is unfinished"):
        table.read(3, "f1")
    table.finish("f1", MADE)
    assert table.read(3, "f1").present.sum() == 1
    with pytest.raises(UserError, match="earlier preparation"):
        table.read(3, "f2")


def test_rewriting_keeps_chosen_rows_under_new_indices(table: FeatureTable) -> None:
    vectors = numbers(5)
    first = table.append(rows([0, 1, 2], vectors[:3]), MADE)
    second = table.append(rows([3, 4], vectors[3:]), MADE)
    table.finish("f1", MADE)
    table.rewrite(first, np.array([True, False, True]), np.array([6, -1, 5], np.int32))
    assert table.manifest() is None  # unfinished from the first change on
    table.rewrite(second, np.array([False, False]), np.array([0, 0], np.int32))
    assert table.parts() == [first]
    table.finish("f2", MADE)
    matrix = table.read(7, "f2")
    assert np.flatnonzero(matrix.present).tolist() == [5, 6]
    assert (matrix.vectors[[6, 5]] == vectors[[0, 2]]).all()
    light = table.small_columns()
    assert light["item_id"].to_pylist() == ["id0", "id2"]
    assert light["n_tokens"].to_pylist() == [0, 2]
    assert table.provenance() == MADE


def test_numbers_go_on_after_a_removed_part(table: FeatureTable) -> None:
    for item in range(3):
        table.append(rows([item], numbers(1)), MADE)
    gone = table.parts()[1]
    table.rewrite(gone, np.array([False]), np.array([0], np.int32))
    new = table.append(rows([9], numbers(1)), MADE)
    assert [part.name for part in table.parts()] == [
        "part-00000.parquet", "part-00002.parquet", "part-00003.parquet",
    ]  # fmt: skip
    assert table.parts()[-1] == new  # the later part is the newer one
    assert table.small_columns()["part"].to_pylist() == [0, 1, 2]


def test_clear_empties_the_table(table: FeatureTable) -> None:
    table.append(rows([1], numbers(1)), MADE)
    table.finish("f", MADE)
    table.clear()
    assert table.parts() == []
    assert table.manifest() is None
    assert len(table.small_columns()) == 0
    assert table.small_columns().schema.names == [
        "item", "item_id", "content_hash", "n_frames", "n_tokens", "partial", "part",
    ]  # fmt: skip


def test_what_a_killed_writer_left_is_no_part_and_goes_at_the_end(table: FeatureTable) -> None:
    table.append(rows([1], numbers(1)), MADE)
    left = table.path / ".part-00001.parquet.1234abcd.tmp"
    left.write_bytes(b"PAR1 half")
    assert len(table.parts()) == 1
    table.finish("f", MADE)
    assert not left.exists()
    assert table.manifest() == {
        "items": "f",
        "rows": 1,
        "parts": read_checksums(table.parts()),
        "provenance": table.manifest()["provenance"],  # type: ignore[index]
    }


def test_a_part_has_an_upper_size(table: FeatureTable) -> None:
    many = ROWS_PER_PART + 1
    with pytest.raises(AssertionError):
        table.append(rows(list(range(many)), np.zeros((many, 3), np.float16)), MADE)


def test_tables_are_found_by_their_parts(warehouse: Warehouse) -> None:
    store = FeatureStore(warehouse)
    for backbone, modality in [("toy", "text"), ("hf:Org/Name", "image"), ("toy", "image")]:
        made = replace(MADE, backbone=backbone, modality=modality)
        store.table("tiny", backbone, modality).append(rows([1], numbers(1)), made)
    (warehouse.dataset_dir("tiny") / "features" / "empty" / "image" / "pooled").mkdir(parents=True)
    labels = [table.label for table in store.tables("tiny")]
    assert labels == ["image=hf-org-name", "image=toy", "text=toy"]
    assert store.tables("another") == []


def test_positions_finds_ids_and_marks_the_unknown() -> None:
    found = positions(pa.chunked_array([["b", "x"], ["a"]]), pa.chunked_array([["a"], ["b", "c"]]))
    assert found.tolist() == [1, -1, 0]


def test_an_embedding_column_takes_only_what_it_says(tmp_path: Path) -> None:
    column = embedding_array(numbers(4)[::2])  # also when the rows are not contiguous
    assert len(column) == 2
    assert np.array_equal(column.flatten().to_numpy().reshape(2, 3), numbers(4)[::2])


def test_a_table_of_other_texts_is_refused(table: FeatureTable) -> None:
    table.append(rows([0], numbers(1)), MADE)
    table.finish("f", MADE, inputs="texts of yesterday")
    assert table.read(1, "f", "texts of yesterday").present.all()
    with pytest.raises(UserError, match="prepared with other image inputs; run: mmrec extract"):
        table.read(1, "f", "texts of today")


@pytest.mark.parametrize("part", [0, 1])
def test_flipped_bytes_are_noticed_wherever_they_are_read(table: FeatureTable, part: int) -> None:
    made = replace(MADE, dim=64)
    vectors = numbers(400, 64)
    for start in (0, 200):
        table.append(rows(range(start, start + 200), vectors[start : start + 200]), made)
    table.finish("f1", made)
    assert (table.read(400, "f1").vectors == vectors).all()
    path = table.parts()[part]
    data = bytearray(path.read_bytes())
    data[data.index(vectors[200 * part + 100].tobytes()) + 5] ^= 1
    path.write_bytes(data)
    for use in (
        lambda: table.read(400, "f1"),
        lambda: table.rows(path),
        lambda: table.rewrite(path, np.arange(200) > 3, np.arange(200, dtype=np.int32)),
    ):
        with pytest.raises(
            UserError, match=rf"part-0000{part}.parquet cannot be read .*changed.*remove"
        ):
            use()
    count = f"SELECT count(*), count(embedding) FROM '{table.parts()[1 - part]}'"
    with duckdb.connect() as db:
        assert db.execute(count).fetchall() == [(200, 200)]


def test_a_part_of_another_version_is_refused(table: FeatureTable) -> None:
    part = table.append(rows([0], numbers(1)), MADE)
    pq.write_table(pq.read_table(part).drop_columns(["n_frames"]), part)
    with pytest.raises(UserError, match="was written by another version; redo its table"):
        table.provenance()


def test_a_table_of_before_the_marks_goes_on_without_them(
    table: FeatureTable, warehouse: Warehouse
) -> None:
    prepare(warehouse, warehouse.root, ids=[f"id{i}" for i in range(5)])
    vectors = numbers(5)
    part = table.append(rows([0, 1, 2], vectors[:3]), MADE)
    pq.write_table(pq.read_table(part).drop_columns(["partial"]), part)
    table.append(rows([3, 4], vectors[3:]), MADE)
    table.rewrite(part, np.array([False, True, True]), np.array([0, 1, 2], np.int32))
    info = warehouse.info("tiny")
    table.finish(info.fingerprint, MADE, inputs=info.inputs["image"])
    found = table.read(5, info.fingerprint, info.inputs["image"])
    assert found.present.tolist() == [False, True, True, True, True]
    assert (found.vectors[1:] == vectors[1:]).all()
    asked = "SELECT item, partial, len(embedding) AS dim FROM features ORDER BY item"
    assert sql_views.query(warehouse, asked).to_pylist() == [
        {"item": item, "partial": None, "dim": 3} for item in (1, 2, 3, 4)
    ]


def test_a_remedy_names_the_backbone_as_it_was_given(table: FeatureTable) -> None:
    table.append(rows([0], numbers(1)), replace(MADE, backbone="hf:toys/Toy one"))
    with pytest.raises(UserError, match=r"unfinished; run: .* --image 'hf:toys/Toy one'"):
        table.check("f1")
    table.parts()[0].unlink()
    with pytest.raises(UserError, match=r"does not exist; run: .* --image toy"):
        table.check("f1")


def test_what_cannot_be_read_is_one_line(table: FeatureTable) -> None:
    table.append(rows([0, 1], numbers(2)), MADE)
    part = table.append(rows([2], numbers(1)), MADE)
    table.finish("f", MADE)
    with pytest.raises(UserError, match=r"an item that is not in 0\.\.1"):
        table.read(2, "f")
    whole = part.read_bytes()
    for damaged in (whole[:100], whole[: len(whole) // 2], b"", b"PAR1" * 9):
        part.write_bytes(damaged)
        for use in (table.provenance, table.small_columns, lambda: table.read(3, "f")):
            with pytest.raises(UserError, match="cannot be read") as caught:
                use()
            assert "\n" not in str(caught.value)
    part.unlink()
    with pytest.raises(UserError, match=r"vectors of 2 items.*manifest has 3"):
        table.read(3, "f")
    table.manifest_path.write_text("{}")
    with pytest.raises(UserError, match=r"pooled\.json is damaged"):
        table.read(3, "f")


def test_the_folder_holds_nothing_but_parquet(table: FeatureTable) -> None:
    """pandas and Polars read a folder whose files all have one ending."""
    vectors = numbers(3)
    table.append(rows([0, 1], vectors[:2]), MADE)
    table.append(rows([2], vectors[2:]), MADE)
    table.finish("f", MADE)
    assert {path.suffix for path in table.path.iterdir()} == {".parquet"}
    read = pq.read_table(table.path)
    assert read["item"].to_pylist() == [0, 1, 2]


def test_a_table_of_an_earlier_version_is_read_and_continued(table: FeatureTable) -> None:
    vectors = numbers(2)
    table.append(rows([0], vectors[:1]), MADE)
    table.finish("f", MADE)
    earlier = table.path / "manifest.json"
    table.manifest_path.rename(earlier)
    assert (table.read(1, "f").vectors == vectors[:1]).all()
    table.unfinish()
    assert not earlier.exists()
    table.append(rows([1], vectors[1:]), MADE)
    table.finish("f", MADE)
    assert (table.read(2, "f").vectors == vectors).all()


def test_a_removed_folder_is_no_table(table: FeatureTable) -> None:
    table.append(rows([0], numbers(1)), MADE)
    table.finish("f", MADE)
    shutil.rmtree(table.path)
    assert table.manifest() is None
    with pytest.raises(UserError, match="does not exist"):
        table.check("f")


def test_a_table_is_read_by_its_modality(warehouse: Warehouse, tmp_path: Path) -> None:
    info = prepare(warehouse, tmp_path, ids=["a", "b"])
    store = FeatureStore(warehouse)
    vectors = numbers(2)
    for backbone in ("toy", "other"):
        table = store.table("tiny", backbone, "image")
        table.append(rows([0, 1], vectors), MADE)
        table.finish(info.fingerprint, MADE, inputs=info.inputs_of("image"))
        if backbone == "toy":
            assert (store.read("tiny", "image").vectors == vectors).all()
    with pytest.raises(UserError, match="image=other, image=toy"):
        store.read("tiny", "image")
    assert store.read("tiny", "image", "other").present.all()
    with pytest.raises(UserError, match="none"):
        store.read("tiny", "text")


def test_a_mapped_matrix_equals_the_one_in_memory(table: FeatureTable) -> None:
    vectors = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float16)
    table.append(rows([7, 1, 3, 0, 5], vectors), MADE)
    table.finish("f1", MADE)
    matrix = table.read(9, "f1")
    for _ in range(2):  # the second call reads the file of the first one
        mapped = table.read(9, "f1", most_bytes=0)
        assert isinstance(mapped.vectors, np.memmap)
        assert np.array_equal(mapped.vectors, matrix.vectors)
        assert np.array_equal(mapped.present, matrix.present)
    file = next(table.path.parent.glob("pooled-*.npy"))
    content = bytearray(file.read_bytes())
    content[-60] ^= 1
    file.write_bytes(content)
    again = table.read(9, "f1", most_bytes=0)  # a damaged file is made again
    assert np.array_equal(again.vectors, matrix.vectors)
