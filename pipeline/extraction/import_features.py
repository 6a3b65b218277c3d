"""Import ready-made vectors of items into a feature table with a provenance of its own.

Legend: N items of the dataset, R rows of the file, D width.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from features.arrow_columns import embedding_array, positions
from features.atomic_files import lock, remove_leftovers, write_table
from features.dataset import load_items
from features.errors import UserError
from features.provenance import IMPORTED, Provenance
from features.schema import FAILURES_SCHEMA, feature_schema
from features.store import FeatureStore, FeatureTable
from features.table_parts import ROWS_PER_PART
from features.warehouse import DatasetInfo, Warehouse, slug
from pipeline.extraction.matrix_files import MatrixFile, open_matrix, read_ids

_FAILURE = "NaN, infinity or a number beyond float32 in the vector"


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportedTable:
    """The outcome of one import."""

    modality: str
    backbone: str
    """Name of the table, in place of a backbone's."""
    dim: int
    rows: int
    """Items with a vector."""
    absent: int
    """Items of the dataset that the file has no row for."""
    unknown: int
    """Rows of the file whose item is not in the dataset."""
    failed: int
    """Items whose vector is not finite."""
    reason: str = ""
    """The fault of these vectors, with three items as examples; empty without one."""


def import_features(
    warehouse: Warehouse,
    dataset: str,
    modality: str,
    given: str,
    *,
    ids: str | None = None,
    prepared_order: bool = False,
    name: str | None = None,
) -> ImportedTable:
    """Write the vectors of a file as the pooled feature table of a modality.

    An earlier import of the same name is replaced. Float16 is stored as such, other numbers as
    float32. Memory does not grow with the number of rows, except for the ids. A row with NaN or
    infinity is a row of ``failures``.

    Args:
        warehouse: The warehouse.
        dataset: Name of a prepared dataset.
        modality: ``image``, ``text`` or ``video``.
        given: The file, ``FILE#KEY``, or a folder; see :mod:`pipeline.extraction.matrix_files`.
        ids: File of the item id of each row. None: the ids that the file itself holds.
        prepared_order: The rows are the items of the dataset in the order of ``item``.
        name: Name of the table; None: ``imported-`` and the name of the file.

    Raises:
        UserError: A file cannot be read, the numbers of rows and ids differ, an id is repeated, no
            id is of the dataset, or the name is that of an extraction.
    """
    info = warehouse.info(dataset)
    item_ids: pa.ChunkedArray = load_items(warehouse, dataset, ["item_id"])["item_id"]
    matrix = open_matrix(given)
    items = _items_of_rows(matrix, item_ids, info, ids, prepared_order)
    backbone = slug(name or f"imported-{matrix.path.stem}")
    table = FeatureStore(warehouse).table(dataset, backbone, modality)
    provenance = _provenance(matrix, backbone, modality)
    with lock(table.path / ".lock", f"the feature table {table.label} of {dataset}"):
        _check_replaceable(table)
        table.clear()
        remove_leftovers(table.path)
        failed = _write(table, provenance, matrix, items, item_ids)
        _write_failures(warehouse, table, item_ids, failed, given)
        table.finish(
            info.fingerprint, provenance, inputs=info.inputs_of(modality), source={"file": given}
        )
    known = int((items >= 0).sum())
    return ImportedTable(
        modality=modality,
        backbone=backbone,
        dim=matrix.shape[1],
        rows=known - len(failed),
        absent=info.items - known,
        unknown=len(items) - known,
        failed=len(failed),
        reason=f"{_FAILURE} ({_examples(item_ids, failed)})" if failed else "",
    )


def _examples(item_ids: pa.ChunkedArray, items: list[int]) -> str:
    """Return the first three of some items by their ids, for a message."""
    names = ", ".join(repr(item_ids[item].as_py()) for item in sorted(items)[:3])
    return f"items {names}" if len(items) <= 3 else f"such as items {names}"


def _provenance(matrix: MatrixFile, backbone: str, modality: str) -> Provenance:
    return Provenance(
        backbone=backbone,
        checkpoint=f"sha256:{matrix.digest()}",
        preprocessing=f"file {matrix.path.name}, shape {matrix.shape}, {matrix.dtype}",
        pooling="one vector for each item, as in the file",
        modality=modality,
        level="pooled",
        compute=IMPORTED,
        dtype="float16" if matrix.dtype in ("float16", "halffloat") else "float32",
        dim=matrix.shape[1],
    )


