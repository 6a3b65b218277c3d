"""The DuckDB connection of a preparation: bounded memory, spilling to disk, errors of one line."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import duckdb
import pyarrow as pa

from features.atomic_files import database, is_out_of_space
from features.errors import UserError
from pipeline.datasets.importers.text_sql import install_text_functions

MEMORY_LIMIT = "2GB"  # of DuckDB; it spills to disk beyond this
_WRONG_STATEMENTS = (duckdb.ParserException, duckdb.BinderException, duckdb.CatalogException)
"""Errors of DuckDB that are faults of the program, not of its input."""


@contextmanager
def preparation_database(stage: Path, root: Path | str) -> Iterator[duckdb.DuckDBPyConnection]:
    """Open DuckDB in bounded memory; it spills into ``stage`` and loads no extensions.

    Args:
        stage: Temporary folder of the preparation.
        root: Folder of the raw files, for the message.

    Raises:
        UserError: There is not enough memory or disk space, or a raw file is damaged.
    """
    with database() as db:
        db.execute(f"SET memory_limit = '{MEMORY_LIMIT}'")
        db.execute(f"SET threads = {min(os.cpu_count() or 1, 8)}")
        db.execute("SET preserve_insertion_order = true")
        db.execute("SET autoinstall_known_extensions = false")
        db.execute("SET temp_directory = $spill", {"spill": str(stage / "spill")})
        install_text_functions(db)
        try:
            yield db
        except (duckdb.Error, pa.ArrowException) as error:
            reason = " ".join(str(error).split())[:160]
            if isinstance(error, _WRONG_STATEMENTS):
                raise
            if not is_out_of_space(error):
                raise UserError(
                    f"the raw files in {root} cannot be read ({reason}); copy them again"
                ) from None
            raise UserError(
                f"no room for preparing in {MEMORY_LIMIT} of memory and on the disk of"
                f" {stage.parent} ({reason}); free disk space or give another --warehouse; the"
                " earlier tables are unchanged"
            ) from None
