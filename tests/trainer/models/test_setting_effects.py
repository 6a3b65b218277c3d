"""Each setting of each model has an effect: some other value changes a step or the scores."""

import contextlib
from collections.abc import Iterator
from dataclasses import fields, replace
from functools import cache
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch

from features.errors import UserError
from tests.trainer import worlds
from tests.trainer.models import test_attribute_models as attributes
from trainer.config import Choice
from trainer.data.batches import ItemFeatures, Sequences, TrainingData
from trainer.models.base import Catalogue, Recommender
from trainer.models.registry import MODELS

N = attributes.N
NUMBERS = (1, 2, 3, 4, 0.9, 0.5, 0, 0.1, 0.01, 8)
"""Other values of numbers. Those that a setting refuses are left out."""
CONTEXTS: tuple[dict[str, Any], ...] = (
    {},
    {"loss": "softmax"},
    {"loss": "in-batch"},
    {"loss": "bpr-max"},
    {"loss": "bpr-max", "negatives": 3},
    {"objective": "next"},
    attributes.ATTRIBUTES,
    {"objective": "pretrain", **attributes.ATTRIBUTES},
    {"align": "nicl", "nid": True, "rcl": True},
    {"objective": "contrast"},
    {"fusion": "sum"},
    {"fusion": "film"},
    {"dnn": True},
    {"mask_ratio": 0.9},
    {"dim": 8, "hidden": 8},
    {"sequence_encoder": "gru"},
    {"sequence_encoder": "nextitnet"},
)
"""Other settings with which a setting may have its effect; each model takes those that it has."""
EFFECTIVE: dict[str, dict[str, Any]] = {}
"""Setting to the context in which another model had its effect. It is tried first."""
OF_THE_DATA = ("attributes", "attribute_least")
"""Settings that choose what is read from the table of items, before a model is built."""


def other_values(settings: Any, name: str) -> Iterator[Any]:
    """Yield values of a setting that it does not have."""
    hint = get_type_hints(type(settings), include_extras=True)[name]
    value = getattr(settings, name)
    choices = [limit for limit in get_args(hint)[1:] if isinstance(limit, Choice)]
    if isinstance(value, bool):
        yield not value
    elif choices:
        yield from (other for other in choices[0].names if other != value)
    elif name == "candidates":
        yield 4
    else:
        yield from (type(value)(number) for number in NUMBERS if number != value)


@cache
def data(has_tokens: bool) -> TrainingData:
    features = attributes.features()
    if has_tokens:
        tokens = worlds.token_features(N)
        features = replace(tokens, attributes=features.attributes)
    random = np.random.default_rng(0)
    rare = (N * random.random((8, 14)) ** 2).astype(int)  # the first items are popular
    return worlds.training_data(worlds.dataset(rare.tolist(), N), features)


def outcome(model: str, settings: dict[str, Any], has_tokens: bool) -> list[torch.Tensor]:
    """Return the windows, weights, losses and gradients of a step, and vectors or scores."""
    torch.manual_seed(0)
    world = data(has_tokens)
    catalogue = Catalogue(
        n_items=N,
        n_users=8,
        widths=world.features.widths,
        n_attributes=attributes.A,
        time_unit="s",
    )
    kind = MODELS.find(model).load()
    built: Recommender = kind(worlds.small_settings(model, **settings), catalogue)
    built.fit_buffers(world.features, world.train)
    built.start_history_bias(world.train)
    weights = [tensor.clone() for tensor in built.state_dict().values()]
    batch = next(world.epoch(built.window_sampling, batch_size=8, seed=0, epoch=0)[1])
    torch.manual_seed(1)
    step: list[torch.Tensor] = []
    if built.learns_by_gradients:
        losses = built.train().loss(batch)
        losses["loss"].backward()
        gradients = [weight.grad for weight in built.parameters() if weight.grad is not None]
        step = [*losses.values(), *gradients]
    return [batch.sequences.items_BL, *weights, *step, *scores(built.eval(), world)]


@cache
def first_outcome(
    model: str, settings: tuple[tuple[str, Any], ...], has_tokens: bool
) -> list[torch.Tensor]:
    return outcome(model, dict(settings), has_tokens)


@torch.no_grad()
def scores(model: Recommender, world: TrainingData) -> Iterator[torch.Tensor]:
    """Yield what a model computes for the histories of all users."""
    items = model.encode_items(world.features)
    yield items
    correction = model.correction(world.train.histories)
    if correction is not None:
        yield torch.from_numpy(correction.values)
    users = world.dataset.eval_split("test")
    for _, sequences in world.histories(users, length=model.history, batch_size=8):
        yield sequences.items_BL
        yield scores_of(model, items, sequences, world.features)


def scores_of(
    model: Recommender, items: torch.Tensor, sequences: Sequences, features: ItemFeatures
) -> torch.Tensor:
    if model.has_vectors:
        return model.encode_sequences(items, sequences, features)
    return model.score(items, sequences, 0, N)


def is_equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


def has_effect(model: str, name: str) -> bool:
    """Return whether some value changes the outcome, with some other settings."""
    kind = MODELS.find(model).load()
    names = {entry.name for entry in fields(kind.settings_class)}
    for has_tokens in (False, True)[: 1 + kind.reads_tokens]:
        for context in (*filter(None, [EFFECTIVE.get(name)]), *CONTEXTS):
            if name in context or not context.keys() <= names:
                continue
            with contextlib.suppress(UserError, ValueError):
                base = first_outcome(model, tuple(context.items()), has_tokens)
                for value in other_values(worlds.small_settings(model, **context), name):
                    with contextlib.suppress(UserError, ValueError):
                        if not is_equal(base, outcome(model, {**context, name: value}, has_tokens)):
                            EFFECTIVE[name] = context
                            return True
    return False


@pytest.mark.parametrize("model", MODELS)
def test_each_setting_has_an_effect(model: str) -> None:
    kind = MODELS.find(model).load()
    names = [entry.name for entry in fields(kind.settings_class)]
    read = [name for name in names if name not in (*kind.unread, *OF_THE_DATA)]
    assert [name for name in read if not has_effect(model, name)] == []
