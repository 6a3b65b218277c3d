"""Presets: the sizes of the released code, and settings that the model knows."""

import re
from typing import Any

import pytest
import torch

from features.errors import UserError
from trainer.config import TrainConfig
from trainer.models.base import Catalogue, Recommender
from trainer.models.registry import MODELS
from trainer.runs.settings import preset_settings, pretraining_settings
from trainer.setting_sources import SettingSources, build_settings
from trainer.tasks.registry import TASKS

WIDTHS = {"image": 768, "text": 768}
RELEASED = 22_457_088
"""Parameters with two modalities, merge-attention and SASRec."""
TOKEN_TYPES = 2 * 768


def published(model: str, preset: str = "published", *pairs: str) -> Recommender:
    """Build a preset on the device ``meta``."""
    recommender = MODELS.find(model).load()
    _, settings = build_settings(
        [TrainConfig, recommender.settings_class],
        SettingSources(pairs=pairs),
        {**recommender.train_defaults, **recommender.presets[preset]},
    )
    widths = WIDTHS if recommender.needs_features else {}
    with torch.device("meta"):
        return recommender(settings, Catalogue(n_items=100, n_users=1, widths=widths))


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("model", ["mmsr", "pmmrec"])
def test_the_released_form_has_the_parameters_of_the_released_code(model: str) -> None:
    built = published(model, "released")
    assert count(built) == RELEASED
    names = [name for name, _ in built.named_parameters()]
    assert not [name for name in names if re.search(r"sequence.*(qkv|out)\.bias", name)]
    assert "sequence_encoder.transformer.norm.weight" not in names
    assert "item_encoder.fusion.types" not in names


@pytest.mark.parametrize(
    ("model", "preset"),
    [
        ("mmsr", "published"),
        ("mmsr", "published-coarse"),
        ("mmsr", "published-co-attention"),
        ("mmsr", "released"),
        ("pmmrec", "published"),
        ("pmmrec", "released"),
    ],
)
def test_the_encoders_have_the_learning_rate_of_the_other_modules(model: str, preset: str) -> None:
    """MMSR, Table XII: the default of the other tables is the row with 1e-4 for all modules."""
    values = MODELS.find(model).load().presets[preset]
    assert values["tune_lr"] == values["lr"] == 1e-4


def test_the_published_pmmrec_has_a_learned_token_besides() -> None:
    """Eq. 3 of the paper; the released code has the mean of the tokens instead."""
    assert count(published("pmmrec")) == RELEASED + 768
    assert count(published("mmsr")) == RELEASED


def test_co_attention_as_published_has_token_types() -> None:
    """Per layer: cross-attention, and for each modality a block; a map of both to one vector."""
    built = published("mmsr", "published-co-attention")
    D, F = 768, 3072
    attention, norm, feed = 4 * (D * D + D), 2 * D, D * F + F + F * D + D
    cross, own = attention + norm, attention + feed + 2 * norm
    encoder = count(published("idsr")) - 100 * D
    projections, absent = 2 * (D * D + D), 2 * D
    fusion = cross + 2 * own + 2 * D * D + D + TOKEN_TYPES
    assert count(built) == encoder + projections + absent + fusion


@pytest.mark.parametrize(
    ("fusion", "maps", "biases"), [("sum", 2, 2), ("concat", 2, 1), ("gate", 3, 3), ("film", 3, 3)]
)
def test_coarse_fusions_as_published_have_one_norm(fusion: str, maps: int, biases: int) -> None:
    """The maps of D x D, with their biases."""
    D = 768
    encoder = count(published("idsr")) - 100 * D
    projections, absent, norm = 2 * (D * D + D), 2 * D, 2 * D
    expected = encoder + projections + absent + norm + maps * D * D + biases * D
    assert count(published("mmsr", "published-coarse", f"fusion={fusion}")) == expected


def all_presets() -> list[tuple[str, str, bool]]:
    chosen = []
    for model, entry in MODELS.items():
        recommender = entry.load()
        chosen += [(model, preset, False) for preset in recommender.presets]
        if recommender.pretraining is not None:
            chosen += [(model, preset, True) for preset in recommender.pretraining.presets]
    return chosen


@pytest.mark.parametrize(("model", "preset", "is_pretraining"), all_presets())
def test_every_preset_can_be_asked_for(model: str, preset: str, is_pretraining: bool) -> None:
    recommender = MODELS.find(model).load()
    classes: list[type[Any]] = [TrainConfig, recommender.settings_class]
    own = pretraining_settings(recommender) if is_pretraining else None
    classes += [] if own is None else [own]
    values = dict(preset_settings(recommender, preset, is_pretraining))
    for settings in build_settings(classes, SettingSources(), values):
        for key, value in values.items():
            assert getattr(settings, key, value) == value


def test_an_unknown_preset_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"papers.*published"):
        preset_settings(MODELS.find("mmsr").load(), "papers", is_pretraining=False)


def test_tasks_of_pretraining_presets_exist() -> None:
    for entry in MODELS.values():
        pretraining = entry.load().pretraining
        assert pretraining is None or pretraining.task in TASKS
