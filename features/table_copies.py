"""Copies of finished feature tables in object storage.

Below the folder, a table has the paths of a warehouse, and its parts have their checksums
in their names::

    <dataset>/features/<backbone>/<modality>/<level>/part-00000-<checksum>.parquet
    <dataset>/features/<backbone>/<modality>/<level>.json

The manifest is the same document as in the warehouse. It is written after all parts, in place of
the earlier one: until then the earlier copy is complete, because its parts have other names. Parts
that no manifest names, also those of an interrupted copy, are removed by the next complete copy.
"""

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from features.atomic_files import atomic_write, lock, sync_folder
from features.checksums import ChangedBytesError, verify_files
from features.documents import read_json
from features.errors import UserError, unknown
from features.object_storage import StorageFolder
from features.store import FeatureStore, FeatureTable
from features.warehouse import DatasetInfo, slug

_PART = re.compile(r"part-\d{5,}\.parquet")
_CHECKSUM = re.compile(r"[0-9a-f]{8}")
_MANIFEST = re.compile(r"([^/]+)/([^/]+)/([^/]+)\.json")  # backbone, modality, level
_PULLED = ".pull"
"""Folder in the table's folder of the parts that an unfinished copy has brought."""
_PUSH_AGAIN = "push the table again: mmrec push-features"


@dataclass(frozen=True, kw_only=True, slots=True)
class TableCopy:
    """The result of copying one table."""

    table: str
    """Label of the table, such as ``image=clip-vit-b-32``."""
    parts: int
    copied: int
    """Number of parts that were copied; the others were there already."""
    bytes: int
    """Bytes of all parts."""
    url: str
    """Folder of the copy's parts."""


def push_table(table: FeatureTable, info: DatasetInfo, folder: StorageFolder) -> TableCopy:
    """Copy a finished table to object storage, in place of an earlier copy.

    The bytes of every part are compared with their checksum before they are sent.

    Raises:
        UserError: The table is unfinished, damaged or of another preparation; or the storage
            cannot be written to.
    """
    with lock(table.path / ".lock", f"the feature table {table.label} of {table.dataset}"):
        manifest = table.check(info.fingerprint, info.inputs_of(table.modality))
        table.verify(manifest)
        copy = _copy_folder(folder, table)
        sources = {
            _stored_name(name, checksum): table.path / name
            for name, checksum in _recorded_parts(manifest, str(table.manifest_path)).items()
        }
        missing = _missing(copy, sources)
        for name in missing:
            copy.upload(sources[name], name)
        if missing and (lost := _missing(copy, sources)):
            raise UserError(
                f"{copy.url} lacks {lost[0]} after it was sent; see to the storage, and"
                f" {_PUSH_AGAIN} --to {folder.url}"
            )
        _parent(copy).upload(table.manifest_path, f"{table.level}.json")
        copy.remove([item.name for item in copy.objects() if item.name not in sources])
    return _report(table, copy, [*sources.values()], len(missing))


def pull_table(
    table: FeatureTable, info: DatasetInfo, folder: StorageFolder, *, overwrite: bool = False
) -> TableCopy:
    """Copy a table from object storage into the warehouse.

    All parts are brought and compared with their checksums before the table changes. The parts of
    an interrupted copy are used by the next one.

    Args:
        table: The table in the warehouse, which may not exist.
        info: The prepared dataset.
        folder: The folder that holds the copy.
        overwrite: Replace a table with other vectors.

    Raises:
        UserError: There is no copy, it is damaged or of another preparation of the dataset; or the
            warehouse has another table and ``overwrite`` is false.
    """
    copy = _copy_folder(folder, table)
    with lock(table.path / ".lock", f"the feature table {table.label} of {table.dataset}"):
        pulled = table.path / _PULLED
        pulled.mkdir(exist_ok=True)
        try:
            document = _pull_manifest(copy, table, pulled)
            recorded = _check_manifest(document, table, info, copy)
            is_same = _is_part_of(table, recorded)
            if not is_same and not overwrite:
                raise UserError(
                    f"the feature table {table.label} of {table.dataset} holds other vectors than"
                    f" {copy.url}; replace it by --overwrite, or remove {table.path}"
                )
            present = {part.name for part in table.parts()} if is_same else set()
            missing = {name: crc for name, crc in recorded.items() if name not in present}
            copied = _pull_parts(copy, pulled, missing)
            _install(table, pulled, is_same=is_same)
        finally:
            if not any(pulled.glob("part-*")):
                shutil.rmtree(pulled, ignore_errors=True)
    return _report(table, copy, table.parts(), copied)


def stored_tables(store: FeatureStore, dataset: str, folder: StorageFolder) -> list[FeatureTable]:
    """Return the tables of a dataset that have a complete copy, as they are in the warehouse."""
    below = StorageFolder(f"{folder.url}/{dataset}/features")
    matches = (_MANIFEST.fullmatch(item.name) for item in below.objects())
    return [
        store.table(dataset, backbone, modality, level)
        for backbone, modality, level in (match.groups() for match in matches if match)
        if slug(backbone) == backbone
    ]


