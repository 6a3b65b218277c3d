from pathlib import Path

import pytest

from features.errors import UserError
from pipeline.datasets.prepare import IMPORTERS
from pipeline.datasets.registry import DATASETS, LAYOUTS, locate, plan
from tests.pipeline.datasets.raws import folder


def test_every_entry_can_be_read() -> None:
    assert set(LAYOUTS) == set(IMPORTERS)
    expected = {
        "ml-100k", "ml-1m", "ml-latest-small", "amazon-beauty", "amazon-sports", "microlens-50k",
        "bili", "kwai", "hm", "demo",
    }  # fmt: skip
    assert set(DATASETS) == expected
    for name, known in DATASETS.items():
        assert known.source
        how = plan(name, None)
        assert set(known.files) <= set(LAYOUTS[known.importer].files)
        assert set(how.needed) <= set(how.files)


def test_a_given_layout_wins_over_the_table() -> None:
    assert plan("ml-1m", None).k_core == 5
    how = plan("ml-1m", "table")
    assert (how.importer, how.k_core) == ("table", 0)
    assert "interactions.csv" in how.files["interactions"]


def test_the_first_pattern_that_matches_wins(tmp_path: Path) -> None:
    raw = folder(tmp_path, dict.fromkeys(("interactions.csv", "items.csv", "items.jsonl"), ""))
    for name in ("images", "covers", "posters_b", "posters_a"):
        (raw / name).mkdir()
    found = locate("x", plan("x", "table"), raw, {})
    assert found == {
        "interactions": (raw / "interactions.csv",),
        "items": (raw / "items.csv",),
        "images": (raw / "images",),
        "videos": (),
    }
    (raw / "interactions.parquet").touch()
    (raw / "images").rmdir()
    (raw / "covers").rmdir()
    found = locate("x", plan("x", "table"), raw, {"items": "items.jsonl"})
    assert found["interactions"] == (raw / "interactions.parquet",)
    assert found["items"] == (raw / "items.jsonl",)
    assert found["images"] == (raw / "posters_a", raw / "posters_b")


def test_a_path_may_be_relative_to_where_one_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = folder(tmp_path / "raw", {"items.csv": "", "a/log.csv": ""})
    here = folder(tmp_path / "here", {"a/log.csv": "", "b/log.csv": ""})
    monkeypatch.chdir(here)
    how = plan("x", "table")
    assert locate("x", how, raw, {"interactions": "a/log.csv"})["interactions"] == (
        raw / "a/log.csv",
    )
    assert locate("x", how, raw, {"interactions": "b/log.csv"})["interactions"] == (
        Path("b/log.csv"),
    )


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    how = plan("amazon-beauty", None)
    with pytest.raises(UserError, match=r"nowhere is no folder; .*Beauty\.txt.*--raw"):
        locate("amazon-beauty", how, tmp_path / "nowhere", {})
    with pytest.raises(UserError, match=r"holds no interactions of amazon-beauty.*Beauty\.txt"):
        locate("amazon-beauty", how, tmp_path, {})
    folder(tmp_path, {"Beauty.txt": ""})
    assert locate("amazon-beauty", how, tmp_path, {})["items"] == ()
