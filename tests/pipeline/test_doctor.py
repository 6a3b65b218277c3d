"""``mmrec doctor`` on this machine, on one with GPUs, and on a broken one."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants
from rich.console import Console
from typer.testing import CliRunner

from cli import console
from cli.app import app
from features.warehouse import Warehouse
from pipeline import doctor
from pipeline.doctor import Row, examine
from tests.pipeline.backbones.checkpoints import bert_folder
from tests.pipeline.backbones.tiny import prepare

PARTS = ["machine", "libraries", "devices", "decoders", "weights", "warehouse"]


def named(rows: list[Row]) -> dict[str, Row]:
    rows_by_name = {row.name: row for row in rows}
    assert len(rows_by_name) == len(rows)
    return rows_by_name


def test_it_looks_at_everything(warehouse: Warehouse, tmp_path: Path) -> None:
    rows = examine(warehouse.root)
    assert list(dict.fromkeys(row.part for row in rows)) == PARTS
    rows_by_name = named(rows)
    assert rows_by_name["torch"].detail == torch.__version__
    assert rows_by_name["PIL"].available
    assert rows_by_name["CUDA"].available == torch.cuda.is_available()
    assert "JPEG PNG" in rows_by_name["images"].detail
    assert "h264" in rows_by_name["videos"].detail
    assert rows_by_name["run offline"].detail.split(": ")[1].startswith("hashed")
    assert rows_by_name["root"].detail == str(warehouse.root)
    assert rows_by_name["datasets"] == Row(
        part="warehouse", name="datasets", available=False, detail="none is prepared"
    )
    prepare(warehouse, tmp_path, ids=["a"], text=["a"])
    assert named(examine(warehouse.root))["datasets"].detail == "tiny"


def test_a_library_that_cannot_be_imported_is_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("faiss", "av", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)  # whoever imports it fails
    rows_by_name = named(examine(tmp_path / "none", thorough=True))
    for name in ("faiss", "av", "transformers"):
        assert not rows_by_name[name].available
        assert rows_by_name[name].detail.startswith("cannot be imported (ModuleNotFoundError: ")
    assert not rows_by_name["FAISS on GPU"].available
    assert not rows_by_name["videos"].available
    assert rows_by_name["torchvision"].available
    assert rows_by_name["images"].available
    assert rows_by_name["root"].detail.endswith("none (does not exist yet)")
    assert rows_by_name["disk"].available


def test_a_look_that_fails_hides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise RuntimeError("no such\nlibrary")

    monkeypatch.setattr(doctor, "_weights", fails)
    (tmp_path / "file").write_text("")
    rows_by_name = named(examine(tmp_path / "file"))
    assert rows_by_name["weights"].detail == "RuntimeError: no such library"
    assert "is a file, not a warehouse" in rows_by_name["root"].detail
    assert rows_by_name["torch"].available


def test_gpus_with_their_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = [SimpleNamespace(name="New", major=9), SimpleNamespace(name="Old", major=7)]
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (1e9 * index, 8e9))
    monkeypatch.setattr(torch.cuda, "get_device_properties", kinds.__getitem__)
    rows_by_name = named(examine(tmp_path / "none"))
    assert rows_by_name["CUDA"].detail == "13.0, 2 devices"
    assert rows_by_name["cuda:0"].detail == "New, 8.0 GB, 0.0 GB free, bf16"
    assert rows_by_name["cuda:1"].detail == "Old, 8.0 GB, 1.0 GB free"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is built without it" in named(examine(tmp_path / "none"))["CUDA"].detail


def test_weights_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    bert_folder(tmp_path / "models--google-bert--bert-base-uncased" / "snapshots" / "abc")
    (tmp_path / "models--org--without" / "snapshots" / "abc").mkdir(parents=True)
    rows_by_name = named(examine(tmp_path / "none"))
    assert rows_by_name["in it"].detail == "google-bert/bert-base-uncased"
    assert "bert" in rows_by_name["run offline"].detail.split()
    assert "roberta" not in rows_by_name["run offline"].detail.split()


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = ["--warehouse", str(tmp_path / ("long/" * 30))]
    told = CliRunner().invoke(app, ["doctor", "--json", *root])
    assert told.exit_code == 0
    rows = json.loads(told.stdout)
    assert {row["part"] for row in rows} == set(PARTS)
    with (tmp_path / "out").open("w") as file:
        printed = Console(file=file, width=80, highlight=False, soft_wrap=True)
        monkeypatch.setattr(console, "out", printed)
        assert CliRunner().invoke(app, ["doctor", *root]).exit_code == 0
    lines = (tmp_path / "out").read_text().splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in "".join(lines)
    said = "".join("".join(lines).split())
    assert all("".join(row["detail"].split()) in said for row in rows if row["name"] != "memory"
               and len(row["detail"]) < 40)  # fmt: skip
