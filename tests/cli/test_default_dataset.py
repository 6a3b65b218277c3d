"""The dataset that a command means when it names none."""

import shutil

from features.documents import read_json, write_json
from features.warehouse import Warehouse
from tests.cli.invoke import run


def copy(root: str, *names: str) -> None:
    """Add copies of the prepared dataset of the fixture."""
    warehouse = Warehouse(root)
    for name in names:
        folder = warehouse.dataset_dir(name)
        shutil.copytree(warehouse.dataset_dir("world"), folder)
        document = read_json(folder / "dataset.json", "")
        write_json(folder / "dataset.json", {**document, "name": name})


def trained_on(root: str) -> str:
    """Return the dataset of a training that names none."""
    printed = run("train", "--model", "popularity", "--json", "--warehouse", root)
    runs = Warehouse(root).runs()
    assert runs
    return printed.stderr.partition("dataset: ")[2].partition(" ")[0]


def test_the_only_dataset_but_the_demo(root: str) -> None:
    copy(root, "demo")
    assert trained_on(root) == "world"


def test_several_datasets_are_an_error_that_lists_them(root: str) -> None:
    copy(root, "shop", "demo")
    stderr = run("train", "--model", "popularity", "--warehouse", root, code=2).stderr
    assert "shop, world" in stderr
    assert "--dataset" in stderr
    assert Warehouse(root).runs() == []


def test_the_last_extracted_dataset_is_meant(root: str) -> None:
    copy(root, "shop")
    Warehouse(root).remember_extracted("world")
    assert trained_on(root) == "world"
    Warehouse(root).remember_extracted("shop")
    assert trained_on(root) == "shop"


def test_a_failed_extraction_is_no_training_on_another_dataset(root: str) -> None:
    copy(root, "shop")
    Warehouse(root).remember_extracted("shop")
    run("extract", "--dataset", "bili", "--text", "hashed", "--warehouse", root, code=2)
    stderr = run("train", "--model", "popularity", "--warehouse", root, code=2).stderr
    assert "bili" in stderr
    assert "shop, world" in stderr
    assert Warehouse(root).runs() == []


def test_an_unknown_name_is_not_remembered(root: str) -> None:
    run("extract", "--dataset", "nothing", "--text", "hashed", "--warehouse", root, code=2)
    assert trained_on(root) == "world"
