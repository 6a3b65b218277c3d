"""Commands on files that the user may not read: one line with the path and the remedy."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from features.warehouse import Warehouse
from tests.cli.invoke import run
from tests.marks import heavy_after
from tests.trainer import worlds

SETTINGS = ("dim=4", "hidden=4", "heads=1", "length=4", "epochs=1", "device=cpu")
PAIRS = [word for pair in SETTINGS for word in ("--set", pair)]
_DROP_CAPABILITY = 24  # PR_CAPBSET_DROP
_READ_EVERYTHING = (1, 2)  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
C_LIBRARY = ctypes.CDLL(None)


def lose_superpowers() -> None:
    """Let a program that is started next obey the permissions of files, also as root."""
    for capability in _READ_EVERYTHING:
        C_LIBRARY.prctl(_DROP_CAPABILITY, capability, 0, 0, 0)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A warehouse with one run."""
    folder = tmp_path_factory.mktemp("permissions")
    warehouse = Warehouse(folder / "warehouse")
    warehouse.create()
    worlds.prepare(warehouse, [[0, 1, 2, 3], [4, 5, 6, 0], [7, 8, 9, 10, 11, 0, 1]], 12)
    option = ("--warehouse", str(warehouse.root))
    run("train", "--dataset", "world", "--model", "sasrec", "--name", "a", *PAIRS, *option)
    raw = folder / "raw"
    raw.mkdir()
    (raw / "interactions.csv").write_text("user_id,item_id\nu,a\nu,b\nu,c\n")
    (raw / "items.csv").write_text("item_id,title\na,x\nb,y\nc,z\n")
    return folder


@pytest.mark.parametrize(
    ("name", "command", "code"),
    heavy_after(
        2,
        [
            ("warehouse/world/items/part-00000.parquet", "train --dataset world --model sasrec", 2),
            (
                "warehouse/world/items/part-00000.parquet",
                "extract --dataset world --text hashed",
                2,
            ),
            ("warehouse/world/dataset.json", "train --dataset world --model sasrec", 2),
            ("warehouse/world/interactions/part-00000.parquet", "eval --run a", 2),
            ("warehouse/runs/a/config.toml", "eval --run a", 2),
            ("warehouse/runs/a/model.safetensors", "recommend --run a --user u1", 2),
            ("warehouse/world/items/part-00000.parquet", "sql FROM(items)", 1),
            ("warehouse/runs/a/metrics.parquet", "sql FROM'{root}/runs/a/metrics.parquet'", 2),
            ("raw/items.csv", "prepare --dataset mine --format table --raw {root}/../raw", 2),
            (
                "raw/interactions.csv",
                "prepare --dataset mine --format table --raw {root}/../raw",
                2,
            ),
        ],
    ),
)
def test_a_file_that_may_not_be_read_is_named(
    root: Path, name: str, command: str, code: int
) -> None:
    path, warehouse = root / name, root / "warehouse"
    words = [*command.format(root=warehouse).split(), "--warehouse", str(warehouse)]
    path.chmod(0)
    try:
        result = subprocess.run(
            [sys.executable, "-m", "cli.app", *words],
            capture_output=True,
            text=True,
            check=False,
            preexec_fn=lose_superpowers,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
    finally:
        path.chmod(0o644)
    assert result.returncode == code, result.stderr
    lines = [line for line in result.stderr.splitlines() if "ermission" in line]
    assert lines, result.stderr
    assert all(path.name in line and "chmod" in line for line in lines), result.stderr
    assert "Traceback" not in result.stderr
    assert "damaged" not in result.stderr
    assert "train again" not in result.stderr
