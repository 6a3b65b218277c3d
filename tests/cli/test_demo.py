"""``mmrec demo``, with few users and one epoch."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli import demo
from cli.app import app
from pipeline.backbones import listing
from pipeline.backbones.listing import is_offline
from pipeline.backbones.registry import BACKBONES
from pipeline.datasets.demo import make_demo


@pytest.mark.slow
def test_the_demo_uses_the_offline_backbones_if_they_are_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = tmp_path / "warehouse" / "raw" / "demo"
    raw.parent.mkdir(parents=True)
    make_demo(raw, users=120, items=192)
    monkeypatch.setattr(demo, "_TRAININGS", {"mmsrec": ["epochs=1", "dim=16", "heads=2"]})

    def features() -> list[str]:
        command = ["demo", "--json", "--warehouse", str(tmp_path / "warehouse")]
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
        tables: list[str] = json.loads(result.stdout)["evaluations"]["mmsrec"]["features"]
        return tables

    with monkeypatch.context() as patch:
        patch.setattr(listing, "is_offline", lambda entry: False)
        assert features() == ["image=hashed", "text=hashed"]
    for name in ("efficientnet-lite0", "all-minilm-l6-v2"):
        if not is_offline(BACKBONES[name]):
            pytest.skip(f"the weights of {name} are not installed")
    # The tables of the first time are still in the warehouse.
    assert features() == ["image=efficientnet-lite0", "text=all-minilm-l6-v2"]
