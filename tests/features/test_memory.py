"""Errors about memory of every library are one line, and a small address space is refused early."""

import errno
import platform
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
from features.memory import available_memory, check_memory, is_out_of_memory, memory_errors


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


MIB = 2**20
GROUPS = {
    "version 2": ("0::/job/step\n", "sys/fs/cgroup/job/step", "memory.max", "memory.current", ""),
    "version 2, group above": (
        "0::/job/step\n", "sys/fs/cgroup/job", "memory.max", "memory.current", "",
    ),
    "version 2, container": ("0::/\n", "sys/fs/cgroup", "memory.max", "memory.current", ""),
    "version 1": (
        "9:name=systemd:/\n4:memory:/job\n0::/\n", "sys/fs/cgroup/memory/job",
        "memory.limit_in_bytes", "memory.usage_in_bytes", "total_",
    ),
    "version 1, path of the host": (
        "4:cpu,memory:/docker/0a1b\n", "sys/fs/cgroup/memory",
        "memory.limit_in_bytes", "memory.usage_in_bytes", "total_",
    ),
}  # fmt: skip


def group(root: Path, kind: str, limit: str, used: int, cache: int = 0) -> Path:
    """Write the files of a control group below ``root``."""
    line, place, limit_file, use_file, prefix = GROUPS[kind]
    folder = root / place
    folder.mkdir(parents=True)
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(line)
    (folder / limit_file).write_text(f"{limit}\n")
    (folder / use_file).write_text(f"{used}\n")
    stat = f"{prefix}inactive_file {cache // 2}\n{prefix}active_file {cache - cache // 2}\nanon 7\n"
    (folder / "memory.stat").write_text(stat)
    return root


@pytest.mark.parametrize("kind", GROUPS)
def test_the_limit_of_a_control_group_is_checked_first(kind: str, tmp_path: Path) -> None:
    root = group(tmp_path, kind, str(1000 * MIB), 800 * MIB)
    check_memory("reading x", 100 * MIB, root)
    line = r"^reading x: 200 MiB of the 1,000 MiB of memory of .+, but 264 MiB are needed; raise"
    with pytest.raises(OutOfMemoryError, match=line):
        check_memory("reading x", 200 * MIB, root)


@pytest.mark.parametrize("kind", GROUPS)
def test_the_cache_of_files_is_free(kind: str, tmp_path: Path) -> None:
    root = group(tmp_path, kind, str(1000 * MIB), 990 * MIB, cache=500 * MIB)
    check_memory("reading x", 400 * MIB, root)
    assert available_memory(root) == 510 * MIB
    (root / "proc/meminfo").write_text("MemTotal: 999 kB\nMemAvailable: 99 kB\n")
    assert available_memory(root) == 99 * 1024


@pytest.mark.parametrize("limit", ["max", str(2**63 - 4096), ""])
def test_without_a_limit_nothing_is_refused(limit: str, tmp_path: Path) -> None:
    kind = "version 2" if limit == "max" else "version 1"
    check_memory("reading x", 2**50, group(tmp_path, kind, limit, 990 * MIB))
    check_memory("reading x", 2**50, tmp_path / "no system files")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps free memory")
def test_free_memory_goes_back_to_the_system() -> None:
    """In another process, whose memory nothing else uses: 300 MB in blocks, every 20th stays."""
    code = (
        "from features.memory import trim_heap\n"
        "def used(): return int(open('/proc/self/statm').read().split()[1]) * 4096\n"
        "blocks = [bytearray(100_000) for _ in range(3000)]\n"
        "kept = blocks[::20]\n"
        "del blocks\n"
        "before = used()\n"
        "trim_heap()\n"
        "print(before - used(), len(kept))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert int(done.stdout.split()[0]) > 100e6
