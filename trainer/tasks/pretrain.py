"""Pre-training: what it learns from what, before a run starts from its weights.

A recommender says in the table of models which kind it knows: ``items`` aligns the modalities of
items one by one (MMSRec), ``windows`` learns from training histories with objectives of its own
(PMMRec). Its run is like any other, but has no recommendations to evaluate.
"""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from features.errors import UserError
from features.warehouse import Warehouse
from trainer.data.batches import TrainingData
from trainer.data.multi_dataset import item_splits
from trainer.models.base import Recommender
from trainer.models.registry import MODELS, Model
from trainer.tasks.alignment import AlignConfig, Alignment
from trainer.tasks.next_item import NextItem, Task, check_trainable

STAGE = "pretrain"


def check_pretrains(name: str, entry: Model) -> None:
    """Refuse a recommender that has no pre-training.

    Raises:
        UserError: Names those that have one.
    """
    if entry.pretrain is None:
        known = ", ".join(other for other, model in MODELS.items() if model.pretrain)
        raise UserError(f"{name} has no pre-training; known: {known}")


def pretrain_config(entry: Model) -> list[type[Any]]:
    """The classes of settings beside the loop's and the recommender's."""
    return [AlignConfig] if entry.pretrain and entry.pretrain.kind == "items" else []


def pretrain_defaults(entry: Model) -> dict[str, Any]:
    """What ``mmrec pretrain`` sets, and what only it knows; nothing where there is none."""
    if entry.pretrain is None:
        return {}
    own = {field.name: field.default for one in pretrain_config(entry) for field in fields(one)}
    return {**entry.pretrain.settings, **own}


def pretrain_task(
    warehouse: Warehouse,
    datasets: Sequence[str],
    model: Recommender,
    data: TrainingData,
    settings: Sequence[Any],
) -> Task[Any]:
    """What a pre-training does in an epoch.

    Raises:
        UserError: There is too little to learn from.
    """
    if not settings:
        check_trainable(data.dataset)
        return NextItem(model, data)
    (config,) = settings
    splits = item_splits(warehouse, datasets, config.holdout)
    return Alignment(model, data.features, splits, config)
