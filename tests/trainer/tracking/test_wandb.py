"""The offline folder of W&B, read back."""

import json
import struct
import time
from collections import defaultdict
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from features.warehouse import Warehouse
from tests.trainer.tracking.tracked import stored, train

pytest.importorskip("wandb", reason="the extra wandb is not installed")
RECORDS = "wandb.proto.wandb_internal_pb2"
pytestmark = pytest.mark.slow


def split_records(log: bytes) -> Iterator[bytes]:
    """Yield the records of a file in the log format of LevelDB, after a header of 7 bytes.

    A chunk has a header of checksum (4), length (2) and type (1: whole, 2: first, 3: middle, 4:
    last), and does not cross the end of a block of 32 KiB.
    """
    assert log.startswith(b":W&B")
    place, parts, block = 7, b"", 32 * 1024
    while place + 7 <= len(log):
        if block - place % block < 7:
            place += block - place % block
            continue
        length, kind = struct.unpack_from("<HB", log, place + 4)
        parts += log[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield parts
            parts = b""


def is_whole(file: Path) -> bool:
    """Return True if the file has the record that ends a run."""
    Record = import_module(RECORDS).Record
    return any(
        Record.FromString(data).HasField("exit") for data in split_records(file.read_bytes())
    )


def read_records(file: Path) -> tuple[dict[str, Any], dict[str, list[float]], dict[str, Any]]:
    """Return the configuration, the values of each name by step, and the summary."""
    Record = import_module(RECORDS).Record
    config: dict[str, Any] = {}
    history: dict[str, list[float]] = defaultdict(list)
    summary: dict[str, Any] = {}
    for data in split_records(file.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        for update in record.run.config.update:
            config[update.key] = json.loads(update.value_json)
        for item in record.history.item:
            name = item.key or item.nested_key[0]
            history[name].append(json.loads(item.value_json))
        for item in record.summary.update:
            summary[item.key or item.nested_key[0]] = json.loads(item.value_json)
    return config, history, summary


@pytest.mark.filterwarnings("ignore")
def test_the_offline_folder_holds_losses_rates_metrics_settings_and_the_final_table(
    warehouse: Warehouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    run, report, lines = train(warehouse, ["wandb"])
    assert len(lines) == 1, lines
    assert "wandb sync" in lines[0]
    (file,) = (run.folder / "wandb").glob("offline-run-*/*.wandb")
    deadline = time.monotonic() + 60  # a process of W&B writes the end of the file
    while not is_whole(file) and time.monotonic() < deadline:
        time.sleep(0.1)
    config, history, summary = read_records(file)
    assert (config["model"], config["dataset"], config["dim"]) == ("sasrec", "world", 8)
    for name, values in {
        "train/loss": stored(run, "train", "loss", "none"),
        "validation/filtered/HR@10": stored(run, "validation", "HR@10", "filtered"),
        "rate/lr": [1e-3 * steps / 100 for steps in (3, 6, 9)],
    }.items():
        assert history[name] == pytest.approx(values), name
    assert summary["best/epoch"] == report.best_epoch
    (table,) = (run.folder / "wandb").glob("offline-run-*/files/media/table/final*.json")
    rows = dict(json.loads(table.read_text())["data"])
    assert rows["best/filtered/HR@10"] == pytest.approx(report.best)
