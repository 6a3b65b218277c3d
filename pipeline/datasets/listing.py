"""The list of known and prepared datasets that ``mmrec datasets`` prints."""

from pathlib import Path
from typing import Any

from features.errors import UserError
from features.object_storage import is_storage_url
from features.warehouse import Warehouse
from pipeline.datasets.raw_files import locate_files, raw_format
from pipeline.datasets.registry import DATASETS


def list_datasets(warehouse: Warehouse) -> list[dict[str, Any]]:
    """Return one row for each known or prepared dataset.

    The keys of a row: ``dataset``, ``format`` (its importer), ``source``, ``origin`` (the package
    that registers it; None for one's own data), ``raw`` (the raw folder), ``expected`` (required
    role to file name patterns), ``raw_found`` (True for object storage, which is not asked),
    ``prepared``, ``damaged``, ``users``, ``items``, ``interactions``, ``k_core``, and ``error``
    (the reason why the entry cannot be used, or None).
    """
    prepared = set(warehouse.datasets())
    names = [*DATASETS, *sorted(prepared - set(DATASETS))]
    return [_row(warehouse, name) for name in names]


def _row(warehouse: Warehouse, name: str) -> dict[str, Any]:
    info, error = None, None
    if warehouse.is_prepared(name):
        try:
            info = warehouse.info(name)
        except UserError as damage:
            error = str(damage)
    is_stored = info is not None and is_storage_url(info.raw)
    root = Path(info.raw) if info else warehouse.raw_dir(name)
    row: dict[str, Any] = {
        "dataset": name,
        "format": info.format if info else "",
        "source": "your own",
        "origin": None,
        "raw": info.raw if info else str(root),
        "expected": {},
        "raw_found": is_stored or root.is_dir(),
        "prepared": info is not None,
        "damaged": error is not None,
        "error": error,
    }
    for key in ("users", "items", "interactions", "k_core"):
        row[key] = getattr(info, key) if info else None
    if name in DATASETS:
        known = DATASETS[name]
        row.update(format=known.importer, source=known.source, origin=DATASETS.origin(name))
        row["k_core"] = info.k_core if info else known.k_core
        row.update(_expected(name, root))
        row["raw_found"] |= is_stored
    return row


def _expected(name: str, root: Path) -> dict[str, Any]:
    """Return the expected files of a known dataset, and whether they are in the raw folder."""
    try:
        format = raw_format(name)
    except UserError as error:
        return {"raw_found": False, "error": str(error)}
    expected = {role: list(format.files[role]) for role in format.importer.required}
    try:
        locate_files(name, format, root, {})
    except UserError:
        return {"expected": expected, "raw_found": False}
    return {"expected": expected, "raw_found": True}
