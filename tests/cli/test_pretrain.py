"""``mmrec pretrain`` and what follows: retrieval, and a training that starts from it."""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from features.documents import read_json, write_json
from features.warehouse import Warehouse
from tests.cli.invoke import run
from tests.trainer import worlds

SMALL = ["dim=8", "heads=2", "hidden=8", "length=5", "epochs=2", "batch_size=16", "device=cpu"]
SETS = [word for setting in SMALL for word in ("--set", setting)]


def prepare(warehouse: Warehouse, n_items: int) -> None:
    world = worlds.cycles(n_items=n_items)
    bounds = zip(world.offsets, world.offsets[1:], strict=False)
    worlds.prepare(warehouse, [world.items[a:b].tolist() for a, b in bounds], n_items)
    worlds.extract(warehouse, worlds.features(n_items))


@pytest.mark.slow
def test_from_items_to_recommendations(warehouse: Warehouse) -> None:
    prepare(warehouse, 40)
    options = ["--warehouse", str(warehouse.root)]
    command = ["pretrain", "--model", "mmsrec", "--name", "p", *SETS, "--set", "holdout=0.2"]
    output = run(*command, *options).stderr
    assert "validated on validation: " in output
    assert "start from it: mmrec train --model mmsrec --init p" in output

    line = run("eval", "--run", "p", *options, code=2).stderr.splitlines()[-1]
    assert line.startswith("error: run 'p' is a pre-training and recommends nothing; start one")
    line = run("train", "--resume", "--run", "p", *options, code=2).stderr.splitlines()[-1]
    assert line.endswith(": mmrec pretrain --resume --run p")
    assert "is finished already" in run("pretrain", "--resume", "--run", "p", *options).stderr

    result = run("eval", "--protocol", "retrieval", "--run", "p", "--json", *options)
    rows: list[dict[str, Any]] = json.loads(result.stdout)["rows"]
    assert {row["split"] for row in rows} == {"validation", "test"}
    # The features have widths 6 and 5, so they cannot be compared themselves.
    assert {row["ranker"] for row in rows} == {"mmsrec", "ridge", "untrained"}
    assert {row["metric"] for row in rows} == {"Recall@1", "Recall@5", "Recall@10", "MRR"}
    path = warehouse.runs_dir / "p" / "metrics.parquet"
    stored = pq.read_table(path).to_pylist()
    assert sum(row["phase"] == "eval" for row in stored) == len(rows)
    trained = {row["metric"] for row in stored if row["split"] == "train"}
    assert trained == {"loss", "v-v", "t-t", "v-t", "vt-vt", "seconds"}
    shown = run("eval", "--protocol", "retrieval", "--run", "p", *options).stdout
    assert "test, text-to-vision:" in shown
    assert re.search(r"^ *metric +mmsrec +ridge +untrained", shown, re.MULTILINE)
    assert re.search(r"ridge: ridge regression between the features, fitted on \d+ tr", shown)

    command = ["train", "--model", "mmsrec", "--init", "p", "--name", "t", *SETS]
    output = run(*command, *options).stderr
    assert "from run p (full): " in output
    assert "centring" not in output  # it is a part of the first layer now
    result = run(
        "eval", "--protocol", "retrieval", "--run", "t", "--dataset", "world", "--json", *options
    )
    rows = json.loads(result.stdout)["rows"]
    assert {row["split"] for row in rows} == {"all items"}
    # Nothing is held out from a training on histories: ridge regression has no items of its own.
    assert {row["ranker"] for row in rows} == {"mmsrec", "untrained"}


def three_datasets(warehouse: Warehouse) -> None:
    """Prepare the datasets a, b and c, with features of one backbone."""
    for name, n_items in (("a", 12), ("b", 9), ("c", 14)):
        prepare(warehouse, n_items)
        path = warehouse.dataset_dir("world") / "dataset.json"
        text = json.dumps(read_json(path, "")).replace('"world"', f'"{name}"')
        text = text.replace('"fingerprint": "f"', f'"fingerprint": "{name}"')
        write_json(path, json.loads(text))
        for manifest in warehouse.dataset_dir("world").glob("features/*/*/*.json"):
            text = json.dumps(read_json(manifest, ""))
            write_json(manifest, json.loads(text.replace('"items": "f"', f'"items": "{name}"')))
        warehouse.dataset_dir("world").rename(warehouse.dataset_dir(name))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("unisrec", ["freeze=true"]),
        ("unisrec", ["freeze=true", "ids=true"]),
        ("vqrec", ["freeze=true"]),
        ("vqrec", ["permute=true"]),
    ],
)
def test_texts_of_two_datasets_are_fine_tuned_on_a_third(
    warehouse: Warehouse, model: str, settings: list[str]
) -> None:
    three_datasets(warehouse)
    options = ["--warehouse", str(warehouse.root)]
    both = ["--dataset", "a", "--dataset", "b"]
    output = run("pretrain", "--model", model, *both, "--name", "p", *SETS, *options).stderr
    assert f"{model} on a+b with image=toy, text=toy" in output
    before = load_file(warehouse.runs_dir / "p" / "model.safetensors")
    start = ["train", "--model", model, "--dataset", "c", "--init", "p", "--name", "t", *SETS]
    output = run(*start, *(f"--set={pair}" for pair in settings), *options).stderr
    assert re.search(r"from run p \(full\): .*item_encoder", output)
    after = load_file(warehouse.runs_dir / "t" / "model.safetensors")
    frozen = [key for key in after if key.startswith("sequence_encoder.transformer.")]
    equal = [torch.equal(before[key], after[key]) for key in frozen]
    assert all(equal) if "freeze=true" in settings else not all(equal)
    own = [key for key in after if key.endswith(("codes_NC", "known_N", "id.weight"))]
    assert all(len(after[key]) == 14 for key in own)
    assert bool(own) == (model == "vqrec" or "ids=true" in settings)


