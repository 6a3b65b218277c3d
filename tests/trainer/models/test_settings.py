"""Every setting of the sequence encoder has an effect, or the model lists it as not read."""

from dataclasses import fields
from typing import Any

import pytest
import torch

from features.errors import UserError
from tests.trainer import worlds
from trainer.models.registry import MODELS
from trainer.runs.settings import resolve_settings
from trainer.setting_sources import SettingSources

N = 12
OTHER: dict[str, Any] = {
    "heads": 1,
    "hidden": 24,
    "layers": 3,
    "activation": "relu",
    "final_norm": False,
    "attention_bias": False,
    "norm_eps": 1e-2,
    "inner_dropout": False,
}


def pairs() -> list[tuple[str, str]]:
    return [
        (model, setting)
        for model, entry in MODELS.items()
        for setting in OTHER
        if setting in {field.name for field in fields(entry.load().settings_class)}
    ]


def outcome(model: str, **settings: Any) -> list[torch.Tensor]:
    """The weights and the loss of a training step."""
    features = worlds.features(N)
    built = worlds.build(model, features, **{"dropout": 0.5, "layers": 2, **settings}).train()
    rows = worlds.sequences([[0, 1, 2, 3, 4, 11], [5, 6], [7, 8, 9, 10]])
    torch.manual_seed(1)
    batch = worlds.batch(rows, features, torch.Generator().manual_seed(2))
    return [*built.state_dict().values(), built.loss(batch)["loss"].detach()]


@pytest.mark.parametrize(("model", "setting"), pairs())
def test_a_setting_has_an_effect_or_is_not_read(model: str, setting: str) -> None:
    default, other = outcome(model), outcome(model, **{setting: OTHER[setting]})
    is_equal = len(default) == len(other) and all(map(torch.equal, default, other))
    assert is_equal == (setting in MODELS.find(model).load().unread)


def test_a_setting_that_is_not_read_cannot_be_given() -> None:
    recommender = MODELS.find("gru4rec").load()
    with pytest.raises(UserError, match="heads"):
        resolve_settings(recommender, False, SettingSources(pairs=["heads=4"]))
    resolve_settings(recommender, False, SettingSources(pairs=["hidden=32"]))
