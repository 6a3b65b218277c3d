import itertools
import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from features.errors import UserError
from trainer.config import TrainConfig
from trainer.models.mmsrec import MMSRecConfig
from trainer.models.registry import MODELS
from trainer.models.sasrec import SASRecConfig
from trainer.setting_sources import SettingSources, build_settings
from trainer.tasks.registry import TASKS


def build(settings_class: type[Any], file: Path | None, pairs: Sequence[str]) -> tuple[Any, ...]:
    sources = SettingSources(file=file, pairs=pairs)
    return build_settings([TrainConfig, settings_class], sources, {})


def test_the_last_word_wins(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('lr = 1\n[model]\ndim = 16\n[run]\nmodel = "sasrec"\n')
    train, model = build(SASRecConfig, file, ["dim=32", "monitor=NDCG@10"])
    assert train == TrainConfig(lr=1.0, monitor="NDCG@10")
    assert model == SASRecConfig(dim=32)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("tower=gru", r"'tower'.*sequence_encoder"),
        ("cosine=true", r"'cosine'.*score=cosine"),
        ("dimm=3", "'dimm'.*known: .*dim"),
        ("dim", "'dim'.*NAME=VALUE"),
        ("dim=3.5", "dim='3.5' .*whole number"),
        ("lr=fast", "lr='fast' .*number"),
        ("dim=0", "dim=0 .*above 0"),
        ("heads=3", "dim=512 .*heads=3"),
        ("dropout=1", r"dropout=1.0 .*in \[0, 1\)"),
        ("missing=guess", "'guess'.*drop, mask"),
        ("length=0", "length=0 .*above 0"),
        ("monitor_seen=both", "known: filtered, kept"),
        ("seed=-1", "seed=-1 .*at least 0"),
        ("seed=99999999999999999999", "seed=99999999999999999999 .*at least 0 and below 2"),
        ("epochs=99999999999", "epochs=99999999999 .*above 0 and below 2"),
        ("lr=nan", "lr=nan .*above 0"),
        ("lr=inf", "lr=inf .*above 0"),
        ("lr=1e30", r"lr=1e\+30 .*above 0"),
        ("lr=2", "lr=2.0 .*at most 1"),
        ("clip=nan", "clip=nan .*at least 0"),
        ("weight_decay=nan", "weight_decay=nan .*at least 0"),
        ("weight_decay=1001", "weight_decay=1001.0 times lr=0.001 must be at most 1"),
        ("temperature=nan", "temperature=nan .*at least"),
        ("temperature=1e-30", "temperature=1e-30 .*at least 0.0001"),
        ("dropout=nan", r"dropout=nan .*in \[0, 1\)"),
        ("stride=-1", "stride=-1 .*at least 0"),
        (
            "schedule=steps",
            "'steps'.*constant, cosine, linear, exponential",
        ),
        ("monitor=Recall@3", "'Recall@3'.*HR@5"),
        ("device=meta", "'meta'.*auto, cpu, cuda"),
    ],
)
def test_bad_settings_are_one_line(setting: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build(MMSRecConfig, None, [setting])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", list(MODELS))
def test_no_temperature_is_too_low_for_float32(name: str) -> None:
    config = MODELS[name].load().settings_class
    if "temperature" not in {field.name for field in fields(config)}:
        pytest.skip("it has no temperature")
    with pytest.raises(UserError, match=r"temperature=1e-40 .*at least 0\.0001"):
        build(config, None, ["temperature=1e-40"])


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read"):
        build(SASRecConfig, tmp_path / "none.toml", [])
    (tmp_path / "bad.toml").write_text("dim =")
    with pytest.raises(UserError, match="is not TOML"):
        build(SASRecConfig, tmp_path / "bad.toml", [])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('dim = "64"', "dim='64' .*whole number"),
        ("lr = 1e30", r"lr=1e\+30 .*above 0"),
        ("lr = 1" + "0" * 400, "lr=inf .*above 0"),
        ("dropout = nan", "dropout=nan .*in"),
        ("train = 3", "unknown setting 'train'"),
    ],
)
def test_a_bad_value_in_a_file_names_the_file(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "kind.toml"
    file.write_text(text)
    with pytest.raises(UserError, match=f"kind.toml: {message}"):
        build(SASRecConfig, file, [])
    with pytest.raises(UserError, match=r"kind\.toml with --set: "):
        build(SASRecConfig, file, ["layers=1"])


def test_recall_is_the_hit_rate_of_the_tables() -> None:
    assert TrainConfig(monitor="Recall@10").metric == "HR@10"
    assert TrainConfig(monitor="NDCG@5").metric == "NDCG@5"


def test_a_setting_in_two_tables_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "twice.toml"
    path.write_text("[model]\ndim = 8\n[train]\ndim = 16\n")
    with pytest.raises(UserError, match=r"twice\.toml .*dim twice"):
        build(SASRecConfig, path, [])


@pytest.mark.parametrize("name", list(MODELS))
def test_every_variant_that_is_named_can_be_asked_for(name: str) -> None:
    entry = MODELS[name]
    recommender = entry.load()
    classes: list[type[Any]] = [TrainConfig, recommender.settings_class]
    if recommender.pretraining is not None:
        task = TASKS.find(recommender.pretraining.task).settings_class
        classes += [task] if task is not None else []
    asked = 0
    for what, option in recommender.variants.items():
        pairs = [word.partition("=") for word in re.findall(r"--set ([^\s,]+)", option)]
        for values in itertools.product(*(pair[2].split("|") for pair in pairs)):
            given = [f"{pair[0]}={value}" for pair, value in zip(pairs, values, strict=True)]
            build_settings(classes, SettingSources(pairs=given), {})
            asked += len(given)
        assert re.search(r"--set|--preset|--features|--init|mmrec (train|prepare)", option), what
    assert asked or not recommender.variants
