"""Load one prepared dataset with its features, or several datasets as one.

Several datasets do not share items or users: item and user numbers of a dataset follow those of the
dataset before it. All datasets must have features of the same backbones.

Legend: N items of all datasets, K items of a batch, T most tokens of these, D width.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from features.atomic_files import database
from features.attributes import ItemAttributes, load_attributes
from features.dataset import Dataset, Ints, load_dataset, load_items
from features.errors import UserError
from features.splits import SPLITS
from features.store import FeatureStore, FeatureTable
from features.warehouse import Warehouse
from trainer.data.batches import ItemFeatures
from trainer.data.control import NO_CONTROL, Control
from trainer.data.feature_tables import choose_tables, load_features
from trainer.data.token_features import TokenFeatures


@dataclass(frozen=True, kw_only=True, slots=True)
class DataIdentity:
    """Hashes of everything that a run reads."""

    items: str
    """Fingerprint of the item ids in their order."""
    interactions: str
    """Digest of the interactions."""
    tied: float
    """Share of interactions with the time of the user's interaction before."""
    ties: str
    """Order of these interactions; names that differ are joined by ``+``."""
    features: Sequence[Mapping[str, Any]]
    """Provenance of each feature table, with a digest of its content."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttributeColumns:
    """The columns of the items whose values are attributes."""

    columns: tuple[str, ...] = ()
    least: int = 1
    """Attributes of fewer items are left out."""
    vocabulary: Sequence[str] | None = None
    """Names of the attributes of a training; ``None``: all that the items have."""

    def load(self, warehouse: Warehouse, datasets: Sequence[str]) -> ItemAttributes:
        """Read the attributes of the items of all datasets."""
        return load_attributes(
            warehouse, datasets, self.columns, least=self.least, vocabulary=self.vocabulary
        )

    def identity(self, attributes: ItemAttributes) -> dict[str, Any]:
        """Return what a checkpoint stores of attributes."""
        return {
            "modality": "attributes",
            "columns": ",".join(self.columns),
            "least": self.least,
            "content": attributes.digest(),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedData:
    """One or several datasets with their features, loaded and concatenated."""

    dataset: Dataset
    features: ItemFeatures
    identity: DataIdentity
    attribute_names: Sequence[str] = ()
    """Names of the A attributes of the items."""


def choose_common_tables(
    warehouse: Warehouse,
    datasets: Sequence[str],
    requested: Sequence[str] | None,
    *,
    layers: bool = False,
) -> list[FeatureTable]:
    """Choose feature tables that all datasets have.

    Args:
        warehouse: Holds the datasets.
        datasets: Names of prepared datasets.
        requested: As in :func:`trainer.data.feature_tables.choose_tables`.
        layers: As there.

    Returns:
        The tables of the first dataset; those of the others have the same labels.

    Raises:
        UserError: A table does not exist, or the datasets have different tables.
    """
    store = FeatureStore(warehouse)
    chosen = {name: choose_tables(store, name, requested, layers=layers) for name in datasets}
    labels = {name: [table.label for table in tables] for name, tables in chosen.items()}
    first = datasets[0]
    for name in datasets[1:]:
        if labels[name] != labels[first]:
            of_first, of_other = (", ".join(labels[n]) or "none" for n in (first, name))
            raise UserError(
                f"the features of {first!r} ({of_first}) and {name!r} ({of_other}) differ;"
                " choose by --features tables that both have"
            )
    return chosen[first]


def load_data(
    warehouse: Warehouse,
    datasets: Sequence[str],
    labels: Sequence[str],
    device: torch.device,
    attributes: AttributeColumns = AttributeColumns(),
    *,
    with_times: bool = False,
    control: Control = NO_CONTROL,
) -> LoadedData:
    """Load datasets with the feature tables of these labels, and concatenate them.

    Args:
        warehouse: Holds the datasets.
        datasets: Names of prepared datasets.
        labels: Labels of feature tables that all of them have.
        device: Device of the features.
        attributes: Columns of the items to load as attributes.
        with_times: If true, load the times of the interactions, if all datasets have times.
        control: The treatment of the rows of the feature tables, in each dataset by itself.

    Raises:
        UserError: A dataset or a table cannot be read, or two tables were encoded differently.
    """
    store = FeatureStore(warehouse)
    loaded = [load_dataset(warehouse, name, with_times=with_times) for name in datasets]
    parts, identities = [], []
    for name, dataset in zip(datasets, loaded, strict=True):
        of_dataset = choose_tables(store, name, labels)
        features, tables = load_features(of_dataset, dataset.info, device, control)
        parts.append(features)
        identities.append(tables)
    dataset = loaded[0] if len(loaded) == 1 else _concatenate(loaded)
    joint = _joint_identity(datasets, identities)
    features = parts[0] if len(parts) == 1 else _concatenate_features(parts)
    attribute_names: Sequence[str] = ()
    if attributes.columns:
        loaded_attributes = attributes.load(warehouse, datasets)
        joint.append(attributes.identity(loaded_attributes))
        attribute_names = loaded_attributes.names
        tables_NP = {
            column: torch.from_numpy(loaded_attributes.padded(column)).to(device)
            for column in attributes.columns
        }
        features = replace(features, attributes=tables_NP)
    identity = DataIdentity(
        items=dataset.info.fingerprint,
        interactions=dataset.digest(),
        tied=dataset.info.tied,
        ties=dataset.info.ties,
        features=joint,
    )
    return LoadedData(
        dataset=dataset, features=features, identity=identity, attribute_names=attribute_names
    )


def identify_data(
    warehouse: Warehouse,
    datasets: Sequence[str],
    labels: Sequence[str],
    attributes: AttributeColumns = AttributeColumns(),
) -> DataIdentity:
    """Return the identity that :func:`load_data` returns, without reading the vectors.

    Raises:
        UserError: A dataset or a table cannot be read, or two were encoded differently.
    """
    store = FeatureStore(warehouse)
    loaded = [load_dataset(warehouse, name) for name in datasets]
    dataset = loaded[0] if len(loaded) == 1 else _concatenate(loaded)
    identities = [
        [table.identity(part.info) for table in choose_tables(store, name, labels)]
        for name, part in zip(datasets, loaded, strict=True)
    ]
    joint = _joint_identity(datasets, identities)
    if attributes.columns:
        joint.append(attributes.identity(attributes.load(warehouse, datasets)))
    return DataIdentity(
        items=dataset.info.fingerprint,
        interactions=dataset.digest(),
        tied=dataset.info.tied,
        ties=dataset.info.ties,
        features=joint,
    )


def _joint_fingerprint(fingerprints: Sequence[str]) -> str:
    if len(fingerprints) == 1:
        return fingerprints[0]
    return hashlib.sha256("+".join(fingerprints).encode()).hexdigest()[:16]


def item_splits(
    warehouse: Warehouse, datasets: Sequence[str], share: float
) -> dict[str, npt.NDArray[np.bool_]]:
    """Return the items that the alignment of modalities holds out.

    A hash of the item id decides, so the splits are the same in each run.

    Args:
        warehouse: Holds the datasets.
        datasets: Names of prepared datasets, whose items are concatenated.
        share: Share of the items in each split, 0..0.5.

    Returns:
        (N,) bool for each of ``validation`` and ``test``.
    """
    positions = []
    for name in datasets:
        items = load_items(warehouse, name, ["item_id"])
        with database() as db:
            db.register("items", items)
            hashes = db.sql("SELECT md5_number_lower(item_id) AS h FROM items").fetchnumpy()["h"]
        positions.append(hashes.astype(np.float64) / 2.0**64)  # uniform in 0..1
    position_N = np.concatenate(positions)
    return {
        "validation": position_N < share,
        "test": (position_N >= share) & (position_N < 2 * share),
    }


class ConcatenatedTokens(TokenFeatures):
    """The token tables of several datasets, each on disk."""

    def __init__(self, parts: Sequence[TokenFeatures]) -> None:
        offsets, begin = [np.zeros(1, np.int64)], 0
        for part in parts:
            offsets.append(part.offsets[1:] + begin)
            begin += int(part.offsets[-1])
        set_once = object.__setattr__  # the base is frozen
        set_once(self, "values", parts[0].values)
        set_once(self, "offsets", np.concatenate(offsets))
        set_once(self, "device", parts[0].device)
        set_once(self, "row_N", None)
        set_once(self, "_parts", list(parts))
        firsts = np.cumsum([0, *(len(part.offsets) - 1 for part in parts)])
        set_once(self, "_firsts", torch.from_numpy(firsts).to(self.device))

    _parts: list[TokenFeatures]
    _firsts: Tensor

    def gather(self, items_K: Tensor) -> tuple[Tensor, Tensor]:
        """Read the tokens of items, see :meth:`TokenFeatures.gather`."""
        dataset_K = torch.searchsorted(self._firsts, items_K, right=True) - 1
        gathered = []
        for number, part in enumerate(self._parts):
            rows = (dataset_K == number).nonzero()[:, 0]
            if len(rows):
                gathered.append((rows, *part.gather(items_K[rows] - self._firsts[number])))
        longest = max((mask.shape[1] for _, _, mask in gathered), default=1)
        x_KTD = torch.zeros(len(items_K), longest, self.width, device=self.device)
        mask_KT = torch.zeros(len(items_K), longest, dtype=torch.bool, device=self.device)
        for rows, x, mask in gathered:
            x_KTD[rows, : mask.shape[1]] = x
            mask_KT[rows, : mask.shape[1]] = mask
        return x_KTD, mask_KT


def _concatenate(parts: Sequence[Dataset]) -> Dataset:
    infos = [part.info for part in parts]
    for info in infos:
        if info.hidden_items:
            raise UserError(
                f"dataset {info.name!r} has {info.hidden_items:,} hidden items, so it cannot be"
                " joined with others; give it alone, or prepare it without --hide-items"
            )
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
            tied=sum(info.tied * info.interactions for info in infos) / int(rows[-1]),
            ties="+".join(dict.fromkeys(info.ties for info in infos)),
        ),
        items=np.concatenate(
            [part.items + np.int32(first) for part, first in zip(parts, items, strict=False)]
        ),
        offsets=np.concatenate([parts[0].offsets[:1], *offsets]),
        train_counts=np.concatenate([part.train_counts for part in parts]),
        splits=_concatenate_splits(parts),
        times=_concatenate_times(parts),
    )


def _concatenate_splits(parts: Sequence[Dataset]) -> npt.NDArray[np.int8] | None:
    """Return the split of each interaction; ``None`` if all parts have leave-one-out."""
    if all(part.splits is None for part in parts):
        return None
    splits = []
    for part in parts:
        of_part = part.splits
        if of_part is None:
            of_part = np.full(len(part.items), SPLITS.index("train"), np.int8)
            for name in ("validation", "test"):
                of_part[part.eval_split(name).targets] = SPLITS.index(name)
        splits.append(of_part)
    return np.concatenate(splits)


def _concatenate_times(parts: Sequence[Dataset]) -> Ints | None:
    times = [part.times for part in parts if part.times is not None]
    return np.concatenate(times) if len(times) == len(parts) else None


def _concatenate_features(parts: Sequence[ItemFeatures]) -> ItemFeatures:
    first = parts[0]
    return ItemFeatures(
        n_items=sum(part.n_items for part in parts),
        vectors={name: torch.cat([part.vectors[name] for part in parts]) for name in first.vectors},
        present={name: torch.cat([part.present[name] for part in parts]) for name in first.present},
        tokens={
            name: ConcatenatedTokens([part.tokens[name] for part in parts]) for name in first.tokens
        },
    )


def _joint_identity(
    datasets: Sequence[str], identities: Sequence[list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    joint = []
    for tables in zip(*identities, strict=True):
        first = tables[0]
        for name, table in zip(datasets, tables, strict=True):
            for key in first.keys() - {"content"}:
                if table[key] != first[key]:
                    raise UserError(
                        f"the {first['modality']} features of {datasets[0]!r} and {name!r} differ:"
                        f" {key} {first[key]!r} and {table[key]!r}; extract one of them again"
                    )
        joint.append({**first, "content": "+".join(str(table["content"]) for table in tables)})
    return joint
