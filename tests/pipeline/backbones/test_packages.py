"""A separate installed package adds backbones by entry points."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from features.store import FeatureStore
from features.warehouse import Warehouse
from tests.pipeline.backbones.tiny import picture, prepare

ROOT = Path(__file__).parents[3]
MODULE = '''
import numpy as np

from pipeline.backbones.base import Backbone


class Brightness(Backbone):
    """The mean of each colour, or of the code points of a text: the four members alone."""

    name = "brightness"
    modalities = ("image", "text", "video")
    dim = 3

    def embed(self, batch):
        inputs = batch.images or batch.texts
        return np.stack([np.full(3, np.mean(one)) for one in inputs]).astype(np.float32)


class Lame(Backbone):
    name, modalities, dim = "lame", ("text",), 2


class Failing(Brightness):
    def __init__(self, *args, **kwargs):
        raise RuntimeError("no\\nlicence key")
'''
ENTRY_POINTS = """
[mmrec.backbones]
brightness = light:Brightness
failing = light:Failing
lame = light:Lame
bert = light:Brightness
gone = light:Gone
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """Make a folder on the path with an installed package, as pip would leave it."""
    folder = tmp_path / "site"
    metadata = folder / "light_meter-0.3.dist-info"
    metadata.mkdir(parents=True)
    (folder / "light.py").write_text(MODULE)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: light-meter\nVersion: 0.3\n")
    (metadata / "entry_points.txt").write_text(ENTRY_POINTS)
    return folder


def mmrec(package: Path, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "cli.app", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(package)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    return done


@pytest.mark.slow
def test_its_backbone_extracts_with_four_members(
    package: Path, warehouse: Warehouse, tmp_path: Path
) -> None:
    images = [picture(tmp_path / "raw" / f"{i}.png", i).name for i in range(3)]
    info = prepare(
        warehouse, tmp_path / "raw", ids=["a", "b", "c"], image=images, text=["x", "yy", "zzz"]
    )
    command = ("extract", "--dataset", "tiny", "--warehouse", str(warehouse.root))
    mmrec(package, *command, "--image", "brightness", "--text", "brightness")
    for modality in ("image", "text"):
        table = FeatureStore(warehouse).table("tiny", "brightness", modality)
        matrix = table.read(info.items, info.fingerprint, info.inputs[modality])
        assert matrix.vectors.shape == (3, 3)
        assert len({float(row[0]) for row in matrix.vectors}) == 3
    for wrong, words in {
        "lame": ("does not define embed", "light-meter 0.3"),
        "failing": ("no licence key", "light-meter 0.3"),
        "brightness@cls": ("leave out the @",),
        "gone": ("Gone", "light-meter 0.3"),
    }.items():
        refused = mmrec(package, *command, "--text", wrong, code=2).stderr
        assert len(refused.splitlines()) == 1
        assert all(word in refused for word in (wrong, *words)), refused


@pytest.mark.slow
def test_it_is_listed_with_its_origin_and_broken_ones_are_named(package: Path) -> None:
    done = mmrec(package, "backbones")
    assert "brightness [light-meter 0.3]" in done.stdout
    assert "[mmrec" not in done.stdout
    lines = done.stderr.splitlines()
    for name, reason in {"bert": "mmrec", "lame": "embed", "gone": "Gone"}.items():
        (line,) = [line for line in lines if line.startswith(f"backbone {name} ")]
        assert reason in line
    rows = {row["name"]: row for row in json.loads(mmrec(package, "backbones", "--json").stdout)}
    assert rows["brightness"]["origin"] == "light-meter 0.3"
    assert (rows["brightness"]["dim"], rows["brightness"]["library"]) == (3, "light")
    assert rows["bert"]["origin"] == "mmrec"
