"""The variants "as published" have the sizes of the released code."""

import re

import pytest
import torch

from trainer.config import SettingSources, TrainConfig, build_settings
from trainer.models.base import Catalogue, Recommender
from trainer.models.registry import MODELS

WIDTHS = {"image": 768, "text": 768}
RELEASED = 22_457_088
"""Two modalities, merge-attention, SASRec."""
TOKEN_TYPES = 2 * 768


def published(
    model: str, variant: str, choose: int = 0, extra: tuple[str, ...] = ()
) -> Recommender:
    """Build a variant on the device ``meta``; of alternatives ``a|b`` take the chosen one."""
    recommender = MODELS.find(model).load()
    options = re.findall(r"--set ([^\s=]+)=(\S+)", recommender.variants[variant])
    pairs = [
        f"{key}={values.split('|')[choose % len(values.split('|'))]}" for key, values in options
    ]
    _, settings = build_settings(
        [TrainConfig, recommender.settings_class], SettingSources(pairs=[*pairs, *extra]), {}
    )
    widths = WIDTHS if recommender.needs_features else {}
    with torch.device("meta"):
        return recommender(settings, Catalogue(n_items=100, n_users=1, widths=widths))


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("model", ["mmsr", "pmmrec"])
def test_as_published_has_the_parameters_of_the_released_code(model: str) -> None:
    built = published(model, "as published")
    assert count(built) == RELEASED
    names = [name for name, _ in built.named_parameters()]
    assert not [name for name in names if re.search(r"sequence.*(qkv|out)\.bias", name)]
    assert "sequence_encoder.transformer.norm.weight" not in names
    assert "item_encoder.fusion.types" not in names


def test_co_attention_as_published_has_token_types() -> None:
    """Per layer: cross-attention, and for each modality a block; a map of both to one vector."""
    built = published("mmsr", "as published, co-attention")
    D, F = 768, 3072
    attention, norm, feed = 4 * (D * D + D), 2 * D, D * F + F + F * D + D
    cross, own = attention + norm, attention + feed + 2 * norm
    encoder = count(published("idsr", "as published")) - 100 * D
    projections, absent = 2 * (D * D + D), 2 * D
    fusion = cross + 2 * own + 2 * D * D + D + TOKEN_TYPES
    assert count(built) == encoder + projections + absent + fusion


@pytest.mark.parametrize(("fusion", "maps"), [(0, 2), (1, 2), (2, 3), (3, 3)])
def test_coarse_fusions_as_published_have_one_norm(fusion: int, maps: int) -> None:
    """Of sum, concat, gate and film: the maps of D x D, with as many biases as the maps have."""
    D = 768
    biases = {0: 2, 1: 1, 2: 3, 3: 3}[fusion]
    encoder = count(published("idsr", "as published")) - 100 * D
    projections, absent, norm = 2 * (D * D + D), 2 * D, 2 * D
    expected = encoder + projections + absent + norm + maps * D * D + biases * D
    assert count(published("mmsr", "as published, coarse fusions", fusion)) == expected


def test_every_option_of_the_variant_differs_from_the_default() -> None:
    """A default that becomes the published value leaves the variant."""
    for model in ("mmsr", "pmmrec", "idsr"):
        defaults = MODELS.find(model).load().settings_class()
        settings = published(model, "as published").settings
        variant = MODELS.find(model).load().variants["as published"]
        for key in re.findall(r"--set ([^\s=]+)=", variant):
            assert getattr(settings, key) != getattr(defaults, key), (model, key)
