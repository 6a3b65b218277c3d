"""Files of ready-made vectors: one row for each item, read some rows at a time.

Formats: ``.npy``, ``.npz``, Parquet, ``.safetensors``, ``.pt`` (weights only, nothing is executed),
RecBole's ``.itememb``, and a folder with one ``.npy`` for each item (Ducho). ``FILE#KEY`` names one
of several arrays or columns. Pickled objects are refused.

Legend: R rows, D width.
"""

import hashlib
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from features.errors import UserError, no_permission
from features.memory import is_out_of_memory

ROWS = 8192
"""Rows that are read at once."""
_CHUNK = 1 << 22  # bytes that are hashed at once
_LIST_COLUMNS = ("embedding", "vector", "features")
_FAULTS = (
    ValueError, KeyError, OSError, RuntimeError, EOFError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
_FAULT_NAMES = ("SafetensorError", "UnpicklingError")
ID_COLUMNS = ("item_id", "item", "id", "iid", "asin", "video_id")

Block = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class MatrixFile:
    """A file of vectors that is open for reading."""

    path: Path
    shape: tuple[int, int]
    """R and D."""
    dtype: str
    """Type of the numbers in the file."""
    read: Callable[[], Iterator[Block]]
    """Yield the arrays of :meth:`blocks`, with the errors of the format's library."""
    ids: list[str] | None = None
    """(R,) item ids that the file itself holds; None if it holds none."""

    def blocks(self) -> Iterator[Block]:
        """Yield (r, D) arrays of at most ``ROWS`` rows, in the order of the file.

        Raises:
            UserError: The file is damaged.
        """
        with _errors(self.path):
            yield from self.read()

    def digest(self) -> str:
        """Return the SHA-256 of the file, or of the files of a folder in the order of the rows."""
        digest = hashlib.sha256()
        paths = sorted(self.path.glob("*.npy")) if self.path.is_dir() else [self.path]
        for path in paths:
            with path.open("rb") as stream:
                while chunk := stream.read(_CHUNK):
                    digest.update(chunk)
        return digest.hexdigest()


def open_matrix(given: str) -> MatrixFile:
    """Open a file of vectors, given as ``FILE`` or ``FILE#KEY``.

    Raises:
        UserError: The file does not exist, is of an unknown format or damaged, or does not hold
            one matrix of numbers.
    """
    path, key = Path(given), None
    if not path.exists() and "#" in given:
        name, _, key = given.rpartition("#")
        path = Path(name)
    if not path.exists():
        raise UserError(f"{path} does not exist; give a file of vectors, or a folder of .npy files")
    if path.is_dir():
        return _open_folder(path)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(
            f"{path} is none of {', '.join(_READERS)}, and no folder of .npy files; convert it"
        )
    with _errors(path):
        return reader(path, key)


@contextmanager
def _errors(path: Path) -> Iterator[None]:
    """Turn an error of a library about a file into one line."""
    try:
        yield
    except PermissionError:
        raise no_permission(path) from None
    except Exception as error:
        # safetensors and pickle have errors of their own.
        is_known = isinstance(error, _FAULTS) or type(error).__name__ in _FAULT_NAMES
        if isinstance(error, UserError) or is_out_of_memory(error) or not is_known:
            raise
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:160]
    return UserError(
        f"{path} cannot be read as numbers ({reason}); write it as .npy without pickled objects"
    )


def _shape(path: Path, shape: tuple[int, ...], dtype: Any) -> tuple[int, int]:
    """Return R and D.

    Raises:
        UserError: The array is no matrix of numbers.
    """
    kind = str(dtype).removeprefix("torch.")
    is_number = kind.startswith(("float", "bfloat16", "int", "uint", "double", "halffloat"))
    if len(shape) != 2 or 0 in shape or not is_number:
        raise UserError(
            f"{path} holds an array of shape {tuple(shape)} and type {kind}; give a matrix of"
            " numbers with one row for each item"
        )
    return int(shape[0]), int(shape[1])


def _only(path: Path, names: list[str], key: str | None) -> str:
    """Return the named array, or the only one."""
    if key is not None and key in names:
        return key
    if key is None and len(names) == 1:
        return names[0]
    listed = ", ".join(names[:8]) or "none"
    raise UserError(f"{path} holds the arrays {listed}; name one of them by {path.name}#KEY")


