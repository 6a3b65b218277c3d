"""Descriptions of the recommenders: the settings, their defaults and meanings."""

from dataclasses import dataclass, fields

import pytest

from features.errors import UserError
from trainer.config import TrainConfig
from trainer.models.registry import MODELS, Model
from trainer.models.sasrec import SASRec, SASRecConfig
from trainer.runs.describe import describe_model, list_models


@dataclass(frozen=True, kw_only=True)
class DeeperConfig(SASRecConfig):
    """A configuration that adds a setting and changes a default."""

    layers: int = 7
    """Blocks of a deeper
    ``transformer``."""
    extra: bool = True
    """Add another block."""


class Deeper(SASRec):
    """SASRec with other settings."""

    settings_class = DeeperConfig


def test_every_model_is_listed_and_described() -> None:
    assert [entry.model for entry in list_models()] == list(MODELS)
    for name, entry in MODELS.items():
        description = describe_model(name)
        recommender = entry.load()
        assert [setting.name for setting in description.settings] == [
            field.name
            for field in fields(recommender.settings_class)
            if field.name not in recommender.unread
        ]
        defaults = {setting.name: setting.default for setting in description.training}
        assert defaults == {field.name: field.default for field in fields(TrainConfig)} | dict(
            recommender.train_defaults
        )
        assert description.transfers == ["full", *recommender.transfer_groups]
        assert bool(description.pretraining) == (recommender.pretraining is not None)


def test_a_derived_configuration_keeps_the_meanings_of_its_base(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(MODELS, "deeper", Model(f"{__name__}:Deeper", "more layers"))
    settings = {setting.name: setting for setting in describe_model("deeper").settings}
    assert settings["layers"].default == 7
    assert settings["layers"].meaning == "Blocks of a deeper transformer."
    assert settings["extra"].meaning == "Add another block."
    base = {setting.name: setting for setting in describe_model("sasrec").settings}
    assert settings["dim"] == base["dim"]
    assert base["dim"].meaning


def test_an_unknown_model_is_refused() -> None:
    with pytest.raises(UserError, match=r"'nope'.*sasrec"):
        describe_model("nope")
