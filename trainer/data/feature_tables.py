"""Which feature tables a run reads, and how they reach the device."""

import re
from collections.abc import Sequence

import torch

from features.errors import UserError
from features.schema import FEATURE_MODALITIES
from features.store import FeatureStore, FeatureTable
from features.warehouse import DatasetInfo, slug
from trainer.data.batches import ItemFeatures
from trainer.data.token_features import TokenFeatures

_WANTED = re.compile(
    r"(?P<modality>[^=:]*)(=(?P<backbone>.*?))?(:(?P<level>pooled|tokens|layer-\d+))?"
)


def choose_tables(
    store: FeatureStore, dataset: str, wanted: Sequence[str] | None, *, layers: bool = False
) -> list[FeatureTable]:
    """Pick the feature tables of a run: those wanted, else every modality's only one.

    Args:
        store: The feature store.
        dataset: A prepared dataset.
        wanted: ``MODALITY[=BACKBONE][:LEVEL]``: a modality alone where one table has it, pooled
            where no level is named; ``None``: all pooled ones.
        layers: Whether a modality's only table of a level ``layer-K`` goes before a pooled one,
            where none is named.

    Returns:
        At most one table for each modality, in the fixed order of modalities.

    Raises:
        UserError: A table is not there, or a modality has several and none is named.
    """
    there = store.tables(dataset)
    known = ", ".join(table.label for table in there) or "none"
    if wanted is None:
        cut = {t.modality: t.level for t in there if layers and t.level.startswith("layer-")}
        pooled = {t.modality: t.level for t in there if t.level == "pooled"}
        wanted = [f"{modality}:{level}" for modality, level in (pooled | cut).items()]
    chosen: dict[str, FeatureTable] = {}
    for entry in wanted:
        match = _WANTED.fullmatch(entry)
        modality = match["modality"] if match else entry
        if match is None or modality not in FEATURE_MODALITIES:
            raise UserError(
                f"--features {entry!r}: unknown modality {modality!r};"
                f" give modality=backbone or modality=backbone:level; there are: {known}"
            )
        backbone, level = match["backbone"] or "", match["level"] or "pooled"
        found = [
            table
            for table in there
            if (table.modality, table.level) == (modality, level)
            and (not backbone or table.backbone == slug(backbone))
        ]
        if not found:
            at = "" if level == "pooled" else f" --level {level}"
            raise UserError(
                f"dataset {dataset!r} has no feature table {entry!r} (there are: {known});"
                f" run: mmrec extract --dataset {dataset} --{modality} {backbone or 'BACKBONE'}{at}"
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
    """Read pooled tables into matrices on the device; tables of tokens stay on the disk.

    Returns:
        The features, and each table's identity, which a checkpoint remembers.

    Raises:
        UserError: A table is unfinished, mixed, or of another preparation.
    """
    vectors, present, tokens, identities = {}, {}, {}, []
    for table in tables:
        name, about = table.modality, (info.items, info.fingerprint, info.inputs_of(table.modality))
        if table.level == "pooled":
            matrix = table.read(*about)
            vectors[name] = torch.from_numpy(matrix.vectors).to(device).float()
            present[name] = torch.from_numpy(matrix.present).to(device)
            made = matrix.provenance
        else:
            mapped = table.read_tokens(*about)
            tokens[name] = TokenFeatures(
                values=mapped.values, offsets=mapped.offsets, device=device
            )
            present[name] = tokens[name].present_N
            made = mapped.provenance
        identities.append({**made.identity(), "content": table.digest()})
    features = ItemFeatures(n_items=info.items, vectors=vectors, present=present, tokens=tokens)
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
