"""What ``mmrec doctor`` says of this machine, of a richer one, and of a broken one."""

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
    found = {row.name: row for row in rows}
    assert len(found) == len(rows)
    return found


def test_it_looks_at_everything(warehouse: Warehouse, tmp_path: Path) -> None:
    rows = examine(warehouse.root)
    assert list(dict.fromkeys(row.part for row in rows)) == PARTS
    found = named(rows)
    assert found["torch"].says == torch.__version__
    assert found["PIL"].there
    assert found["CUDA"].there == torch.cuda.is_available()
    assert "JPEG PNG" in found["pictures"].says
    assert "h264" in found["clips"].says
    assert found["run offline"].says.split(": ")[1].startswith("hashed")
    assert found["root"].says == str(warehouse.root)
    assert found["datasets"] == Row(
        part="warehouse", name="datasets", there=False, says="none is prepared"
    )
    prepare(warehouse, tmp_path, ids=["a"], text=["a"])
    assert named(examine(warehouse.root))["datasets"].says == "tiny"


def test_a_library_that_cannot_be_imported_is_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("faiss", "av", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)  # whoever imports it fails
    found = named(examine(tmp_path / "none", thorough=True))
    for name in ("faiss", "av", "transformers"):
        assert not found[name].there
        assert found[name].says.startswith("cannot be imported (ModuleNotFoundError: ")
    assert not found["FAISS on GPU"].there
    assert not found["clips"].there
    assert found["torchvision"].there
    assert found["pictures"].there
    assert found["root"].says.endswith("none (not there yet)")
    assert found["disk"].there


def test_a_look_that_fails_hides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise RuntimeError("no such\nlibrary")

    monkeypatch.setattr(doctor, "_weights", fails)
    (tmp_path / "file").write_text("")
    found = named(examine(tmp_path / "file"))
    assert found["weights"].says == "RuntimeError: no such library"
    assert "is a file, not a warehouse" in found["root"].says
    assert found["torch"].there


def test_gpus_with_their_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = [SimpleNamespace(name="New", major=9), SimpleNamespace(name="Old", major=7)]
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (1e9 * index, 8e9))
    monkeypatch.setattr(torch.cuda, "get_device_properties", kinds.__getitem__)
    found = named(examine(tmp_path / "none"))
    assert found["CUDA"].says == "13.0, 2 devices"
    assert found["cuda:0"].says == "New, 8.0 GB, 0.0 GB free, bf16"
    assert found["cuda:1"].says == "Old, 8.0 GB, 1.0 GB free"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is built without it" in named(examine(tmp_path / "none"))["CUDA"].says


def test_weights_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    bert_folder(tmp_path / "models--google-bert--bert-base-uncased" / "snapshots" / "abc")
    (tmp_path / "models--org--without" / "snapshots" / "abc").mkdir(parents=True)
    found = named(examine(tmp_path / "none"))
    assert found["in it"].says == "google-bert/bert-base-uncased"
    assert "bert" in found["run offline"].says.split()
    assert "roberta" not in found["run offline"].says.split()


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
    assert all("".join(row["says"].split()) in said for row in rows if row["name"] != "memory"
               and len(row["says"]) < 40)  # fmt: skip
