"""Ready-made vectors become feature tables, in every format."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.numpy import save_file
from typer.testing import CliRunner

from cli.app import app
from features.errors import UserError
from features.store import FeatureStore
from features.warehouse import Warehouse
from pipeline.extraction.import_features import import_features
from tests.pipeline.datasets.raws import INTERACTIONS, ITEMS, prepared

IDS = ["c", "x", "a", "b"]  # x is not in the dataset
VECTORS = np.arange(12, dtype=np.float32).reshape(4, 3) / 7


def _itememb(path: Path) -> None:
    rows = [f"{i}\t{' '.join(map(str, row))}\n" for i, row in zip(IDS, VECTORS, strict=True)]
    path.write_text("iid:token\titem_emb:float_seq\n" + "".join(rows))


def _folder(path: Path) -> None:
    path.mkdir()
    for name, row in zip(IDS, VECTORS, strict=True):
        np.save(path / f"{name}.npy", row[None])


def _parquet(path: Path) -> None:
    pq.write_table(pa.table({"item_id": IDS, "embedding": VECTORS.tolist()}), path)


FORMATS: dict[str, tuple[Callable[[Path], object], bool]] = {
    "f.npy": (lambda path: np.save(path, VECTORS), True),
    "f.npz": (lambda path: np.savez_compressed(path, x=VECTORS), True),
    "f.safetensors": (lambda path: save_file({"x": VECTORS}, path), True),
    "f.pt": (lambda path: torch.save({"x": torch.from_numpy(VECTORS)}, path), True),
    "f.parquet": (_parquet, False),
    "f.itememb": (_itememb, False),
    "f": (_folder, False),
}


@pytest.fixture
def shop(warehouse: Warehouse, tmp_path: Path) -> Warehouse:
    prepared(warehouse, tmp_path / "raw", {"interactions.csv": INTERACTIONS, "items.csv": ITEMS})
    return warehouse


def _ids(tmp_path: Path) -> str:
    (tmp_path / "ids.txt").write_text("\n".join(IDS) + "\n")
    return str(tmp_path / "ids.txt")


@pytest.mark.parametrize("name", list(FORMATS))
def test_every_format_gives_the_same_table(shop: Warehouse, tmp_path: Path, name: str) -> None:
    write, needs_ids = FORMATS[name]
    write(tmp_path / name)
    ids = _ids(tmp_path) if needs_ids else None
    result = import_features(shop, "mine", "image", str(tmp_path / name), ids=ids, name="own")
    assert (result.rows, result.absent, result.unknown, result.failed) == (3, 0, 1, 0)
    info = shop.info("mine")
    table = FeatureStore(shop).table("mine", "own", "image")
    matrix = table.read(3, info.fingerprint, info.inputs_of("image"))
    np.testing.assert_array_equal(matrix.vectors, VECTORS[[2, 3, 0]])
    assert matrix.provenance.checkpoint.startswith("sha256:")
    assert f"{name}, shape (4, 3)" in matrix.provenance.preprocessing
    if needs_ids:
        with pytest.raises(UserError, match="--ids FILE, or --prepared-order"):
            import_features(shop, "mine", "image", str(tmp_path / name), name="own")


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int16"])
def test_nan_rows_are_failures_and_numbers_are_kept(
    shop: Warehouse, tmp_path: Path, dtype: str
) -> None:
    vectors = (VECTORS[:3] * 7).astype(dtype)
    if dtype != "int16":
        vectors[1, 2] = np.nan
    np.save(tmp_path / "v.npy", vectors)
    result = import_features(shop, "mine", "text", str(tmp_path / "v.npy"), prepared_order=True)
    assert result.failed == (dtype != "int16")
    info = shop.info("mine")
    table = FeatureStore(shop).table("mine", "imported-v", "text")
    matrix = table.read(3, info.fingerprint, info.inputs_of("text"))
    assert matrix.vectors.dtype == ("float16" if dtype == "float16" else "float32")
    np.testing.assert_array_equal(matrix.vectors[0], vectors[0])
    assert matrix.present.tolist() == [True, dtype == "int16", True]
    failures = shop.dataset_dir("mine") / "failures" / "imported-v-text.parquet"
    assert failures.exists() == (dtype != "int16")


@pytest.mark.parametrize(
    ("content", "ids", "match"),
    [
        (VECTORS, "a\nb\n", "2 ids.*4 rows"),
        (VECTORS, "a\na\nb\nc\n", "'a' more than once"),
        (VECTORS, "p\nq\nr\ns\n", "none of the 4 ids.*'a'"),
        (VECTORS, None, "4 rows.*3 items.*--ids"),
        (VECTORS[0], "a\n", "shape"),
        (np.array(["1", "2"]), "a\nb\n", "numbers"),
        (np.array([[object()]]), "a\n", "pickled"),
    ],
)
def test_files_that_do_not_fit_are_refused(
    shop: Warehouse, tmp_path: Path, content: np.ndarray, ids: str | None, match: str
) -> None:
    np.save(tmp_path / "v.npy", content, allow_pickle=True)
    if ids is not None:
        (tmp_path / "ids").write_text(ids)
    with pytest.raises(UserError, match=match):
        import_features(
            shop, "mine", "image", str(tmp_path / "v.npy"),
            ids=None if ids is None else str(tmp_path / "ids"), prepared_order=ids is None,
        )  # fmt: skip
    assert not FeatureStore(shop).tables("mine")


def test_a_file_that_runs_code_is_refused(shop: Warehouse, tmp_path: Path) -> None:
    torch.save({"x": Path("code")}, tmp_path / "v.pt")
    with pytest.raises(UserError, match=r"v\.pt cannot be read"):
        import_features(shop, "mine", "image", str(tmp_path / "v.pt"), prepared_order=True)


def test_a_damaged_archive_is_refused(shop: Warehouse, tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "v.npz", x=np.random.default_rng(0).normal(size=(3, 5000)))
    damaged = bytearray((tmp_path / "v.npz").read_bytes())
    damaged[40_000:40_100] = b"0" * 100
    (tmp_path / "v.npz").write_bytes(damaged)
    with pytest.raises(UserError, match=r"v\.npz cannot be read"):
        import_features(shop, "mine", "image", str(tmp_path / "v.npz"), prepared_order=True)
    assert not FeatureStore(shop).tables("mine")


def test_many_rows_are_written_in_parts(warehouse: Warehouse, tmp_path: Path) -> None:
    names = [f"i{number}" for number in range(20_000)]
    content = {"interactions.csv": "user_id,item_id\n" + "".join(f"u,{name}\n" for name in names)}
    prepared(warehouse, tmp_path / "raw", content)
    vectors = np.random.default_rng(0).normal(size=(20_000, 4)).astype(np.float16)
    np.save(tmp_path / "v.npy", vectors)
    np.save(tmp_path / "ids.npy", np.array(names))
    result = import_features(
        warehouse, "mine", "video", str(tmp_path / "v.npy"), ids=str(tmp_path / "ids.npy")
    )
    assert result.rows == 20_000
    info = warehouse.info("mine")
    table = FeatureStore(warehouse).table("mine", "imported-v", "video")
    assert len(table.parts()) == 3
    matrix = table.read(20_000, info.fingerprint, info.inputs_of("video"))
    order = np.argsort(np.array(names))  # item ids ascend as text
    np.testing.assert_array_equal(matrix.vectors, vectors[order])


def test_the_command_prints_the_counts(shop: Warehouse, tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", VECTORS)
    words = ["import-features", "--dataset", "mine", "--image", str(tmp_path / "v.npy")]
    words += ["--ids", _ids(tmp_path), "--warehouse", str(shop.root), "--json"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)["tables"]
    assert (row["backbone"], row["rows"], row["unknown"]) == ("imported-v", 3, 1)