def _open_npy(path: Path, key: str | None) -> MatrixFile:
    matrix = np.load(path, mmap_mode="r", allow_pickle=False)
    shape = _shape(path, matrix.shape, matrix.dtype)

    def blocks() -> Iterator[Block]:
        # A new map for each block, so that the pages of the last one are given back.
        for start in range(0, shape[0], ROWS):
            mapped = np.load(path, mmap_mode="r", allow_pickle=False)
            yield np.array(mapped[start : start + ROWS])

    return MatrixFile(path=path, shape=shape, dtype=str(matrix.dtype), read=blocks)


def _open_npz(path: Path, key: str | None) -> MatrixFile:
    with zipfile.ZipFile(path) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
        name = f"{_only(path, names, key)}.npy"
        with archive.open(name) as stream:
            stored_shape, is_fortran, dtype = _npy_header(stream)
    shape = _shape(path, stored_shape, dtype)
    if is_fortran and min(shape) > 1:
        raise UserError(f"{path}: the array is in the order of columns; save a copy in C order")

    def blocks() -> Iterator[Block]:
        with zipfile.ZipFile(path) as archive, archive.open(name) as stream:
            _npy_header(stream)
            for start in range(0, shape[0], ROWS):
                rows = min(ROWS, shape[0] - start)
                size = rows * shape[1] * dtype.itemsize
                data = stream.read(size)
                if len(data) < size:
                    raise UserError(f"{path} ends within row {start}; copy it again")
                yield np.frombuffer(data, dtype).reshape(rows, shape[1])

    return MatrixFile(path=path, shape=shape, dtype=str(dtype), read=blocks)


def _npy_header(stream: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0
    if version != (1, 0):
        read = np.lib.format.read_array_header_2_0
    return read(stream)


def _open_parquet(path: Path, key: str | None) -> MatrixFile:
    with pq.ParquetFile(path) as file:
        schema, rows = file.schema_arrow, file.metadata.num_rows
        lists = [
            field.name
            for field in schema
            if pa.types.is_list(field.type)
            or pa.types.is_fixed_size_list(field.type)
            or pa.types.is_large_list(field.type)
        ]
        if key is None:
            key = next((name for name in _LIST_COLUMNS if name in lists), None)
        column = _only(path, lists, key)
        first = next(file.iter_batches(1, columns=[column]))[0][0].as_py() if rows else None
        identifier = next((name for name in ID_COLUMNS if name in schema.names), None)
        ids = None
        if identifier is not None:
            ids = [_text(value) for value in file.read([identifier])[identifier].to_pylist()]
    shape = _shape(path, (rows, len(first or ())), schema.field(column).type.value_type)

    def blocks() -> Iterator[Block]:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(ROWS, columns=[column]):
                lengths = set(batch[0].value_lengths().to_pylist())
                if lengths != {shape[1]}:
                    raise UserError(
                        f"{path}: the lists of {column!r} have different lengths; give every row"
                        f" {shape[1]} numbers"
                    )
                flat = batch[0].flatten().to_numpy(zero_copy_only=False)
                yield flat.reshape(len(batch), shape[1])

    kind = str(schema.field(column).type.value_type)
    return MatrixFile(path=path, shape=shape, dtype=kind, read=blocks, ids=ids)


def _open_safetensors(path: Path, key: str | None) -> MatrixFile:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        name = _only(path, list(file.keys()), key)
        tensor = file.get_slice(name)
        shape = _shape(path, tuple(tensor.get_shape()), file.get_slice(name)[:1].dtype)
        dtype = str(tensor[:1].dtype).removeprefix("torch.")

    def blocks() -> Iterator[Block]:
        for start in range(0, shape[0], ROWS):
            with safe_open(path, framework="pt") as file:
                yield _to_numpy(file.get_slice(name)[start : min(start + ROWS, shape[0])])

    return MatrixFile(path=path, shape=shape, dtype=dtype, read=blocks)


def _open_torch(path: Path, key: str | None) -> MatrixFile:
    matrix = _load_tensor(path, key)
    shape = _shape(path, tuple(matrix.shape), matrix.dtype)
    dtype = str(matrix.dtype).removeprefix("torch.")

    def blocks() -> Iterator[Block]:
        # Loaded again for each block, so that the mapped pages of the last one are given back.
        is_mapped = zipfile.is_zipfile(path)
        for start in range(0, shape[0], ROWS):
            tensor = _load_tensor(path, key) if is_mapped else matrix
            yield _to_numpy(tensor[start : start + ROWS].clone())

    return MatrixFile(path=path, shape=shape, dtype=dtype, read=blocks)


def _load_tensor(path: Path, key: str | None) -> Any:
    """Return the tensor of a file, mapped into memory if the file's format allows it."""
    import torch

    is_mapped = zipfile.is_zipfile(path)
    value = torch.load(path, map_location="cpu", weights_only=True, mmap=is_mapped)
    if isinstance(value, dict):
        tensors = {name: entry for name, entry in value.items() if torch.is_tensor(entry)}
        value = tensors[_only(path, list(tensors), key)]
    if not torch.is_tensor(value):
        raise UserError(f"{path} holds no tensor; save one by torch.save(tensor, {path.name!r})")
    return value


def _to_numpy(tensor: Any) -> Block:
    import torch

    block: Block = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).detach().numpy()
    return block


