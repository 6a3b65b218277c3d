"""Whole files of another table in the place of a table's own files."""

import json
import shutil
from pathlib import Path

import pytest

from features.documents import read_json, write_json
from features.warehouse import Warehouse
from tests.cli.invoke import run

IDS = [f"i{index}" for index in range(8)]
CLICKS = "".join(f"u{user},{item}\n" for user in range(4) for item in IDS[user : user + 5])
ITEMS, PART = "items/part-00000.parquet", "features/hashed/text/pooled/part-00000.parquet"
SETTINGS = "dim=4 hidden=4 heads=1 length=4 epochs=1 device=cpu"
TRAIN = (
    "train --dataset one --model sasrec",
    "train --dataset one --model mmsrec --features text=hashed",
)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A warehouse with two datasets that differ in texts alone, and their features."""
    root = tmp_path_factory.mktemp("foreign")
    warehouse = Warehouse(root / "warehouse")
    for name in ("one", "two"):
        raw = root / name
        raw.mkdir()
        (raw / "interactions.csv").write_text("user_id,item_id\n" + CLICKS)
        titles = "".join(f"{item},{name} title {item}\n" for item in IDS)
        (raw / "items.csv").write_text("item_id,title\n" + titles)
        run_command(warehouse, f"prepare --dataset {name} --format table --raw {raw}")
        run_command(warehouse, f"extract --dataset {name} --text hashed")
    return warehouse.root


@pytest.fixture
def copied(original: Path, tmp_path: Path) -> Warehouse:
    """A copy of the warehouse."""
    return Warehouse(shutil.copytree(original, tmp_path / "copied"))


def run_command(warehouse: Warehouse, command: str, code: int = 0) -> str:
    words = command.split()
    if words[0] == "train":
        words += [word for pair in SETTINGS.split() for word in ("--set", pair)]
    return run(*words, "--warehouse", str(warehouse.root), code=code).stderr


@pytest.mark.parametrize(
    ("file", "command"),
    [
        (ITEMS, TRAIN[0]),
        (ITEMS, "extract --dataset one --text hashed"),
        (ITEMS, "export-dataset --dataset one --out {root}/exported"),
        ("interactions/part-00000.parquet", TRAIN[0]),
        (PART, TRAIN[1]),
    ],
)
def test_a_whole_file_of_another_table_is_refused(
    copied: Warehouse, file: str, command: str
) -> None:
    source = copied.dataset_dir("two") / file
    if file.startswith("interactions"):  # the two tables are equal
        source = copied.dataset_dir("two") / ITEMS
    shutil.copy(source, copied.dataset_dir("one") / file)
    errors = run_command(copied, command.format(root=copied.root), code=2)
    assert errors.count("error: ") == 1
    assert "part-00000.parquet is not the file that was written for this table" in errors
    assert ("mmrec extract" if file == PART else "mmrec prepare") in errors


def test_extracting_again_replaces_a_part_of_another_table(copied: Warehouse) -> None:
    part = copied.dataset_dir("one") / PART
    before = part.read_bytes()
    shutil.copy(copied.dataset_dir("two") / PART, part)
    run_command(copied, "extract --dataset one --text hashed")
    run_command(copied, TRAIN[1])
    (part,) = part.parent.glob("part-*.parquet")
    assert part.read_bytes() == before


@pytest.mark.parametrize(("file", "view"), [(ITEMS, "items"), (PART, "features")])
def test_sql_leaves_out_a_table_with_a_file_of_another(
    copied: Warehouse, file: str, view: str
) -> None:
    shutil.copy(copied.dataset_dir("two") / file, copied.dataset_dir("one") / file)
    command = ("sql", f"SELECT DISTINCT dataset FROM {view}", "--json")
    result = run(*command, "--warehouse", str(copied.root), code=1)
    assert "is not the file that was written" in result.stderr
    assert json.loads(result.stdout) == [{"dataset": "two"}]


def test_documents_of_earlier_versions_name_no_files(copied: Warehouse) -> None:
    folder = copied.dataset_dir("one")
    for path, key in (
        (folder / "dataset.json", "checksums"),
        (folder / f"{Path(PART).parent}.json", "parts"),
    ):
        document = read_json(path, "")
        del document[key]
        write_json(path, document)
    for command in TRAIN:
        run_command(copied, command)
