"""A separate installed package adds an importer and a dataset by entry points."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from features.warehouse import Warehouse
from tests.pipeline.datasets.raws import folder, items_of, sequences_of

ROOT = Path(__file__).parents[3]
MODULE = """
from pipeline.datasets.importers.base import Importer, ImportResult
from pipeline.datasets.registry import KnownDataset


def read(db, root, files):
    (path,) = files["interactions"]
    clicks = [line.split("->") for line in path.read_text().splitlines()]
    for order, (user, item) in enumerate(clicks):
        db.execute("CREATE TABLE IF NOT EXISTS raw_interactions"
                   "(user_id VARCHAR, item_id VARCHAR, timestamp BIGINT, ordinal BIGINT)")
        db.execute("INSERT INTO raw_interactions VALUES (?, ?, NULL, ?)", [user, item, order])
    db.execute("CREATE TABLE raw_items AS SELECT DISTINCT item_id, upper(item_id) AS text,"
               " NULL AS image, NULL AS video, NULL AS attributes FROM raw_interactions")
    return ImportResult(timestamps=False, notes=("arrows were followed",))


ARROWS = Importer(summary="user->item", files={"interactions": ("*.arrows",)},
                  required=("interactions",), read=read, example={"x.arrows": "ann->hat"})
CLICKS = KnownDataset(importer="arrows", source="a click log", k_core=0)
LOST = KnownDataset(importer="nowhere", source="a layout that does not exist")
NUMBER = 3
"""
ENTRY_POINTS = """
[mmrec.importers]
arrows = arrow_logs:ARROWS
table = arrow_logs:ARROWS
number = arrow_logs:NUMBER

[mmrec.datasets]
arrow-clicks = arrow_logs:CLICKS
lost = arrow_logs:LOST
gone = arrow_logs:GONE
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """Make a folder on the path with an installed package, as pip would leave it."""
    site = tmp_path / "site"
    about = "Metadata-Version: 2.1\nName: arrow-logs\nVersion: 1.2\n"
    return folder(
        site,
        {
            "arrow_logs.py": MODULE,
            "arrow_logs-1.2.dist-info/METADATA": about,
            "arrow_logs-1.2.dist-info/entry_points.txt": ENTRY_POINTS,
        },
    )


def mmrec(package: Path, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "cli.app", *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(package)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    return done


@pytest.mark.slow
def test_its_dataset_and_its_importer_are_prepared(
    package: Path, warehouse: Warehouse, tmp_path: Path
) -> None:
    root = ("--warehouse", str(warehouse.root))
    raw = folder(tmp_path / "raw", {"log.arrows": "bob->hat\nann->shoe\nann->hat\n"})
    expected = {"ann": ["shoe", "hat"], "bob": ["hat"]}
    done = mmrec(package, "prepare", "--dataset", "arrow-clicks", "--raw", str(raw), *root)
    assert "arrows were followed" in done.stderr
    assert sequences_of(warehouse, "arrow-clicks") == expected
    assert [row["text"] for row in items_of(warehouse, "arrow-clicks")] == ["HAT", "SHOE"]
    mine = ("--dataset", "mine", "--format", "arrows", "--raw", str(raw))
    mmrec(package, "prepare", *mine, *root)
    assert sequences_of(warehouse, "mine") == expected
    assert warehouse.info("mine").format == "arrows"


@pytest.mark.slow
def test_entries_are_listed_with_their_origin_and_broken_ones_are_named(
    package: Path, warehouse: Warehouse
) -> None:
    root = ("--warehouse", str(warehouse.root))
    done = mmrec(package, "datasets", *root)
    assert "arrow-clicks [arrow-logs 1.2] (arrows)" in done.stdout
    assert "arrows [arrow-logs 1.2]: user->item" in done.stdout
    assert "[mmrec]" not in done.stdout
    lines = done.stderr.splitlines()
    for name, reason in {
        "format table": "arrow-logs 1.2",
        "format number": "is 3",
        "dataset gone": "GONE",
        "dataset lost": "'nowhere'",
    }.items():
        (line,) = [line for line in lines if line.startswith(name)]
        assert reason in line
    done = mmrec(package, "datasets", "--json", *root)
    origins = {row["dataset"]: row["origin"] for row in json.loads(done.stdout)}
    assert (origins["ml-1m"], origins["arrow-clicks"]) == ("mmrec", "arrow-logs 1.2")
    refused = mmrec(package, "prepare", "--dataset", "gone", *root, code=2)
    assert "GONE" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


@pytest.mark.slow
def test_the_list_of_datasets_does_not_import_torch(warehouse: Warehouse) -> None:
    code = (
        "import sys; from cli.app import app\n"
        f"try: app(['datasets', '--warehouse', {str(warehouse.root)!r}])\n"
        "except SystemExit: pass\n"
        "sys.exit('imports torch' if 'torch' in sys.modules else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