def _items_of_rows(
    matrix: MatrixFile,
    item_ids: pa.ChunkedArray,
    info: DatasetInfo,
    given: str | None,
    prepared_order: bool,
) -> npt.NDArray[np.int32]:
    """Return the item of each row, (R,), -1 for an id that is not in the dataset."""
    rows = matrix.shape[0]
    if prepared_order:
        if given is not None:
            raise UserError("--ids and --prepared-order name two orders of the rows; give one")
        if rows != info.items:
            raise UserError(
                f"{matrix.path} has {rows:,} rows, but {info.name} has {info.items:,} items in"
                " prepared order; give the item id of each row by --ids FILE"
            )
        return np.arange(rows, dtype=np.int32)
    ids = read_ids(given) if given is not None else matrix.ids
    source = given or str(matrix.path)
    if ids is None:
        raise UserError(
            f"{matrix.path} holds no item ids; give the id of each row by --ids FILE, or"
            " --prepared-order if the rows are the items in the order of the items table"
        )
    if len(ids) != rows:
        raise UserError(
            f"{source} has {len(ids):,} ids, but {matrix.path} has {rows:,} rows; give one id for"
            " each row"
        )
    items = positions(pa.chunked_array([pa.array(ids, pa.string())]), item_ids)
    known = items[items >= 0]
    if not len(known):
        raise UserError(
            f"none of the {rows:,} ids of {source} (such as {ids[0]!r}) is an item of {info.name};"
            f" give its item ids (such as {item_ids[0].as_py()!r})"
        )
    counts = np.bincount(known)
    if counts.max() > 1:
        repeated = item_ids[int(counts.argmax())].as_py()
        raise UserError(f"{source} has the id {repeated!r} more than once; keep one row for each")
    return items


def _check_replaceable(table: FeatureTable) -> None:
    """Refuse to replace vectors that were extracted by a backbone."""
    stored = table.provenance() if table.parts() else None
    if stored is not None and stored.compute != IMPORTED:
        raise UserError(
            f"the feature table {table.label} of {table.dataset} was extracted by mmrec; give"
            f" another --name, or remove {table.path}"
        )


def _write(
    table: FeatureTable,
    provenance: Provenance,
    matrix: MatrixFile,
    items: npt.NDArray[np.int32],
    item_ids: pa.ChunkedArray,
) -> list[int]:
    """Write the rows of known items in parts; return the items whose vector is not finite."""
    failed: list[int] = []
    waiting: list[tuple[npt.NDArray[np.int32], npt.NDArray[Any]]] = []
    for rows, vectors in _known_rows(matrix, items, provenance.dtype):
        is_finite = np.isfinite(vectors).all(axis=1)
        failed += rows[~is_finite].tolist()
        waiting.append((rows[is_finite], vectors[is_finite]))
        while sum(len(part) for part, _ in waiting) >= ROWS_PER_PART:
            waiting = _flush(table, provenance, waiting, item_ids)
    if any(len(part) for part, _ in waiting):
        _flush(table, provenance, waiting, item_ids)
    return failed


def _known_rows(
    matrix: MatrixFile, items: npt.NDArray[np.int32], dtype: str
) -> Iterator[tuple[npt.NDArray[np.int32], npt.NDArray[Any]]]:
    """Yield the items and the vectors of the rows of each block whose item is known."""
    start = 0
    for block in matrix.blocks():
        rows = items[start : start + len(block)]
        start += len(block)
        with np.errstate(over="ignore"):  # becomes infinity, which is a failure
            yield rows[rows >= 0], block[rows >= 0].astype(dtype)


def _flush(
    table: FeatureTable,
    provenance: Provenance,
    waiting: list[tuple[npt.NDArray[np.int32], npt.NDArray[Any]]],
    item_ids: pa.ChunkedArray,
) -> list[tuple[npt.NDArray[np.int32], npt.NDArray[Any]]]:
    """Write the first rows as one part, in the order of items; return the other rows."""
    items = np.concatenate([part for part, _ in waiting])
    vectors = np.concatenate([part for _, part in waiting])
    rest = [(items[ROWS_PER_PART:], vectors[ROWS_PER_PART:])]
    order = np.argsort(items[:ROWS_PER_PART])
    items, vectors = items[order], vectors[order]
    hashes = [hashlib.blake2b(row.tobytes(), digest_size=16).hexdigest() for row in vectors]
    index = pa.array(items, pa.int32())
    empty = pa.nulls(len(items), pa.int32())
    columns = [
        index,
        item_ids.take(index).combine_chunks(),
        pa.array(hashes, pa.string()),
        empty,
        empty,
        pa.nulls(len(items), pa.bool_()),
        embedding_array(vectors),
    ]
    schema = feature_schema(provenance.dim, provenance.dtype)
    table.append(pa.Table.from_arrays(columns, schema=schema), provenance)
    return rest


def _write_failures(
    warehouse: Warehouse,
    table: FeatureTable,
    item_ids: pa.ChunkedArray,
    failed: list[int],
    source: str,
) -> None:
    """Write the items whose vector cannot be used; without any, remove the file."""
    folder = warehouse.dataset_dir(table.dataset) / "failures"
    path = folder / f"{table.backbone}-{table.modality}.parquet"
    if not failed:
        path.unlink(missing_ok=True)
        return
    index = pa.array(sorted(failed), pa.int32())
    constants = (table.modality, table.backbone, "read", _FAILURE, source)
    columns = [index, item_ids.take(index).combine_chunks()]
    columns += [pa.array([value] * len(failed)) for value in constants]
    write_table(path, pa.Table.from_arrays(columns, schema=FAILURES_SCHEMA))
