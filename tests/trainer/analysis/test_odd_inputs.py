"""Labels, output paths and files that a report and a comparison cannot use are one line."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from features.atomic_files import read_errors, write_text
from features.documents import read_json
from features.errors import UserError
from features.warehouse import Warehouse
from tests.trainer.analysis import test_compare
from tests.trainer.analysis.test_curves import EPOCHS, write_run
from trainer.analysis.compare import compare
from trainer.analysis.curves import read_curves
from trainer.analysis.report import build_report
from trainer.checkpoint import read_tensors
from trainer.runs.read import read_records
from trainer.setting_sources import SettingSources

evaluated = test_compare.evaluated


@pytest.mark.slow
@pytest.mark.parametrize("label", ["$$", r"$\frac{$", r"\alpha_$x", "<b>&", "_hidden"])
def test_a_label_is_printed_as_it_is(label: str, warehouse: Warehouse) -> None:
    write_run(warehouse, "a", EPOCHS)
    records = read_records(warehouse, ["a"])
    page = build_report(warehouse, records, read_curves(records, labels=[label]))
    assert "<svg" in page


@pytest.mark.parametrize("label", ["\udcff", "run \udcfe\udcff"])
def test_a_label_that_is_no_utf_8_is_refused(label: str, warehouse: Warehouse) -> None:
    write_run(warehouse, "a", EPOCHS)
    with pytest.raises(UserError, match="UTF-8"):
        read_curves(read_records(warehouse, ["a"]), labels=[label])


@pytest.mark.parametrize("name", ["/", ".", "..", ""])
def test_a_folder_is_no_output_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="is a folder"):
        write_text(Path(name), "text")
    assert not list(tmp_path.iterdir())


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _without_item(path: Path) -> None:
    pq.write_table(pq.read_table(path).drop_columns(["item"]), path)


@pytest.mark.parametrize("damage", [_cut, _empty, _without_item])
def test_damaged_predictions_are_one_line(damage: Any, evaluated: Warehouse) -> None:
    names = evaluated.runs()
    damage(evaluated.runs_dir / names[0] / "predictions.parquet")
    with pytest.raises(UserError, match=rf"{names[0]}.*mmrec eval"):
        compare(evaluated, names[:2])


NESTED = "[" * 100_000 + "]" * 100_000


def test_a_nested_header_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"x": torch.zeros(1)}, path, metadata={"mmrec": NESTED})
    with pytest.raises(UserError, match="damaged"):
        read_tensors(path, "train again")


def test_a_nested_json_file_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "dataset.json"
    path.write_text(NESTED)
    with pytest.raises(UserError, match="damaged"):
        read_json(path, "prepare again")


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"\x93NUMPY\x01\x00v\x00{'descr'"])
def test_an_array_file_that_is_cut_is_one_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tokens-1.npy"
    path.write_bytes(content)
    with pytest.raises(UserError, match="remove it"), read_errors(path, "remove it"):
        np.load(path, mmap_mode="r")


@pytest.mark.parametrize("pair", ["=3", " =3", "=", "dim"])
def test_a_setting_without_a_name_or_a_value_is_refused(pair: str) -> None:
    with pytest.raises(UserError, match=r"NAME=VALUE"):
        SettingSources(pairs=[pair]).parsed_pairs()
