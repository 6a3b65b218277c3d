"""An exported run: onnxruntime equals torch, and its lists are those of the run."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
import torch

from features.errors import UserError
from features.warehouse import Warehouse
from tests.marks import heavy_after
from tests.trainer import worlds
from tests.trainer.runs.test_later import LATER, begin, histories, prepare
from trainer.data.batches import Sequences
from trainer.runs.export import export_run
from trainer.runs.exported import ExportedRun
from trainer.runs.later import open_current
from trainer.runs.recommend import Predictor
from trainer.runs.run import Run

pytest.importorskip("onnxruntime", reason="the extra export is not installed")
pytest.importorskip("onnxscript", reason="the extra export is not installed")

LONGEST = worlds.SMALL["length"]
OF_IDS = {"sasrec"}


def encode(path: Path, feed: dict[str, Any]) -> list[npt.NDArray[np.float32]]:
    """Return the outputs of an ONNX file."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    outputs: list[npt.NDArray[np.float32]] = session.run(None, feed)
    return outputs


def other_items(run: Run, size: int, folder: Path) -> list[npt.NDArray[np.float32]]:
    """Return vectors and inputs of a catalogue of another size than the exported one."""
    if run.spec.model in OF_IDS:
        return encode(folder / "item_encoder.onnx", {"item": np.arange(size)})
    features = worlds.features(size, seed=1)
    feed = {name: x.numpy() for name, x in features.vectors.items()}
    feed |= {f"{name}_present": x.numpy() for name, x in features.present.items()}
    return encode(folder / "item_encoder.onnx", feed)


def check_graphs(run: Run, folder: Path) -> None:
    """Compare both ONNX files with torch for catalogues, batches and histories of many sizes."""
    size = 7 if run.spec.model in OF_IDS else 40
    features = run.data.features if size == 7 else worlds.features(size, seed=1)
    outputs = other_items(run, size, folder)
    with torch.no_grad():
        items_ND = run.model.encode_items(features).detach()
    assert outputs[0] == pytest.approx(items_ND[:size].numpy(), abs=1e-4)
    generator = torch.Generator().manual_seed(0)
    for batch in (1, 64):
        for length in (1, 5, LONGEST):
            items_BL = torch.randint(size, (batch, length), generator=generator)
            lengths_B = torch.randint(1, length + 1, (batch,), generator=generator)
            lengths_B[-1] = length
            with torch.no_grad():
                sequences = Sequences(items_BL=items_BL, lengths_B=lengths_B)
                query_BD = run.model.encode_sequences(items_ND, sequences, features)
            feed = {"inputs": outputs[-1][items_BL.numpy()], "lengths": lengths_B.numpy()}
            (exported_BD,) = encode(folder / "sequence_encoder.onnx", feed)
            assert exported_BD == pytest.approx(query_BD.numpy(), abs=1e-4)


def check_lists(predictor: Predictor, exported: ExportedRun) -> None:
    """Compare the lists of every user."""
    assert exported.item_ids.to_pylist() == predictor.item_ids[: len(exported.item_ids)].to_pylist()
    for user in range(predictor.dataset.info.users):
        history = predictor.history(user)
        scores, items = predictor.for_history(history, 5)
        exported_scores, rows = exported.for_history(history, 5)
        assert rows.tolist() == items.tolist()
        assert exported_scores == pytest.approx(scores, abs=1e-4)


def run_program(folder: Path, history: list[str]) -> list[list[str]]:
    """Run the program of the export's README, and return its lines as words."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(code.splitlines()) <= 30
    imported = set(re.findall(r"^(?:import|from) (\w+)", code, re.MULTILINE))
    assert imported == {"json", "sys", "pathlib", "faiss", "numpy", "onnxruntime"}
    command = [sys.executable, "-c", code, str(folder), ",".join(history)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [line.split() for line in printed.splitlines()]


@pytest.mark.parametrize("model", heavy_after(2, ["mmsrec", "sasrec", "mmsr", "pmmrec", "unisrec"]))
def test_the_files_equal_the_run(warehouse: Warehouse, tmp_path: Path, model: str) -> None:
    """The run is opened on a later catalogue, without i3 and with two new items."""
    folder = begin(warehouse, model)
    prepare(warehouse, LATER, histories())
    run = open_current(warehouse, folder, device="cpu")
    report = export_run(warehouse, run, tmp_path / "out")
    assert report.difference < 1e-4
    check_graphs(run, tmp_path / "out")
    predictor = Predictor(warehouse, run, index="torch")
    check_lists(predictor, ExportedRun(tmp_path / "out", index="faiss"))
    table = pq.read_table(tmp_path / "out" / "items.parquet")
    listed = table.column("item_id").filter(table.column("listed")).to_pylist()
    assert sorted(listed) == sorted(
        name for name in LATER if model != "sasrec" or name[:3] != "new"
    )
    lines = run_program(tmp_path / "out", ["i4", "unknown", "i3", "i5"])
    items = [predictor.item(name) for name in ("i4", "i3", "i5")]
    best = predictor.named(predictor.for_history(items, 10))
    assert [words[1] for words in lines] == [entry.item_id for entry in best]
    scores = [float(words[2]) for words in lines]
    assert scores == pytest.approx([entry.score for entry in best], abs=1e-4)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["versions"]["onnx"]
    assert manifest["opset"] == report.opset
    assert manifest["history"]["length"] == LONGEST


@pytest.mark.parametrize("model", ["carca", "popularity", "transitions", "ease", "bert4rec"])
def test_a_model_without_graphs_is_refused(
    warehouse: Warehouse, tmp_path: Path, model: str
) -> None:
    run = open_current(warehouse, begin(warehouse, model), device="cpu")
    with pytest.raises(UserError, match=f"{model}.*mmrec recommend"):
        export_run(warehouse, run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_of_others_are_kept(warehouse: Warehouse, tmp_path: Path) -> None:
    run = open_current(warehouse, begin(warehouse, "sasrec"), device="cpu")
    for name in ("README.md", "manifest.json", "items.parquet"):
        file = tmp_path / name[0] / name
        file.parent.mkdir(parents=True)
        file.write_bytes(b"my own \xff")
        with pytest.raises(UserError, match=f"{name}.*new folder"):
            export_run(warehouse, run, tmp_path / name[0])
        assert file.read_bytes() == b"my own \xff"
        assert len(list((tmp_path / name[0]).iterdir())) == 1
    with pytest.raises(UserError, match=r"README\.md is a file.*new folder"):
        export_run(warehouse, run, tmp_path / "R" / "README.md")
