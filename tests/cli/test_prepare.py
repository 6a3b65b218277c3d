"""``mmrec prepare`` of one's own tables, as typed; the counts are worked by hand."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.cli.invoke import run
from tests.pipeline.datasets.raws import folder

# u: a b b b, of which the last two targets are copies. v: a c c, of which the last one is.
CLICKS = "customer;sku;ts\n" + "".join(
    f"{row}\n" for row in ("u;a;1", "u;b;2", "u;b;2", "u;b;2", "v;a;1", "v;c;5", "v;c;5")
)
GOODS = (
    'sku;title;maker;price;image;"max ""w.x"""\n'
    "a;Apple;Acme;3.5;https://x.org/a.jpg;1\n"
    "b;Bread;;4;/etc/passwd;1\n"
    "c;Cheese;Bob;;{raw}/ok.png;1\n"
    "a;Apfel;Acme;3;no.png;1\n"
)


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """The options that prepare a shop without its duplicates."""
    raw = tmp_path / "raw"
    content = {"interactions.csv": CLICKS, "items.csv": GOODS.replace("{raw}", str(raw))}
    folder(raw, {**content, "ok.png": "x"})
    return [
        "prepare", "--dataset", "shop", "--format", "table", "--raw", str(raw), "--columns",
        "user=customer,item=sku,time=ts", "--text-columns", "maker,title",
        "--warehouse", str(tmp_path / "warehouse"),
    ]  # fmt: skip


def test_the_counts_of_a_shop(command: list[str], tmp_path: Path) -> None:
    root = str(tmp_path / "warehouse")
    assert "--duplicate-items first" in run(*command, code=2).stderr
    kept = run(*command, "--duplicate-items", "first", "--json")
    info = json.loads(kept.stdout)
    assert (info["users"], info["items"], info["interactions"]) == (2, 3, 7)
    assert info["copied_targets"] == 3
    lines = kept.stderr.splitlines()
    for fault in ("so 3 held-out targets are copies", "of 3 items, 3 with text, 1 with an image"):
        assert any(fault in line for line in lines)
    for fault in ("a URL", "outside", "no file"):
        assert any(line.startswith("1 item whose image") and fault in line for line in lines)
    statement = 'SELECT text, price, image, "max ""w.x""" AS w FROM items ORDER BY item'
    rows = json.loads(run("sql", statement, "--json", "--warehouse", root).stdout)
    assert rows == [
        {"text": "Acme. Apple", "price": 3.5, "image": None, "w": 1},
        {"text": "Bread", "price": 4.0, "image": None, "w": 1},
        {"text": "Bob. Cheese", "price": None, "image": "ok.png", "w": 1},
    ]
    np.save(tmp_path / "v.npy", np.full((3, 2), np.nan, np.float32))
    given = ("import-features", "--text", str(tmp_path / "v.npy"), "--prepared-order")
    imported = run(*given, "--warehouse", root)
    assert "NaN" in imported.stderr
    assert "items 'a', 'b', 'c'" in imported.stderr


@pytest.mark.parametrize("names", ["", "title,", "title,title"])
def test_names_of_text_columns_are_checked(command: list[str], names: str) -> None:
    assert "such as title,brand" in run(*command, "--text-columns", names, code=2).stderr
