"""The list of known and prepared datasets."""

import json
from pathlib import Path

from features.warehouse import Warehouse
from pipeline.datasets.listing import list_datasets
from tests.pipeline.datasets.raws import (
    INTERACTIONS,
    ITEMS,
    folder,
    prepared,
)


def test_known_and_prepared_datasets_are_listed(warehouse: Warehouse, tmp_path: Path) -> None:
    info = prepared(
        warehouse, tmp_path / "raw", {"interactions.csv": INTERACTIONS, "items.csv": ITEMS}
    )
    folder(warehouse.raw_dir("ml-100k"), {"u.data": "1\t2\t3\t4\n", "u.item": "x"})
    folder(warehouse.raw_dir("ml-1m"), {"users.dat": ""})
    rows = {row["dataset"]: row for row in list_datasets(warehouse)}
    assert json.dumps(rows)  # one JSON document
    assert rows["ml-100k"]["raw_found"]
    assert not rows["ml-1m"]["raw_found"]
    assert rows["ml-1m"]["expected"]["interactions"][0] == "ratings.dat"
    assert rows["ml-1m"]["raw"] == str(warehouse.raw_dir("ml-1m"))
    assert not rows["ml-1m"]["prepared"]
    assert not any(row["damaged"] for row in rows.values())
    mine = rows["mine"]
    assert (mine["users"], mine["items"], mine["interactions"]) == (2, 3, 4)
    assert mine["raw"] == info.raw
