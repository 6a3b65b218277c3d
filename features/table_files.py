"""Tables for other programs: one Parquet, CSV or JSON Lines file, by the ending of its name."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pa_csv

from features.atomic_files import atomic_write, parquet_writer
from features.errors import UserError

_ROWS_AT_ONCE = 4096  # rows that are Python objects at once
ENDINGS = (".parquet", ".csv", ".jsonl")
"""Endings of the formats, in lower case; a name may have capitals."""


def check_ending(path: Path) -> None:
    """Check that the ending of a file's name is one of :data:`ENDINGS`.

    Raises:
        UserError: The name has another ending, or none.
    """
    if path.suffix.lower() not in ENDINGS:
        raise UserError(f"--out {path} is not a known format; end it in {', '.join(ENDINGS)}")


@contextmanager
def table_file_writer(path: Path, schema: pa.Schema) -> Iterator[Callable[[pa.Table], object]]:
    """Yield the function that adds rows to a file, which is complete on success, else absent.

    Args:
        path: The file; CSV or JSON Lines if it ends in ``.csv`` or ``.jsonl``, else Parquet. Each
            added table is a row group of Parquet.
        schema: Columns of the file.
    """
    ending = path.suffix.lower()
    if ending == ".csv":
        with atomic_write(path) as temporary, pa_csv.CSVWriter(temporary, schema) as csv_writer:
            yield csv_writer.write_table
    elif ending == ".jsonl":
        with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
            yield lambda rows: stream.writelines(
                json.dumps(row, ensure_ascii=False) + "\n"
                for batch in rows.to_batches(max_chunksize=_ROWS_AT_ONCE)
                for row in batch.to_pylist()
            )
    else:
        with parquet_writer(path, schema, compression="zstd") as writer:
            yield writer.write_table
