"""A shop adds products and gets clicks: its run recommends the new products without training."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.cli.invoke import run

TASTES, OLD, NEW, USERS, ACTIVE = 15, 450, 50, 300, 100
"""Numbers of tastes, of products at the training, of products added later, of users, and of users
who click two new products each."""
WORDS = "amber birch coral delta ember fjord grove haven inlet jade karst lagoon mesa nectar opal"
SETTINGS = (
    "dim=16 heads=2 hidden=32 length=8 layers=1 dropout=0.1 lr=1e-2 batch_size=64 epochs=6"
    " validate_every=6 device=cpu"
)


def write_shop(raw: Path, items: int, histories: list[list[int]]) -> None:
    """Write a shop whose products show their taste, ``item % TASTES``, by colour and title."""
    rng = np.random.default_rng(1)
    colours, words = rng.integers(0, 256, (TASTES, 3)), WORDS.split()
    (raw / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for item in range(items):
        image = f"images/i{item}.png"
        pixels = colours[item % TASTES] + rng.integers(-12, 13, (8, 8, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(raw / image)
        rows.append([f"i{item}", f"{words[item % TASTES]} number {item}", image])
    clicks = [
        [f"u{user}", f"i{item}", time]
        for user, row in enumerate(histories)
        for time, item in enumerate(row)
    ]
    for name, head, table in (
        ("items", ["item_id", "title", "image"], rows),
        ("interactions", ["user_id", "item_id", "timestamp"], clicks),
    ):
        with (raw / f"{name}.csv").open("w", newline="") as stream:
            csv.writer(stream).writerows([head, *table])


def refuse_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(*arguments: object, **options: object) -> None:
        raise AssertionError("a training step was run")

    monkeypatch.setattr("torch.optim.AdamW.step", step)


def test_new_products_reach_the_users_whose_taste_they_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A random list of 10 has a fitting new product with probability .065, a given one with .02."""
    raw, root = tmp_path / "raw", ("--warehouse", str(tmp_path / "w"))
    rng = np.random.default_rng(0)
    tastes = rng.integers(TASTES, size=USERS)
    histories: list[list[int]] = [
        (taste + TASTES * rng.choice(OLD // TASTES, 8, replace=False)).tolist() for taste in tastes
    ]

    def encoded(items: int) -> dict[str, int]:
        """Prepare and extract the shop, and return the number of encoded items of each modality."""
        write_shop(raw, items, histories)
        table = ("--format", "table", "--raw", str(raw), "--k-core", "0")
        run("prepare", "--dataset", "shop", *table, *root)
        backbones = ("--image", "hashed", "--text", "hashed")
        printed = run("extract", "--dataset", "shop", *backbones, "--json", *root).stdout
        tables: list[dict[str, Any]] = json.loads(printed)["tables"]
        return {row["modality"]: row["encoded"] for row in tables}

    assert encoded(OLD) == {"image": OLD, "text": OLD}
    pairs = [word for pair in SETTINGS.split() for word in ("--set", pair)]
    run("train", "--model", "mmsrec", "--dataset", "shop", "--name", "r", *pairs, *root)
    weights = tmp_path / "w" / "runs" / "r" / "model.safetensors"
    trained = weights.read_bytes()

    refuse_steps(monkeypatch)
    monkeypatch.setattr(
        "trainer.runs.evaluation_rows.bootstrap",
        lambda matrix, groups: (matrix.min(0), matrix.max(0)),
    )
    added = np.arange(OLD, OLD + NEW)
    for user in range(ACTIVE):
        fitting = added[added % TASTES == tastes[user]]
        histories[user] += rng.choice(fitting, 2, replace=False).tolist()
    assert encoded(OLD + NEW) == {"image": NEW, "text": NEW}

    out = tmp_path / "lists.parquet"
    shown = run("recommend", "r", "--all", "--out", str(out), *root).stderr
    assert "catalogue: 500 items, 50 of them new since training" in shown
    reached = {
        int(row["user_id"][1:])
        for row in pq.read_table(out).to_pylist()
        if (item := int(row["item_id"][1:])) >= OLD
        and item % TASTES == tastes[int(row["user_id"][1:])]
    }
    without_clicks = reached - set(range(ACTIVE))
    assert len(without_clicks) / (USERS - ACTIVE) > 5 * 0.065

    report = json.loads(run("eval", "r", "--dataset", "shop", "--json", *root).stdout)
    hit_rates = {
        row["ranker"]: (row["value"], row["users"])
        for row in report["rows"]
        if (row["split"], row["targets"], row["seen"]) == ("test", "new-item", "filtered")
        and row["metric"] == "HR@10"
    }
    assert hit_rates["mmsrec"][0] > 5 * 10 / (OLD + NEW)
    assert hit_rates["mmsrec"][1] == ACTIVE
    assert hit_rates["transitions"][0] < 0.02  # nobody has clicked the new products in training
    assert report["later"]["validation_targets"] == {"validation": USERS - ACTIVE, "test": 0}
    assert weights.read_bytes() == trained
