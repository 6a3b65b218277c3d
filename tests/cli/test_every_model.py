"""Every model on the demo: it trains, is evaluated, and has a row in a grid."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from cli import extract
from features.warehouse import Warehouse
from pipeline.datasets.prepare import PrepareOptions, prepare_dataset
from pipeline.extraction.options import ExtractOptions
from tests.cli.invoke import run
from trainer.models.registry import MODELS

BASELINES = {
    *("popularity", "transitions", "itemknn", "ease", "sasrec", "gru4rec", "nextitnet", "bert4rec"),
    *("bsarec", "fdsa", "s3rec", "duorec", "carca", "unisrec", "vqrec", "morec", "tedrec"),
    *("fmrlrec", "mmsrec", "mmsr", "pmmrec"),
}


@pytest.mark.heavy
@pytest.mark.timeout(900)
def test_every_model_has_a_row_of_the_demo(tmp_path: Path) -> None:
    listed = json.loads(run("models", "--json").stdout)["models"]
    assert {row["model"] for row in listed} >= BASELINES
    warehouse = Warehouse(tmp_path / "warehouse")
    prepare_dataset(warehouse, PrepareOptions(dataset="demo"), notify=lambda text: None)
    extract.run_extract(warehouse, "demo", ExtractOptions(image="hashed", text="hashed"))
    settings = {"s3rec": ', attributes = "title"'}
    variants = [f'{name} = {{model = "{name}"{settings.get(name, "")}}}' for name in MODELS]
    file = tmp_path / "models.toml"
    file.write_text("\n".join(['rows = ["name"]', "[runs]", "[runs.name]", *variants]))
    result = tmp_path / "result.parquet"
    words = ("grid", str(file), "--dataset", "demo", "--quick", "--json", "--out", str(result))
    document = json.loads(run(*words, "--warehouse", str(warehouse.root)).stdout)
    states = {entry["name"]: entry["state"] for entry in document["runs"]}
    assert states == dict.fromkeys(MODELS, "finished")
    rows = pq.read_table(result).to_pylist()
    assert {row["name"] for row in rows} == set(MODELS)
    assert all(row["low"] <= row["value"] <= row["high"] for row in rows if row["low"] is not None)
