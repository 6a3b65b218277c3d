from pathlib import Path

import pytest

from features.errors import UserError
from trainer.config import TrainConfig, build
from trainer.mmsrec import MMSRecConfig
from trainer.sasrec import SASRecConfig


def test_the_last_word_wins(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('lr = 1\n[model]\ndim = 16\n[run]\nmodel = "sasrec"\n')
    train, model = build(SASRecConfig, file, ["dim=32", "monitor=NDCG@10"])
    assert train == TrainConfig(lr=1.0, monitor="NDCG@10")
    assert model == SASRecConfig(dim=32)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("dimm=3", "unknown setting 'dimm'; known: .*dim"),
        ("dim", "must look like key=value"),
        ("dim=3.5", "dim='3.5' must be a whole number"),
        ("lr=fast", "lr='fast' must be a number"),
        ("dim=0", "dim=0 must be above 0"),
        ("heads=3", "dim=512 is not a multiple of heads=3"),
        ("dropout=1", r"dropout=1.0 must be in \[0, 1\)"),
        ("missing=guess", "missing='guess' is not known; known: drop, mask"),
        ("length=1", "length=1 must be at least 2"),
        ("monitor_seen=both", "known: masked, unmasked"),
        ("seed=-1", "seed=-1 must not be below 0"),
    ],
)
def test_bad_settings_are_one_line(setting: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build(MMSRecConfig, None, [setting])
    assert "\n" not in str(caught.value)


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read"):
        build(SASRecConfig, tmp_path / "none.toml", [])
    (tmp_path / "bad.toml").write_text("dim =")
    with pytest.raises(UserError, match="is not TOML"):
        build(SASRecConfig, tmp_path / "bad.toml", [])
    (tmp_path / "kind.toml").write_text('dim = "64"')
    with pytest.raises(UserError, match="dim='64' must be a whole number"):
        build(SASRecConfig, tmp_path / "kind.toml", [])
