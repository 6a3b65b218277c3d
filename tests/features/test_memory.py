"""Errors about memory of every library are one line, and a small address space is refused early."""

import errno
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pytest
import torch

from features.errors import OutOfMemoryError, UserError
from features.memory import is_out_of_memory, memory_errors


def _torch() -> None:
    torch.empty(2**50)


def _numpy() -> None:
    np.zeros(2**50)


def _python() -> None:
    bytearray(2**60)


def _duckdb() -> None:
    with duckdb.connect() as db:
        db.execute("SET memory_limit = '1MB'; SET max_temp_directory_size = '0B'")
        db.execute("CREATE TABLE t AS SELECT range, hash(range) FROM range(10000000)")


def _arrow() -> None:
    pa.allocate_buffer(2**50)


def _raise(error: Exception) -> None:
    raise error


ERRORS: dict[str, Callable[[], None]] = {
    "torch": _torch,
    "numpy": _numpy,
    "python": _python,
    "duckdb": _duckdb,
    "arrow": _arrow,
    "cuda": lambda: _raise(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")),
    "cublas": lambda: _raise(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")),
    "faiss": lambda: _raise(RuntimeError("std::bad_alloc")),
    "map": lambda: _raise(OSError(errno.ENOMEM, "Cannot allocate memory")),
    "thread": lambda: _raise(RuntimeError("can't start new thread")),
    "import": lambda: _raise(ImportError("libx.so: failed to map segment from shared object")),
}


@pytest.mark.parametrize("library", ERRORS)
def test_an_error_of_any_library_is_one_line_with_place_and_remedy(library: str) -> None:
    with (
        pytest.raises(OutOfMemoryError, match=r"^the step: out of memory \(.+\); halve it$") as e,
        memory_errors("the step", "halve it"),
    ):
        ERRORS[library]()
    assert "\n" not in str(e.value)
    assert e.value.exit_code == 1


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes differ"), UserError("out of memory"), KeyError("memory")]
)
def test_other_errors_are_not_changed(error: Exception) -> None:
    assert not is_out_of_memory(error)
    with pytest.raises(type(error)) as e, memory_errors("the step", "halve it"):
        raise error
    assert e.value is error


def test_the_variables_of_the_failed_work_are_freed() -> None:
    def work() -> None:
        kept = np.ones(10**6)
        raise MemoryError(f"{kept.nbytes}")

    tracemalloc.start()
    with pytest.raises(OutOfMemoryError), memory_errors("the step", "halve it"):
        work()
    assert tracemalloc.get_traced_memory()[0] < 4 * 10**6
    tracemalloc.stop()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the limit of address space is Linux's")
@pytest.mark.parametrize("megabytes", [300, 420, 580, 640])
def test_a_small_address_space_ends_a_query_in_one_line(megabytes: int, tmp_path: Path) -> None:
    limit = f"({megabytes} << 20, {megabytes} << 20)"
    code = f"import resource; resource.setrlimit(resource.RLIMIT_AS, {limit})"
    code += "; from cli.app import main; main()"
    (tmp_path / "runs").mkdir()
    root = ["--warehouse", str(tmp_path)]
    command = [sys.executable, "-c", code, "sql", "SELECT count(*) FROM range(1000000)", *root]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1, (result.returncode, result.stderr)
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
