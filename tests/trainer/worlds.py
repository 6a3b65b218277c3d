"""Small planted worlds for the trainer's tests, in memory or in a warehouse."""

from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from features.arrow_columns import embedding_array, token_array
from features.atomic_files import write_table
from features.dataset import Dataset
from features.documents import write_json
from features.provenance import Provenance
from features.schema import INTERACTIONS_SCHEMA, ITEMS_SCHEMA, feature_schema
from features.splits import MIN_EVALUATED
from features.store import FeatureStore
from features.warehouse import DatasetInfo, Warehouse
from retrieval.ranking import Ranks
from trainer.data.batches import Batch, ItemFeatures, Sequences, TrainingData, TrainSet
from trainer.data.token_features import TokenFeatures
from trainer.evaluation.ranking import build_reference, rank_split
from trainer.models.base import Catalogue, Recommender
from trainer.models.registry import MODELS
from trainer.runs.run import Run, create_run
from trainer.runs.spec import InitialWeights, RunSpec
from trainer.runs.transfer import FULL
from trainer.setting_sources import SettingSources


def dataset(sequences: list[list[int]], n_items: int) -> Dataset:
    """A dataset of the given sequences, oldest first."""
    lengths = [len(sequence) for sequence in sequences]
    train = [s[:-2] if len(s) >= MIN_EVALUATED else s for s in sequences]
    flat = [item for sequence in sequences for item in sequence]
    info = DatasetInfo(
        name="world",
        format="none",
        raw="",
        k_core=0,
        users=len(sequences),
        items=n_items,
        interactions=len(flat),
        fingerprint="f",
        inputs={},
        timestamps=False,
        tied=0.0,
    )
    return Dataset(
        info=info,
        items=np.array(flat, np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        train_counts=np.bincount([i for s in train for i in s], minlength=n_items).astype(np.int64),
    )


def cycles(users: int = 60, n_items: int = 12, seed: int = 0) -> Dataset:
    """Order is everything: item i is followed by i + 1, and every item is as popular as another."""
    rng = np.random.default_rng(seed)
    sequences = []
    for _ in range(users):
        start, length = rng.integers(n_items), rng.integers(5, 11)
        sequences.append([int((start + k) % n_items) for k in range(length)])
    return dataset(sequences, n_items)


def features(n_items: int, *, seed: int = 0, missing: bool = True) -> ItemFeatures:
    """Two modalities of random vectors; some items lack one, the last one both."""
    generator = torch.Generator().manual_seed(seed)
    vectors, present = {}, {}
    for number, (name, width) in enumerate((("image", 6), ("text", 5))):
        is_present = torch.ones(n_items, dtype=torch.bool)
        if missing:
            is_present[number::4] = False
            is_present[-1] = False
        values = torch.randn(n_items, width, generator=generator)
        vectors[name] = values * is_present[:, None]
        present[name] = is_present
    return ItemFeatures(n_items=n_items, vectors=vectors, present=present)


def token_features(n_items: int) -> ItemFeatures:
    """Make tokens of texts, 0 to 3 an item, beside pooled images."""
    pooled = features(n_items)
    lengths = np.arange(n_items) % 4
    values = np.random.default_rng(0).normal(size=(lengths.sum(), 5)).astype(np.float16)
    tokens = TokenFeatures(
        values=values,
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        device=torch.device("cpu"),
    )
    return ItemFeatures(
        n_items=n_items,
        vectors={"image": pooled.vectors["image"]},
        present={"image": pooled.present["image"], "text": tokens.present_N},
        tokens={"text": tokens},
    )


def sequences(histories: list[list[int]], padding: int = 0) -> Sequences:
    """Make a batch of histories, padded on the right to the longest."""
    width = max(map(len, histories))
    items = [row + [padding] * (width - len(row)) for row in histories]
    return Sequences(
        items_BL=torch.tensor(items), lengths_B=torch.tensor([len(row) for row in histories])
    )


def batch(rows: Sequences, item_features: ItemFeatures, generator: torch.Generator) -> Batch:
    """A batch of sequences of as many users; each has in training what stands in its row."""
    users_B = torch.arange(len(rows.lengths_B))
    keys = (users_B[:, None] * item_features.n_items + rows.items_BL)[rows.mask_BL]
    counts_N = torch.bincount(rows.items_BL[rows.mask_BL], minlength=item_features.n_items)
    train = TrainSet(counts_N=counts_N, keys_J=keys.unique())
    return Batch(
        users_B=users_B, sequences=rows, features=item_features, train=train, generator=generator
    )


def training_data(world: Dataset, item_features: ItemFeatures) -> TrainingData:
    """The data on the CPU."""
    return TrainingData(world, item_features, torch.device("cpu"))


def prepare(
    warehouse: Warehouse,
    sequences: list[list[int]],
    n_items: int,
    ids: Sequence[str] | None = None,
) -> None:
    """Write :func:`dataset` as the prepared dataset ``world``, over what was there.

    Args:
        warehouse: Where it is written.
        sequences: Items of each user, oldest first.
        n_items: Number of items.
        ids: Their ids; by default i0, i1 and so on, with which the fingerprint is always the same.
    """
    folder = warehouse.dataset_dir("world")
    rows = [
        {"user": user, "user_id": f"u{user}", "item": item, "timestamp": None, "position": position}
        for user, sequence in enumerate(sequences)
        for position, item in enumerate(sequence)
    ]
    item_ids = ids or [f"i{item}" for item in range(n_items)]
    items = [{"item": item, "item_id": item_id} for item, item_id in enumerate(item_ids)]
    for name, table, schema in (
        ("interactions", rows, INTERACTIONS_SCHEMA),
        ("items", items, ITEMS_SCHEMA),
    ):
        write_table(folder / name / "part-00000.parquet", pa.Table.from_pylist(table, schema))
    info = dataset(sequences, n_items).info
    if ids is not None:
        info = replace(info, fingerprint=" ".join(ids))
    write_json(folder / "dataset.json", asdict(info))


def extract(
    warehouse: Warehouse, item_features: ItemFeatures, backbone: str = "toy", fingerprint: str = "f"
) -> None:
    """Write features as tables of the prepared dataset ``world``."""
    for modality, vectors in item_features.vectors.items():
        items = np.flatnonzero(item_features.present[modality].numpy())
        values = vectors.numpy()[items]
        embedding = embedding_array(values)
        where = (backbone, modality, "pooled")
        _write(warehouse, where, items, embedding, values.shape[1], fingerprint=fingerprint)


def extract_tokens(
    warehouse: Warehouse,
    modality: str,
    tokens: dict[int, np.ndarray[Any, Any]],
    backbone: str = "toy",
) -> None:
    """Write each item's tokens (T, D) float32 as a table of the prepared dataset ``world``."""
    items, arrays = np.array(list(tokens)), list(tokens.values())
    counts = pa.array([len(array) for array in arrays], pa.int32())
    where = (backbone, modality, "tokens")
    _write(warehouse, where, items, token_array(arrays), arrays[0].shape[1], counts)


def _write(
    warehouse: Warehouse,
    where: tuple[str, str, str],
    items: np.ndarray[Any, Any],
    embedding: pa.Array,
    dim: int,
    n_tokens: pa.Array | None = None,
    fingerprint: str = "f",
) -> None:
    backbone, modality, level = where
    made = Provenance(
        backbone=backbone,
        checkpoint="c",
        preprocessing="none",
        pooling="none",
        modality=modality,
        level=level,
        compute="float32",
        dtype="float32",
        dim=dim,
    )
    columns = [
        pa.array(items, pa.int32()),
        pa.array([f"i{item}" for item in items]),
        pa.array([f"{backbone}{item}" for item in items]),
        pa.nulls(len(items), pa.int32()),
        pa.nulls(len(items), pa.int32()) if n_tokens is None else n_tokens,
        pa.nulls(len(items), pa.bool_()),
        embedding,
    ]
    table = FeatureStore(warehouse).table("world", backbone, modality, level)
    schema = feature_schema(dim, "float32", level)
    table.append(pa.Table.from_arrays(columns, schema=schema), made)
    table.finish(fingerprint, made)


def begin(
    warehouse: Warehouse,
    model: str,
    dataset: str | Sequence[str] = "world",
    *,
    settings: Sequence[str] = (),
    features: Sequence[str] | None = None,
    name: str | None = None,
    init: str | None = None,
    transfer: str = FULL,
    is_pretraining: bool = False,
    file: Path | None = None,
    preset: str | None = None,
) -> Run:
    """Create a run from words, as the command line does."""
    spec = RunSpec.resolve(
        warehouse,
        model,
        [dataset] if isinstance(dataset, str) else dataset,
        is_pretraining=is_pretraining,
        features=features,
        sources=SettingSources(preset=preset, file=file, pairs=settings),
        init=None if init is None else InitialWeights(run=init, transfer=transfer),
    )
    return create_run(warehouse, spec, name=name)


SMALL: dict[str, Any] = {
    **{"dim": 8, "heads": 2, "hidden": 16, "length": 6, "fusion_heads": 2},
    **{"experts": 3, "codes": 4, "code_bits": 2, "least_width": 2},
}
"""Sizes of a small model; each model takes those that it knows."""
USERS = 2048
"""Users of a model that is built without a dataset: at least as many as any test's batch has."""


def small_pairs(model: str) -> dict[str, Any]:
    """The sizes of a small model that can be given on the command line."""
    recommender = MODELS.find(model).load()
    names = {field.name for field in fields(recommender.settings_class)} - {*recommender.unread}
    return {key: value for key, value in SMALL.items() if key in names}


def small_settings(model: str, **settings: Any) -> Any:
    """The settings of a small model, with some of them changed."""
    settings_class = MODELS.find(model).load().settings_class
    names = {field.name for field in fields(settings_class)}
    return settings_class(**{k: v for k, v in SMALL.items() if k in names} | settings)


def build(
    model: str, item_features: ItemFeatures, *, seed: int = 0, **settings: Any
) -> Recommender:
    """A small model for the items of these features, with random weights."""
    torch.manual_seed(seed)
    catalogue = Catalogue(n_items=item_features.n_items, n_users=USERS, widths=item_features.widths)
    return MODELS.find(model).load()(small_settings(model, **settings), catalogue)


def models_with(setting: str) -> list[str]:
    """The models that have a setting."""
    return [name for name in MODELS if hasattr(small_settings(name), setting)]


def trained_models() -> list[str]:
    """The models that learn by gradients."""
    return [name for name in MODELS if any(True for _ in build(name, features(4)).parameters())]


def ranks(
    model: Recommender, world: Dataset, item_features: ItemFeatures, split: str = "test"
) -> Ranks:
    """The ranks of the targets of a split."""
    return rank_split(model, training_data(world, item_features), split, 64).ranks


def popularity_ranks(world: Dataset, split: str = "test") -> Ranks:
    """The ranks by popularity."""
    data = training_data(world, ItemFeatures(n_items=world.info.items, vectors={}, present={}))
    return rank_split(build_reference("popularity", data), data, split, 64).ranks
