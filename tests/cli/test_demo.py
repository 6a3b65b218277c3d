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


@pytest.mark.heavy
@pytest.mark.slow
def test_the_demo_uses_the_offline_backbones_if_they_are_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = tmp_path / "warehouse" / "raw" / "demo"
    raw.parent.mkdir(parents=True)
    make_demo(raw, users=120, items=192)
    small = ["epochs=1", "dim=16", "heads=2"]
    monkeypatch.setattr(demo, "_TRAININGS", {"sasrec": small, "mmsrec": small})
    command = ["demo", "--warehouse", str(tmp_path / "warehouse")]

    with monkeypatch.context() as patch:
        patch.setattr(listing, "is_offline", lambda entry: False)
        result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "synthetic" in result.stderr
    lines = result.stdout.splitlines()
    table = [line.split(" ")[0] for line in lines[lines.index(_title(lines)) :]]
    assert [name for name in ("a", "popularity:", "sasrec:", "mmsrec:") if name in table]
    assert sum("HR@10" in line for line in lines) == 1  # one table
    assert "hashed has random weights" in result.stdout
    gallery = Path(lines[-1])
    assert gallery.name == "gallery.html"
    assert "mmsrec" in gallery.read_text()

    for name in ("efficientnet-lite0", "all-minilm-l6-v2"):
        if not is_offline(BACKBONES[name]):
            pytest.skip(f"the weights of {name} are not installed")
    # The tables of the first time are still in the warehouse.
    result = CliRunner().invoke(app, [*command, "--json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    features = document["evaluations"]["mmsrec"]["features"]
    assert features == ["image=efficientnet-lite0", "text=all-minilm-l6-v2"]
    assert Path(document["gallery"]).exists()


def _title(lines: list[str]) -> str:
    return next(line for line in lines if line.startswith("synthetic demo"))


def test_the_readme_has_the_commands_of_the_demo() -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    text = text.replace("\\\n    ", "")
    for command in demo.commands(dict.fromkeys(("image", "text", "video"), "hashed")):
        assert f"\n{command}\n" in text
