"""What a run learns from: one prepared dataset with its features, or several as if they were one.

Several datasets keep their items and users apart: those of the second stand behind those of the
first. Their vectors must be of the same backbones, or one name would mean two spaces.

Legend: N items of all datasets, K items asked for, T most tokens of these, D width.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from features.atomic_files import database
from features.dataset import Dataset, load_dataset, load_items
from features.errors import UserError
from features.store import FeatureStore, FeatureTable
from features.warehouse import Warehouse
from trainer.data.batches import ItemFeatures
from trainer.data.feature_tables import choose_tables, load_features
from trainer.data.token_features import TokenFeatures


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Datasets and features, loaded and joined."""

    dataset: Dataset
    features: ItemFeatures
    identity: dict[str, Any]
    """Which data these are, for checkpoints."""


def choose_labels(
    warehouse: Warehouse,
    datasets: Sequence[str],
    wanted: Sequence[str] | None,
    *,
    layers: bool = False,
) -> list[FeatureTable]:
    """Choose the feature tables that all datasets have.

    See :func:`trainer.data.feature_tables.choose_tables`.

    Returns:
        Those of the first dataset; the others' bear the same labels.

    Raises:
        UserError: A table is not there, or the datasets have different ones.
    """
    store = FeatureStore(warehouse)
    found = {name: choose_tables(store, name, wanted, layers=layers) for name in datasets}
    labels = {name: [table.label for table in tables] for name, tables in found.items()}
    first = datasets[0]
    for name in datasets[1:]:
        if labels[name] != labels[first]:
            here, there = (", ".join(labels[n]) or "none" for n in (first, name))
            raise UserError(
                f"the features of {first!r} ({here}) and {name!r} ({there}) differ;"
                " choose by --features what both have"
            )
    return found[first]


def load_source(
    warehouse: Warehouse, datasets: Sequence[str], labels: Sequence[str], device: torch.device
) -> Source:
    """Load datasets with the feature tables of these labels, and join them.

    Raises:
        UserError: A dataset or a table cannot be read, or two were encoded differently.
    """
    store = FeatureStore(warehouse)
    loaded = [load_dataset(warehouse, name) for name in datasets]
    parts, identities = [], []
    for name, dataset in zip(datasets, loaded, strict=True):
        features, tables = load_features(choose_tables(store, name, labels), dataset.info, device)
        parts.append(features)
        identities.append(tables)
    dataset = loaded[0] if len(loaded) == 1 else _join(loaded)
    identity = _joint_identity(datasets, identities)
    return Source(
        dataset=dataset,
        features=parts[0] if len(parts) == 1 else _join_features(parts),
        identity={
            "dataset": "+".join(datasets),
            "items": dataset.info.fingerprint,
            "interactions": dataset.digest(),
            "features": identity,
        },
    )


def fingerprint_of(warehouse: Warehouse, datasets: Sequence[str]) -> str:
    """What ``Source.dataset.info.fingerprint`` is, without loading anything.

    Raises:
        UserError: A dataset is not prepared.
    """
    return _joint_fingerprint([warehouse.info(name).fingerprint for name in datasets])


def _joint_fingerprint(fingerprints: Sequence[str]) -> str:
    if len(fingerprints) == 1:
        return fingerprints[0]
    return hashlib.sha256("+".join(fingerprints).encode()).hexdigest()[:16]


def item_splits(
    warehouse: Warehouse, datasets: Sequence[str], share: float
) -> dict[str, npt.NDArray[np.bool_]]:
    """Which items an alignment validates on, and which it is tested on: (N,) bool each.

    A hash of an item's id decides, so they are the same in each run. Training sees neither.

    Args:
        warehouse: Holds the datasets.
        datasets: Their items stand one behind another.
        share: Of each split.
    """
    found = []
    for name in datasets:
        items = load_items(warehouse, name, ["item_id"])
        with database() as db:
            db.register("items", items)
            hashes = db.sql("SELECT md5_number_lower(item_id) AS h FROM items").fetchnumpy()["h"]
        found.append(hashes.astype(np.float64) / 2.0**64)
    place_N = np.concatenate(found)
    return {
        "validation": place_N < share,
        "test": (place_N >= share) & (place_N < 2 * share),
    }


