"""``mmrec push-features`` and ``mmrec pull-features``."""

import json
import shutil
from pathlib import Path

from features.store import FeatureStore
from features.warehouse import Warehouse
from tests.cli.invoke import run
from tests.object_store import BUCKET, LocalStorage


def test_tables_go_to_object_storage_and_come_back(root: str, storage: LocalStorage) -> None:
    url = f"s3://{BUCKET}/features"
    words = ("--warehouse", root, "--json")
    pushed = json.loads(run("push-features", "--to", url, *words).stdout)
    assert [table["table"] for table in pushed["tables"]] == ["image=toy", "text=toy"]
    store = FeatureStore(Warehouse(root))
    before = {name: store.read("world", name, "toy").vectors for name in ("image", "text")}
    shutil.rmtree(store.table("world", "toy", "text").path.parents[1])
    pulled = json.loads(
        run("pull-features", "--from", url, "--features", "text=toy", *words).stdout
    )
    assert [(table["table"], table["copied"]) for table in pulled["tables"]] == [("text=toy", 1)]
    assert (store.read("world", "text", "toy").vectors == before["text"]).all()
    table = run("pull-features", "--from", url, "--warehouse", root).stdout
    assert "image=toy" in table
    line = run("pull-features", "--from", f"{url}/x", "--warehouse", root, code=2).stderr
    assert f"{url}/x/world has no finished feature table; correct the URL" in line


def test_a_place_that_is_no_object_storage_is_one_line(root: str, tmp_path: Path) -> None:
    stderr = run("push-features", "--to", str(tmp_path), "--warehouse", root, code=2).stderr
    assert "is no folder in object storage; write s3://BUCKET" in stderr
    assert stderr.count("\n") == 1
