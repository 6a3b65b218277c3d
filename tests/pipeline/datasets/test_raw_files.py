"""The raw files of a dataset: formats, patterns, and paths that the user gives."""

from pathlib import Path

import pytest

from features.errors import UserError
from pipeline.datasets.raw_files import locate_files, raw_format
from tests.pipeline.datasets.raws import folder


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


def test_missing_files_are_named(tmp_path: Path) -> None:
    format = raw_format("amazon-beauty")
    with pytest.raises(UserError, match=r"nowhere .*Beauty\.txt.*--raw"):
        locate_files("amazon-beauty", format, tmp_path / "nowhere", {})
    with pytest.raises(UserError, match=r"interactions of amazon-beauty.*Beauty\.txt.*--file"):
        locate_files("amazon-beauty", format, tmp_path, {})
    folder(tmp_path, {"Beauty.txt": ""})
    assert locate_files("amazon-beauty", format, tmp_path, {})["items"] == ()
