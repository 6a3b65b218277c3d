"""Which feature tables a run reads, and how they reach the device."""

from collections.abc import Sequence

import torch

from features.errors import UserError
from features.schema import FEATURE_MODALITIES
from features.store import FeatureStore, FeatureTable
from features.warehouse import DatasetInfo, slug
from trainer.data import ItemFeatures


def choose_tables(
    store: FeatureStore, dataset: str, wanted: Sequence[str] | None
) -> list[FeatureTable]:
    """Pick the feature tables of a run: those wanted, else every modality's only one.

    Args:
        store: The feature store.
        dataset: A prepared dataset.
        wanted: ``modality=backbone``, or a modality alone where one table has it; ``None``: all,
            joint ones only where there are no others.

    Returns:
        At most one table for each modality, in the fixed order of modalities.

    Raises:
        UserError: A table is not there, or a modality has several and none is named.
    """
    there = [table for table in store.tables(dataset) if table.level == "pooled"]
    labels = [table.label for table in there]
    known = ", ".join(labels) or "none"
    if wanted is None:
        wanted = list(dict.fromkeys(table.modality for table in there))
        # What a joint vector holds of picture and text, tables of these hold as well.
        wanted = [name for name in wanted if name != "joint"] or wanted
    chosen: dict[str, FeatureTable] = {}
    for entry in wanted:
        modality, _, backbone = entry.partition("=")
        if modality not in FEATURE_MODALITIES:
            raise UserError(
                f"--features {entry!r}: unknown modality {modality!r};"
                f" give modality=backbone; there are: {known}"
            )
        found = [
            table
            for table in there
            if table.modality == modality and (not backbone or table.backbone == slug(backbone))
        ]
        if not found:
            raise UserError(
                f"dataset {dataset!r} has no feature table {entry!r} (there are: {known});"
                f" run: mmrec extract --dataset {dataset} --{modality} {backbone or 'BACKBONE'}"
            )
        if len(found) > 1:
            names = ", ".join(table.label for table in found)
            raise UserError(
                f"several tables hold {modality} features; choose by --features: {names}"
            )
        if modality in chosen:
            raise UserError(f"--features names two tables for {modality}; name one")
        chosen[modality] = found[0]
    return [chosen[modality] for modality in FEATURE_MODALITIES if modality in chosen]


def load_features(
    tables: Sequence[FeatureTable], info: DatasetInfo, device: torch.device
) -> tuple[ItemFeatures, list[dict[str, object]]]:
    """Read tables into matrices on the device.

    Returns:
        The features, and each table's identity, which a checkpoint remembers.

    Raises:
        UserError: A table is unfinished, mixed, or of another preparation.
    """
    vectors, present, identities = {}, {}, []
    for table in tables:
        matrix = table.read(info.items, info.fingerprint, info.inputs_of(table.modality))
        vectors[table.modality] = torch.from_numpy(matrix.vectors).to(device).float()
        present[table.modality] = torch.from_numpy(matrix.present).to(device)
        identities.append({**matrix.provenance.identity(), "content": table.digest()})
    features = ItemFeatures(n_items=info.items, vectors=vectors, present=present)
    return features, identities


def choose_device(name: str) -> torch.device:
    """Turn ``auto`` or a device's name into a device.

    Raises:
        UserError: There is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise UserError(f"device={name!r} cannot be used here; give auto, cpu or cuda") from None
    return device
