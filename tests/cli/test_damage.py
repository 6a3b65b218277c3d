"""Commands on damaged files: one line that names the file, and an exit code that is not 0."""

import shutil
from pathlib import Path

import pyarrow as pa
import pytest

from features.warehouse import Warehouse
from pipeline.media.errors import MediaError
from pipeline.media.reader import MediaReader
from tests.cli.invoke import run
from tests.pipeline.datasets.importers.test_media_files import write_items
from tests.pipeline.datasets.raws import folder, prepared
from tests.pipeline.media.containers import image_bytes
from tests.trainer import worlds

ITEMS, INTERACTIONS = "world/items/part-00000.parquet", "world/interactions/part-00000.parquet"
PREDICTIONS = "runs/a/predictions.parquet"


SETTINGS = ("dim=4", "hidden=4", "heads=1", "length=4", "epochs=1", "device=cpu")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A warehouse with the evaluated runs a and b."""
    warehouse = Warehouse(tmp_path_factory.mktemp("damage") / "warehouse")
    warehouse.create()
    worlds.prepare(warehouse, [[0, 1, 2, 3], [4, 5, 6, 0], [7, 8, 9, 10, 11, 0, 1]], 12)
    option = ("--warehouse", str(warehouse.root))
    pairs = [word for pair in SETTINGS for word in ("--set", pair)]
    for name in ("a", "b"):
        run("train", "--dataset", "world", "--model", "sasrec", "--name", name, *pairs, *option)
        run("eval", "--run", name, *option)
    return warehouse.root


@pytest.fixture
def evaluated(original: Path, tmp_path: Path) -> Warehouse:
    """A copy of the warehouse."""
    return Warehouse(shutil.copytree(original, tmp_path / "evaluated"))


def flip(path: Path, share: float = 0.3) -> None:
    """Flip one bit of a file, at a share of its length."""
    data = bytearray(path.read_bytes())
    data[int(len(data) * share)] ^= 4
    path.unlink()
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "command"),
    [
        (INTERACTIONS, "train --dataset world --model sasrec"),
        (INTERACTIONS, "eval --run a"),
        (INTERACTIONS, "recommend --run a --user u1"),
        (ITEMS, "train --dataset world --model sasrec"),
        (ITEMS, "recommend --run a --user u1"),
        (PREDICTIONS, "compare a b"),
        (PREDICTIONS, "report a b"),
        ("world/dataset.json", "report a b"),
        ("runs/a/model.safetensors", "recommend --run a --user u1"),
        ("runs/b/config.toml", "eval"),
        ("runs/b/config.toml", "recommend --user u1"),
    ],
)
@pytest.mark.parametrize("share", [0.05, 0.6])
def test_a_flipped_bit_is_refused(
    evaluated: Warehouse, name: str, command: str, share: float
) -> None:
    flip(evaluated.root / name, share)
    errors = run(*command.split(), "--warehouse", str(evaluated.root), code=2).stderr
    assert errors.count("error: ") == 1
    assert str((evaluated.root / name).parent) in errors


@pytest.mark.parametrize(
    ("name", "statement", "code"),
    [
        (ITEMS, "SELECT * FROM items", 1),
        (INTERACTIONS, "SELECT * FROM splits", 1),
        (PREDICTIONS, "SELECT * FROM predictions", 1),
        ("runs/a/metrics.parquet", "SELECT * FROM metrics", 1),
        ("runs/b/config.toml", "SELECT * FROM runs", 1),
        (ITEMS, "SELECT * FROM read_parquet('{root}/world/items/part-00000.parquet')", 2),
        (INTERACTIONS, "SELECT * FROM '{root}/world/*/*.parquet'", 2),
        (PREDICTIONS, "SELECT * FROM read_parquet(['{root}/runs/a/predictions.parquet'])", 2),
        (PREDICTIONS, 'SELECT count(*) FROM "{root}/runs/a/predictions.parquet"', 2),
        (ITEMS, "SELECT count(*) FROM read_parquet('{root}/world/' || 'items/*.parquet')", 2),
        (
            PREDICTIONS,
            "SELECT count(*) FROM read_parquet(list_transform(['a'], lambda run:"
            " '{root}/runs/' || run || '/predictions.' || 'parquet'))",
            2,
        ),
        (
            ITEMS,
            "SELECT md5(content) FROM read_blob(concat('{root}/world/items/part-0*.', 'parquet'))",
            2,
        ),
    ],
)
def test_sql_names_the_damaged_files_that_it_reads(
    evaluated: Warehouse, name: str, statement: str, code: int
) -> None:
    path = evaluated.root / name
    command = ("sql", statement.format(root=evaluated.root), "--warehouse", str(evaluated.root))
    if "*/*" not in statement:  # tables of other columns are no table together
        run(*command)
    flip(path)
    assert str(path) in run(*command, code=code).stderr


def test_datasets_names_a_damaged_description(evaluated: Warehouse) -> None:
    path = evaluated.root / "world" / "dataset.json"
    flip(path)
    result = run("datasets", "--warehouse", str(evaluated.root), code=1)
    assert str(path) in result.stderr
    assert "damaged" in result.stdout


@pytest.mark.parametrize("damage", ["pixel", "header", "magic", "cut", "gone"])
def test_a_damaged_tar_of_copied_images_is_refused(
    warehouse: Warehouse, tmp_path: Path, damage: str
) -> None:
    ids = ["a", "b", "c"]
    clicks = "user_id,item_id\n" + "".join(f"u,{name}\n" for name in ids)
    raw = folder(tmp_path / "raw", {"interactions.csv": clicks})
    write_items(raw, pa.array([image_bytes(1), image_bytes(2), b""], pa.binary()), ids)
    prepared(warehouse, raw, {}, k_core=1)
    path = warehouse.dataset_dir("mine") / "media" / "images.tar"
    data = bytearray(path.read_bytes())
    places = {"pixel": 600, "header": 20, "magic": 258}
    if damage in places:
        data[places[damage]] ^= 1
    path.unlink()
    if damage != "gone":
        path.write_bytes(data[:700] if damage == "cut" else data)
    option = ("--warehouse", str(warehouse.root))
    errors = run("extract", "--dataset", "mine", "--image", "hashed", *option, code=2).stderr
    assert f"{path}#" in errors
    assert "mmrec prepare" in errors


def test_an_empty_copied_image_is_a_failure(warehouse: Warehouse, tmp_path: Path) -> None:
    raw = folder(tmp_path / "raw", {"interactions.csv": "user_id,item_id\nu,a\nu,b\n"})
    write_items(raw, pa.array([image_bytes(1), b""], pa.binary()), ["a", "b"])
    prepared(warehouse, raw, {}, k_core=1)
    command = ("sql", "SELECT image FROM items ORDER BY item_id DESC LIMIT 1", "--csv")
    printed = run(*command, "--warehouse", str(warehouse.root)).stdout
    media = MediaReader(raw, warehouse.dataset_dir("mine"))
    with pytest.raises(MediaError, match="empty file"):
        media.read(printed.splitlines()[1].strip('"'))
    media.close()


def test_a_tar_of_copied_images_without_its_last_zeros_is_whole(
    warehouse: Warehouse, tmp_path: Path
) -> None:
    raw = folder(tmp_path / "raw", {"interactions.csv": "user_id,item_id\nu,a\nu,b\n"})
    write_items(raw, pa.array([image_bytes(1), image_bytes(2)], pa.binary()), ["a", "b"])
    prepared(warehouse, raw, {}, k_core=1)
    path = warehouse.dataset_dir("mine") / "media" / "images.tar"
    path.write_bytes(path.read_bytes()[:-6])
    option = ("--warehouse", str(warehouse.root))
    run("extract", "--dataset", "mine", "--image", "hashed", *option)
    statement = "SELECT count(*) AS n FROM features"
    assert run("sql", statement, "--csv", *option).stdout.split() == ['"n"', "2"]