def choose_tables(
    tables: list[FeatureTable],
    names: list[str],
    place: str,
    remedy: str = "run mmrec extract first",
) -> list[FeatureTable]:
    """Return the tables of the given names, or all of them if no name is given.

    Args:
        tables: The tables that exist.
        names: Names such as ``image=clip-vit-b-32`` or ``text=bert:tokens``.
        place: Place of the tables, for messages.
        remedy: What the user can do if there is no table.

    Raises:
        UserError: There is no table, or none of a given name.
    """
    if not tables:
        raise UserError(f"{place} has no finished feature table; {remedy}")
    by_label = {table.label: table for table in tables}
    chosen = []
    for name in names:
        modality, _, backbone = name.partition("=")
        label = name if name in by_label else f"{modality}={slug(backbone)}"
        if label not in by_label:
            raise unknown(f"feature table of {place}", name, list(by_label))
        chosen.append(by_label[label])
    return chosen or tables


def _copy_folder(folder: StorageFolder, table: FeatureTable) -> StorageFolder:
    """Return the folder of the parts of a copy."""
    path = f"{table.dataset}/features/{table.backbone}/{table.modality}/{table.level}"
    return StorageFolder(f"{folder.url}/{path}")


def _parent(copy: StorageFolder) -> StorageFolder:
    return StorageFolder(copy.url.rpartition("/")[0])


def _stored_name(part: str, checksum: str) -> str:
    return f"{part.removesuffix('.parquet')}-{checksum}.parquet"


def _missing(copy: StorageFolder, sources: dict[str, Path]) -> list[str]:
    """Return the names of parts that the copy does not have in their size."""
    sizes = {item.name: item.size for item in copy.objects()}
    return [name for name, path in sources.items() if sizes.get(name) != path.stat().st_size]


def _recorded_parts(manifest: dict[str, Any], place: str) -> dict[str, str]:
    """Return the parts of a manifest with their checksums.

    Raises:
        UserError: A part has no checksum, or a name that no part has.
    """
    parts = manifest.get("parts")
    if not isinstance(parts, dict) or not all(
        _PART.fullmatch(name) and isinstance(checksum, str) and _CHECKSUM.fullmatch(checksum)
        for name, checksum in parts.items()
    ):
        raise UserError(
            f"{place} names no checksums of its parts, as tables of earlier versions; extract the"
            " table again with --overwrite, and push it again"
        )
    return parts


def _pull_manifest(copy: StorageFolder, table: FeatureTable, pulled: Path) -> dict[str, Any]:
    """Bring the manifest of a copy into a folder, and return it.

    Raises:
        UserError: There is no copy, or the manifest is damaged.
    """
    path = pulled / f"{table.level}.json"
    try:
        _parent(copy).download(path.name, path)
    except FileNotFoundError:
        raise UserError(
            f"{copy.url}.json does not exist: there is no finished copy of the feature table"
            f" {table.label}; {_PUSH_AGAIN}"
        ) from None
    document = read_json(path, _PUSH_AGAIN)
    return document if isinstance(document, dict) else {}


def _check_manifest(
    document: dict[str, Any], table: FeatureTable, info: DatasetInfo, copy: StorageFolder
) -> dict[str, str]:
    """Return the parts of a copy with their checksums.

    Raises:
        UserError: The copy is of another preparation of the dataset, or names no checksums.
    """
    recorded = _recorded_parts(document, f"{copy.url}.json")
    expected = (info.fingerprint, info.inputs_of(table.modality))
    if (document.get("items"), document.get("inputs", "")) != expected:
        raise UserError(
            f"{copy.url} belongs to another preparation of {table.dataset}; prepare the same raw"
            " files with the same options, or run mmrec extract"
        )
    return recorded


def _is_part_of(table: FeatureTable, recorded: dict[str, str]) -> bool:
    """Return True if every part of a table is a part of the copy; also without any part."""
    try:
        verify_files([path for path in table.parts() if path.name in recorded], recorded)
    except ChangedBytesError:
        return False
    return all(path.name in recorded for path in table.parts())


def _pull_parts(copy: StorageFolder, pulled: Path, missing: dict[str, str]) -> int:
    """Bring parts into a folder, and remove others from it; return the number of parts brought.

    Raises:
        UserError: The copy lacks a part, or the bytes of a part have changed.
    """
    copied = 0
    for path in pulled.glob("part-*"):
        if path.name not in missing or not _is_intact(path, missing[path.name]):
            path.unlink()
    for name, checksum in missing.items():
        path, stored = pulled / name, _stored_name(name, checksum)
        if path.exists():
            continue
        try:
            copy.download(stored, path)
        except FileNotFoundError:
            raise UserError(f"{copy.url} lacks {stored}; {_PUSH_AGAIN}") from None
        if not _is_intact(path, checksum):
            path.unlink()
            raise UserError(f"the bytes of {copy.url}/{stored} have changed; {_PUSH_AGAIN}")
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
        copied += 1
    return copied


def _is_intact(path: Path, checksum: str) -> bool:
    try:
        verify_files([path], {path.name: checksum})
    except ChangedBytesError:
        return False
    return True


def _install(table: FeatureTable, pulled: Path, *, is_same: bool) -> None:
    """Move the parts of a complete copy to their places, and the manifest last."""
    parts = sorted(pulled.glob("part-*"))
    if parts or not is_same:
        table.unfinish()
    if not is_same:
        table.clear()
    for path in parts:
        os.replace(path, table.path / path.name)
    sync_folder(table.path)
    with atomic_write(table.manifest_path) as temporary:
        shutil.copyfile(pulled / table.manifest_path.name, temporary)


def _report(table: FeatureTable, copy: StorageFolder, parts: list[Path], copied: int) -> TableCopy:
    return TableCopy(
        table=table.label,
        parts=len(parts),
        copied=copied,
        bytes=sum(path.stat().st_size for path in parts),
        url=copy.url,
    )
