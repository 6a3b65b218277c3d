"""Every setting of the sequence encoder has an effect, or the model lists it as not read."""

from dataclasses import fields
from typing import Any

import pytest
import torch

from features.errors import UserError
from tests.trainer import worlds
from trainer.losses.registry import LOSSES, unread_settings
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

ROWS = [[0, 1, 2, 3, 4, 11], [5, 6], [7, 8, 9, 10]]
"""Each item occurs once."""
SKEWED = [[0, 1, 0, 2, 0], [0, 1], [3, 0, 2]]
"""Some items occur more often than others, and others never."""
OTHER_OF_LOSSES: dict[str, Any] = {
    "candidates": 10,
    "negatives": 4,
    "negatives_power": 1.0,
    "debias": False,
    "debias_target": False,
    "score_penalty": 0.5,
}


def pairs() -> list[tuple[str, str]]:
    return [
        (model, setting)
        for model, entry in MODELS.items()
        for setting in OTHER
        if setting in {field.name for field in fields(entry.load().settings_class)}
    ]


def outcome(model: str, histories: list[list[int]] = ROWS, **settings: Any) -> list[torch.Tensor]:
    """The weights and the loss of a training step."""
    features = worlds.features(N)
    built = worlds.build(model, features, **{"dropout": 0.5, "layers": 2, **settings}).train()
    rows = worlds.sequences(histories)
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


@pytest.mark.parametrize(
    ("settings", "unread"),
    [
        ({"loss": "softmax", "negatives": 9}, ["negatives"]),
        ({"loss": "in-batch", "negatives": 9, "debias_target": False}, []),
        ({"loss": "bce", "candidates": 9, "debias": False}, ["candidates", "debias"]),
        ({"loss": "bpr-max", "negatives": 9, "score_penalty": 0.5}, []),
        ({"loss": "bpr", "score_penalty": 0.5}, ["score_penalty"]),
        ({"loss": "bce"}, []),
        ({"loss": "bce", "candidates": 0}, []),
    ],
)
def test_settings_that_the_loss_ignores_are_named(
    settings: dict[str, Any], unread: list[str]
) -> None:
    of_sasrec = MODELS.find("sasrec").load().settings_class
    assert unread_settings(of_sasrec(**settings)) == unread


@pytest.mark.parametrize("loss", list(LOSSES))
@pytest.mark.parametrize(("name", "value"), OTHER_OF_LOSSES.items())
def test_a_setting_of_losses_has_an_effect_or_is_named(loss: str, name: str, value: Any) -> None:
    given = {"loss": loss, "negatives": 5, "score": "cosine", "temperature": 0.1}
    default = outcome("sasrec", SKEWED, **given)
    other = outcome("sasrec", SKEWED, **{**given, name: value})
    settings = MODELS.find("sasrec").load().settings_class(**{"loss": loss, name: value})
    assert torch.equal(default[-1], other[-1]) == (name in unread_settings(settings))
