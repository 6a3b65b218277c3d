"""A dataset of items without users, and one of interactions without items, in later commands."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from cli.app import app
from features.warehouse import Warehouse
from tests.pipeline.datasets.raws import prepared

SMALL = ["--set", "dim=8", "--set", "heads=2", "--set", "hidden=8", "--set", "epochs=1"]


def _run(warehouse: Warehouse, *words: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [*words, "--warehouse", str(warehouse.root)])
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.slow
def test_items_are_aligned_and_retrieved(warehouse: Warehouse, tmp_path: Path) -> None:
    lines = [f"v{number},caption {number}" for number in range(60)]
    content = {"captions.csv": "video_id,sentence\n" + "\n".join(lines) + "\n"}
    prepared(warehouse, tmp_path / "raw", content, format="captions")
    vectors = np.random.default_rng(0).normal(size=(60, 6)).astype(np.float32)
    np.save(tmp_path / "v.npy", vectors)
    file = str(tmp_path / "v.npy")
    words = ("--dataset", "mine", "--video", file, "--text", file, "--prepared-order")
    assert _run(warehouse, "import-features", *words)[0] == 0
    code, _, errors = _run(warehouse, "pretrain", "--model", "mmsrec", "--dataset", "mine", *SMALL)
    assert code == 0, errors
    code, output, errors = _run(
        warehouse, "eval", "--protocol", "retrieval", "--dataset", "mine", "--json"
    )
    assert code == 0, errors
    rows = json.loads(output)["rows"]
    both = {(row["targets"], row["metric"]) for row in rows if row["ranker"] == "features"}
    names = {"Recall@1", "Recall@5", "Recall@10", "MRR"}
    assert both == {(side, name) for side in ("text-to-vision", "vision-to-text") for name in names}
    raw = [row["value"] for row in rows if row["ranker"] == "features"]
    assert raw == [1.0] * 8  # both sides have the same vectors


def test_all_captions_of_an_image_are_answers(warehouse: Warehouse, tmp_path: Path) -> None:
    """Each of 60 captions is a query; each of 20 images has three of them."""
    lines = [f"v{number % 20},caption {number}" for number in range(60)]
    content = {"captions.csv": "video_id,sentence\n" + "\n".join(lines) + "\n"}
    prepared(warehouse, tmp_path / "raw", content, format="caption-items")
    vectors = np.random.default_rng(0).normal(size=(20, 6)).astype(np.float32)
    np.save(tmp_path / "v.npy", vectors[np.arange(60) % 20])
    file = str(tmp_path / "v.npy")
    words = ("--dataset", "mine", "--video", file, "--text", file, "--prepared-order")
    assert _run(warehouse, "import-features", *words)[0] == 0
    settings = ("--set", "holdout=0.2", *SMALL)
    code, _, errors = _run(
        warehouse, "pretrain", "--model", "mmsrec", "--dataset", "mine", *settings
    )
    assert code == 0, errors
    code, output, errors = _run(
        warehouse, "eval", "--protocol", "retrieval", "--dataset", "mine", "--json"
    )
    assert code == 0, errors
    rows = [row for row in json.loads(output)["rows"] if row["ranker"] == "features"]
    queries = {row["targets"]: row["users"] for row in rows}
    assert queries == {"text-to-vision": 60, "vision-to-text": 20}
    assert [row["value"] for row in rows] == [1.0] * 8


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (("train", "--model", "sasrec"), "no user has 3 interactions"),
        (("train", "--model", "popularity"), "no user has 3 interactions"),
    ],
)
def test_items_alone_are_refused_by_models_of_users(
    warehouse: Warehouse, tmp_path: Path, command: tuple[str, ...], reason: str
) -> None:
    prepared(warehouse, tmp_path / "raw", {"captions.csv": "id,text\na,A\n"}, format="captions")
    code, _, errors = _run(warehouse, *command, "--dataset", "mine")
    assert (code, reason in errors, errors.count("error:")) == (2, True, 1)


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (("train", "--model", "mmsrec"), "features"),
        (("extract",), "no item of mine has an image or a text"),
        (("extract", "--text", "hashed"), "is empty for all"),
    ],
)
def test_interactions_alone_are_refused_by_models_of_features(
    warehouse: Warehouse, tmp_path: Path, command: tuple[str, ...], reason: str
) -> None:
    log = "user_id,item_id\n" + "".join(f"u{n % 5},i{n % 7}\n" for n in range(40))
    prepared(warehouse, tmp_path / "raw", {"interactions.csv": log})
    code, _, errors = _run(warehouse, *command, "--dataset", "mine")
    assert (code, reason in errors) == (2, True), errors
    assert errors.count("error:") == 1
