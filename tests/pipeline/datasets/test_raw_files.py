"""The raw files of a dataset: formats, patterns, and paths that the user gives."""

from pathlib import Path

import duckdb
import pytest

from features.atomic_files import read_errors
from features.errors import UserError
from features.warehouse import Warehouse
from pipeline.datasets.prepare import PrepareOptions, prepare_dataset
from pipeline.datasets.raw_files import locate_files, raw_format
from tests.pipeline.datasets.raws import INTERACTIONS, ITEMS, folder


def test_a_given_format_wins_over_the_registered_one() -> None:
    assert raw_format("ml-1m").k_core == 5
    format = raw_format("ml-1m", "table")
    assert (format.name, format.k_core) == ("table", 0)
    assert "interactions.csv" in format.files["interactions"]


def test_the_first_pattern_that_matches_wins(tmp_path: Path) -> None:
    raw = folder(tmp_path, dict.fromkeys(("interactions.csv", "items.csv", "items.jsonl"), ""))
    for name in ("images", "covers", "posters_b", "posters_a"):
        (raw / name).mkdir()
    files = locate_files("x", raw_format("x", "table"), raw, {})
    assert files == {
        "interactions": (raw / "interactions.csv",),
        "items": (raw / "items.csv",),
        "images": (raw / "images",),
        "videos": (),
    }
    (raw / "interactions.parquet").touch()
    (raw / "images").rmdir()
    (raw / "covers").rmdir()
    files = locate_files("x", raw_format("x", "table"), raw, {"items": "items.jsonl"})
    assert files["interactions"] == (raw / "interactions.parquet",)
    assert files["items"] == (raw / "items.jsonl",)
    assert files["images"] == (raw / "posters_a", raw / "posters_b")


def test_a_path_may_be_relative_to_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = folder(tmp_path / "raw", {"items.csv": "", "a/log.csv": ""})
    monkeypatch.chdir(folder(tmp_path / "work", {"a/log.csv": "", "b/log.csv": ""}))
    format = raw_format("x", "table")
    for path, expected in (("a/log.csv", raw / "a/log.csv"), ("b/log.csv", Path("b/log.csv"))):
        files = locate_files("x", format, raw, {"interactions": path})
        assert files["interactions"] == (expected,)


def test_all_missing_files_are_named(tmp_path: Path) -> None:
    format = raw_format("ml-1m")
    with pytest.raises(UserError, match=r"interactions of .*ratings\.dat.*items of .*movies\.dat"):
        locate_files("ml-1m", format, tmp_path, {})
    with pytest.raises(UserError, match=r"--file interactions=a and --file items=b: do not exist"):
        locate_files("ml-1m", format, tmp_path, {"interactions": "a", "items": "b"})
    folder(
        tmp_path, dict.fromkeys(("a_users.tsv", "b_users.tsv", "a_items.tsv", "b_items.tsv"), "")
    )
    with pytest.raises(UserError, match=r"several interactions: .*several items: .*--file items="):
        locate_files("x", raw_format("x", "bili"), tmp_path, {})


def test_missing_files_are_named(tmp_path: Path) -> None:
    format = raw_format("amazon-beauty")
    with pytest.raises(UserError, match=r"nowhere .*Beauty\.txt.*--raw"):
        locate_files("amazon-beauty", format, tmp_path / "nowhere", {})
    with pytest.raises(UserError, match=r"interactions of amazon-beauty.*Beauty\.txt.*--file"):
        locate_files("amazon-beauty", format, tmp_path, {})
    folder(tmp_path, {"Beauty.txt": ""})
    assert locate_files("amazon-beauty", format, tmp_path, {})["items"] == ()


@pytest.mark.parametrize("name", ["INTERACTIONS.CSV", "interactions.CSV", "Interactions.Parquet"])
def test_the_case_of_names_does_not_matter(tmp_path: Path, name: str) -> None:
    raw = folder(tmp_path, {name: "", "Items.TSV": "", "Images/a.png": ""})
    files = locate_files("x", raw_format("x", "table"), raw, {})
    assert files["interactions"] == (raw / name,)
    assert files["items"] == (raw / "Items.TSV",)
    assert files["images"] == (raw / "Images",)


@pytest.mark.parametrize("url", ["https://x.org/d.csv", "s3://bucket/d.csv", "hf://datasets/x"])
def test_urls_in_place_of_files(tmp_path: Path, url: str) -> None:
    with pytest.raises(UserError, match=f"items={url} is a URL; download"):
        locate_files("x", raw_format("x", "table"), tmp_path, {"items": url})
    with pytest.raises(UserError, match=f"--raw {url} is a URL; download"):
        locate_files("x", raw_format("x", "table"), Path(url), {})


@pytest.mark.parametrize("name", ["interactions.csv", "interactions.parquet"])
def test_a_file_without_permission(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder(tmp_path, {name: INTERACTIONS, "items.csv": ITEMS})

    def refuse(*arguments: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", refuse)
    monkeypatch.setattr("pyarrow.parquet.read_schema", refuse)
    options = PrepareOptions(dataset="mine", raw=tmp_path, format="table")
    with pytest.raises(UserError, match=f"{name}: no permission.*permissions"):
        prepare_dataset(Warehouse(tmp_path / "warehouse"), options)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (PermissionError(13, "denied", "x.parquet"), "x.parquet: no permission.*permissions"),
        (duckdb.OutOfMemoryException("full"), "memory"),
        (MemoryError(), "memory"),
    ],
)
def test_faults_of_the_machine_do_not_ask_to_prepare_again(
    tmp_path: Path, error: Exception, expected: str
) -> None:
    with pytest.raises(UserError, match=expected) as caught, read_errors(tmp_path, "prepare again"):
        raise error
    assert "prepare again" not in str(caught.value)