class JoinedTokens(TokenFeatures):
    """The token tables of several datasets, each still on the disk."""

    def __init__(self, parts: Sequence[TokenFeatures]) -> None:
        offsets, begin = [np.zeros(1, np.int64)], 0
        for part in parts:
            offsets.append(part.offsets[1:] + begin)
            begin += int(part.offsets[-1])
        set_once = object.__setattr__  # the base is frozen
        set_once(self, "values", parts[0].values)
        set_once(self, "offsets", np.concatenate(offsets))
        set_once(self, "device", parts[0].device)
        set_once(self, "_parts", list(parts))
        firsts = np.cumsum([0, *(len(part.offsets) - 1 for part in parts)])
        set_once(self, "_firsts", torch.from_numpy(firsts).to(self.device))

    _parts: list[TokenFeatures]
    _firsts: Tensor

    def gather(self, items_K: Tensor) -> tuple[Tensor, Tensor]:
        """As of one table: (K, T, D) float32 and (K, T) bool."""
        which_K = torch.searchsorted(self._firsts, items_K, right=True) - 1
        found = []
        for number, part in enumerate(self._parts):
            rows = (which_K == number).nonzero()[:, 0]
            if len(rows):
                found.append((rows, *part.gather(items_K[rows] - self._firsts[number])))
        longest = max((mask.shape[1] for _, _, mask in found), default=1)
        x_KTD = torch.zeros(len(items_K), longest, self.width, device=self.device)
        mask_KT = torch.zeros(len(items_K), longest, dtype=torch.bool, device=self.device)
        for rows, x, mask in found:
            x_KTD[rows, : mask.shape[1]] = x
            mask_KT[rows, : mask.shape[1]] = mask
        return x_KTD, mask_KT


def _join(parts: Sequence[Dataset]) -> Dataset:
    infos = [part.info for part in parts]
    items = np.cumsum([0, *(info.items for info in infos)])
    rows = np.cumsum([0, *(info.interactions for info in infos)])
    offsets = [part.offsets[1:] + row for part, row in zip(parts, rows, strict=False)]
    return Dataset(
        info=replace(
            infos[0],
            name="+".join(info.name for info in infos),
            users=sum(info.users for info in infos),
            items=int(items[-1]),
            interactions=int(rows[-1]),
            fingerprint=_joint_fingerprint([info.fingerprint for info in infos]),
        ),
        items=np.concatenate(
            [part.items + np.int32(first) for part, first in zip(parts, items, strict=False)]
        ),
        offsets=np.concatenate([parts[0].offsets[:1], *offsets]),
        train_counts=np.concatenate([part.train_counts for part in parts]),
    )


def _join_features(parts: Sequence[ItemFeatures]) -> ItemFeatures:
    first = parts[0]
    return ItemFeatures(
        n_items=sum(part.n_items for part in parts),
        vectors={name: torch.cat([part.vectors[name] for part in parts]) for name in first.vectors},
        present={name: torch.cat([part.present[name] for part in parts]) for name in first.present},
        tokens={name: JoinedTokens([part.tokens[name] for part in parts]) for name in first.tokens},
    )


def _joint_identity(
    datasets: Sequence[str], identities: Sequence[list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    found = []
    for tables in zip(*identities, strict=True):
        first = tables[0]
        for name, table in zip(datasets, tables, strict=True):
            for key in first.keys() - {"content"}:
                if table[key] != first[key]:
                    raise UserError(
                        f"the {first['modality']} features of {datasets[0]!r} and {name!r} differ:"
                        f" {key} {first[key]!r} and {table[key]!r}; extract one of them again"
                    )
        found.append({**first, "content": "+".join(str(table["content"]) for table in tables)})
    return found