@pytest.mark.parametrize(
    ("model", "setting"), [("unisrec", "freeze"), ("vqrec", "freeze"), ("vqrec", "permute")]
)
@pytest.mark.parametrize("command", ["train", "pretrain"])
def test_settings_of_given_weights_need_a_run(
    warehouse: Warehouse, model: str, setting: str, command: str
) -> None:
    prepare(warehouse, 12)
    options = ["--set", f"{setting}=true", "--warehouse", str(warehouse.root)]
    result = run(command, "--model", model, *SETS, *options, code=2)
    assert re.search(rf"{setting}=true.*{model}.*--init", result.stderr)
    assert not list(warehouse.runs_dir.glob("*"))


@pytest.mark.parametrize("transfer", ["items", "full"])
def test_frozen_weights_come_from_the_given_run(warehouse: Warehouse, transfer: str) -> None:
    prepare(warehouse, 12)
    options = ["--model", "unisrec", *SETS, "--warehouse", str(warehouse.root)]
    run("pretrain", "--name", "p", *options)
    start = ["train", *options, "--init", "p", "--set", "freeze=true", "--transfer", transfer]
    result = run(*start, code=2 if transfer == "items" else 0)
    if transfer == "items":
        assert re.search(r"freeze=true keeps sequence_encoder.*'p'.*'items'", result.stderr)


@pytest.mark.slow
def test_from_two_datasets_to_a_third(warehouse: Warehouse) -> None:
    three_datasets(warehouse)
    options = ["--warehouse", str(warehouse.root)]
    both = ["--dataset", "a", "--dataset", "b"]
    sets = [*SETS, "--set", "fusion_heads=2"]
    output = run("pretrain", "--model", "pmmrec", *both, "--name", "p", *sets, *options).stderr
    assert "pmmrec on a+b with image=toy, text=toy" in output
    assert "of 21 items" in output
    losses = pq.read_table(warehouse.runs_dir / "p" / "metrics.parquet").to_pylist()
    named = {row["metric"] for row in losses if row["split"] == "train"}
    assert named == {"loss", "dap", "nicl", "nid", "rcl", "seconds"}
    assert "is finished already" in run("pretrain", "--resume", "--run", "p", *options).stderr

    start = ["train", "--model", "pmmrec", "--dataset", "c", "--init", "p", "--transfer", "text"]
    output = run(*start, "--name", "t", *sets, *options).stderr
    assert "from run p (text): item_encoder.inputs.text, sequence_encoder" in output
    assert re.search(r"item_encoder\.inputs\.image \(.*'text'\)", output)
    assert re.search(r"not used: nid \(", output)


def test_what_is_refused(warehouse: Warehouse) -> None:
    prepare(warehouse, 12)
    options = ["--warehouse", str(warehouse.root)]

    def refused(*arguments: str) -> str:
        return run(*arguments, *options, code=2).stderr.splitlines()[-1]

    assert "sasrec has no pre-training; known: " in refused("pretrain", "--model", "sasrec")
    twice = refused("pretrain", "--model", "mmsrec", "--dataset", "world", "--dataset", "world")
    assert "--dataset names 'world' twice" in twice
    alone = refused("train", "--model", "mmsrec", "--transfer", "items")
    assert "--transfer items takes weights of a run; name it by --init" in alone
    assert "unknown protocol 'x'" in refused("eval", "--protocol", "x")
    run("train", "--model", "sasrec", "--name", "s", *SETS, *options)
    line = refused("eval", "--protocol", "retrieval", "--run", "s")
    assert "sasrec does not encode one modality alone" in line
    assert Path(warehouse.runs_dir / "s").exists()