def _open_itememb(path: Path, key: str | None) -> MatrixFile:
    """Open RecBole's item embeddings: an id and the numbers of each item, separated by a tab."""
    ids: list[str] = []
    width = 0
    with path.open(encoding="utf-8") as stream:
        header = next(stream, "").rstrip("\n").split("\t")
        if len(header) != 2 or not header[1].endswith(":float_seq"):
            raise UserError(
                f"{path}, line 1: {' '.join(header)[:80]!r} is not NAME:token, tab,"
                " NAME:float_seq; correct the header"
            )
        for number, line in enumerate(stream, 2):
            item, _, numbers = line.rstrip("\n").partition("\t")
            ids.append(item)
            width = width or len(numbers.split())
            if len(numbers.split()) != width:
                raise UserError(f"{path}, line {number}: not {width} numbers; correct the line")

    def blocks() -> Iterator[Block]:
        with path.open(encoding="utf-8") as stream:
            next(stream)
            while lines := list(islice(stream, ROWS)):
                rows = [line.partition("\t")[2].split() for line in lines]
                try:
                    yield np.array(rows, dtype=np.float32)
                except ValueError as error:
                    raise _unreadable(path, error) from None

    shape = _shape(path, (len(ids), width), np.dtype(np.float32))
    return MatrixFile(path=path, shape=shape, dtype="text", read=blocks, ids=ids)


def _open_folder(path: Path) -> MatrixFile:
    """Open a folder with one ``ITEM_ID.npy`` for each item; each has D or 1 x D numbers."""
    files = sorted(path.glob("*.npy"))
    if not files:
        raise UserError(f"{path} holds no .npy file; give a folder of one ITEM_ID.npy an item")

    def load(file: Path) -> Block:
        try:
            vector: Block = np.load(file, allow_pickle=False).squeeze()
        except (ValueError, OSError, EOFError) as error:
            raise _unreadable(file, error) from None
        return vector

    first = load(files[0])
    shape = _shape(files[0], (len(files), *first.shape), first.dtype)

    def blocks() -> Iterator[Block]:
        for start in range(0, len(files), ROWS):
            vectors = []
            for file in files[start : start + ROWS]:
                vectors.append(load(file))
                if vectors[-1].shape != first.shape:
                    raise UserError(
                        f"{file} has shape {vectors[-1].shape} and {files[0].name} has"
                        f" {first.shape}; give all items vectors of one width"
                    )
            yield np.stack(vectors)

    return MatrixFile(
        path=path, shape=shape, dtype=str(first.dtype), read=blocks,
        ids=[file.stem for file in files],
    )  # fmt: skip


_READERS: dict[str, Callable[[Path, str | None], MatrixFile]] = {
    ".npy": _open_npy,
    ".npz": _open_npz,
    ".parquet": _open_parquet,
    ".safetensors": _open_safetensors,
    ".pt": _open_torch,
    ".pth": _open_torch,
    ".itememb": _open_itememb,
}


def read_ids(given: str) -> list[str]:
    """Read the item id of each row: lines of text, a ``.npy`` array, or a column of Parquet.

    Raises:
        UserError: The file does not exist or cannot be read, or has no column of ids.
    """
    path, key = Path(given), None
    if not path.exists() and "#" in given:
        name, _, key = given.rpartition("#")
        path = Path(name)
    try:
        if path.suffix.lower() == ".npy":
            return [_text(value) for value in np.load(path, allow_pickle=False).ravel().tolist()]
        if path.suffix.lower() == ".parquet":
            names = pq.read_schema(path).names
            column = key or next((name for name in ID_COLUMNS if name in names), None)
            if column not in names:
                raise UserError(f"{path} has no column of ids; name one by {path.name}#COLUMN")
            return [_text(value) for value in pq.read_table(path, columns=[column])[0].to_pylist()]
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        return [line.strip() for line in lines if line.strip()]
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give the file of item ids by --ids") from None
    except (ValueError, pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"{path} cannot be read as item ids ({reason}); write one id on each line"
        ) from None


def _text(value: Any) -> str:
    """Return an id as text; a whole float is an integer."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)
