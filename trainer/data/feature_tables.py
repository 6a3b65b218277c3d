"""Choose the feature tables of a run, and load them onto a device."""

import math
import re
import warnings
from collections.abc import Sequence
from typing import Any

import numpy.typing as npt
import torch

from features.errors import UserError
from features.memory import available_memory
from features.permutation import permuted_items
from features.schema import FEATURE_MODALITIES
from features.store import FeatureStore, FeatureTable
from features.warehouse import DatasetInfo, slug
from trainer.data.batches import ItemFeatures
from trainer.data.control import NO_CONTROL, Control
from trainer.data.token_features import TokenFeatures

_SHARE_IN_MEMORY = 0.25  # of the free memory, that the matrix of one table takes at most
_REQUEST = re.compile(
    r"(?P<modality>[^=:]*)(=(?P<backbone>.*?))?(:(?P<level>pooled|tokens|layer-\d+))?"
)


def choose_tables(
    store: FeatureStore, dataset: str, requested: Sequence[str] | None, *, layers: bool = False
) -> list[FeatureTable]:
    """Choose the feature tables of a run: the requested ones, or one for each modality.

    Args:
        store: The feature store.
        dataset: A prepared dataset.
        requested: ``MODALITY[=BACKBONE][:LEVEL]``. The backbone can be left out if one table has
            the modality; the level is ``pooled`` if it is left out. ``None``: one pooled table for
            each modality.
        layers: Without a request, prefer a table of a level ``layer-K`` to a pooled one.

    Returns:
        At most one table for each modality, in the fixed order of modalities.

    Raises:
        UserError: A table does not exist, or a modality has several tables and none is named.
    """
    tables = store.tables(dataset)
    known = ", ".join(table.label for table in tables) or "none"
    if requested is None:
        cut = {t.modality: t.level for t in tables if layers and t.level.startswith("layer-")}
        pooled = {t.modality: t.level for t in tables if t.level == "pooled"}
        requested = [f"{modality}:{level}" for modality, level in (pooled | cut).items()]
    chosen: dict[str, FeatureTable] = {}
    for entry in requested:
        match = _REQUEST.fullmatch(entry)
        modality = match["modality"] if match else entry
        if match is None or modality not in FEATURE_MODALITIES:
            raise UserError(
                f"--features {entry!r}: unknown modality {modality!r};"
                f" give modality=backbone or modality=backbone:level; tables: {known}"
            )
        backbone, level = match["backbone"] or "", match["level"] or "pooled"
        matching = [
            table
            for table in tables
            if (table.modality, table.level) == (modality, level)
            and (not backbone or table.backbone == slug(backbone))
        ]
        if not matching:
            options = f"--{modality} {backbone or 'BACKBONE'}"
            if level != "pooled":
                options += f" --level {level}"
            raise UserError(
                f"dataset {dataset!r} has no feature table {entry!r} (it has: {known});"
                f" run: mmrec extract --dataset {dataset} {options}"
            )
        if len(matching) > 1:
            names = ", ".join(table.label for table in matching)
            raise UserError(
                f"several tables hold {modality} features; choose by --features: {names}"
            )
        if modality in chosen:
            raise UserError(f"--features names two tables for {modality}; name one")
        chosen[modality] = matching[0]
    return [chosen[modality] for modality in FEATURE_MODALITIES if modality in chosen]


def load_features(
    tables: Sequence[FeatureTable],
    info: DatasetInfo,
    device: torch.device,
    control: Control = NO_CONTROL,
) -> tuple[ItemFeatures, list[dict[str, object]]]:
    """Read pooled tables into matrices on the device; tables of tokens stay on disk.

    On a CPU, a pooled table that takes more than a quarter of the free memory stays on disk too.
    Rows of tables on disk are permuted on disk, in a copy, and tokens by their row numbers.

    Args:
        tables: The tables.
        info: The prepared dataset.
        device: Device of the features.
        control: The treatment of the rows.

    Returns:
        The features, and the identity of each table, which a checkpoint stores.

    Raises:
        UserError: A table is unfinished, mixed, or belongs to another preparation of the dataset;
            or the control cannot replace its rows.
    """
    vectors, present, tokens, identities = {}, {}, {}, []
    most_bytes = _SHARE_IN_MEMORY * available_memory() if device.type == "cpu" else math.inf
    for table in tables:
        name, expected = (
            table.modality,
            (info.items, info.fingerprint, info.inputs_of(table.modality)),
        )
        if table.level == "pooled":
            matrix = table.read(
                *expected, most_bytes=most_bytes, permutation_seed=control.permutation_seed
            )
            control.replace_rows(matrix, table.label)
            vectors[name] = _as_tensor(matrix.vectors).to(device)
            present[name] = torch.from_numpy(matrix.present).to(device)
            provenance = matrix.provenance
        else:
            control.check_tokens(table.label)
            mapped = table.read_tokens(*expected)
            of_table = TokenFeatures(values=mapped.values, offsets=mapped.offsets, device=device)
            present[name] = of_table.present_N
            if control.permutation_seed is not None:
                present_N = present[name].cpu().numpy()
                place_N = permuted_items(present_N, control.permutation_seed, table.label)
                of_table = of_table.renumbered(place_N, info.items)
            tokens[name] = of_table
            provenance = mapped.provenance
        identities.append({**provenance.identity(), "content": table.digest()})
    features = ItemFeatures(n_items=info.items, vectors=vectors, present=present, tokens=tokens)
    return features, identities


def _as_tensor(vectors: npt.NDArray[Any]) -> torch.Tensor:
    """Return a tensor that shares the memory of an array, or its file."""
    with warnings.catch_warnings():
        # The file is mapped for reading, and nothing writes to features.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(vectors)


def choose_device(name: str) -> torch.device:
    """Return the device with a name; ``auto`` is CUDA if available, else the CPU.

    Raises:
        UserError: The device does not exist.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
        usable = ["auto", "cpu", *(["cuda"] if torch.cuda.is_available() else [])]
        raise UserError(
            f"device={name!r} cannot be used here ({reason}); give {' or '.join(usable)}"
        ) from None
    return device
