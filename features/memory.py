"""Memory: recognise an error of any library that has run out of it, and check the limits first.

Libraries report the same fault in many ways, and some end with a segmentation fault where the
system refuses address space to their threads.
"""

import ctypes
import errno
import gc
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from features.errors import OutOfMemoryError, UserError

_NAMES = ("OutOfMemoryError", "OutOfMemoryException", "ArrowMemoryError")  # torch, DuckDB, Arrow
_PHRASES = (
    "out of memory",
    "not enough memory",
    "allocate memory",
    "bad_alloc",
    "bad allocation",
    "alloc_failed",
    "failed to map segment",
    "can't start new thread",
    "could not create a primitive",  # oneDNN
)
_MOST_REASON = 160  # characters of a library's message
_MIB = 2**20
_SPACE = 512 * _MIB
"""Address space in bytes that DuckDB and Arrow need besides their threads."""
_SPACE_PER_THREAD = 72 * _MIB  # a stack of 8 MiB and an arena of 64 MiB
_RESIDENT = 64 * _MIB  # memory that DuckDB and Arrow need for small tables
_STATM = Path("/proc/self/statm")
_LIMIT_FILES = {1: "memory.limit_in_bytes", 2: "memory.max"}  # by version of control groups
_USE_FILES = {1: "memory.usage_in_bytes", 2: "memory.current"}
_NO_LIMIT = 2**60  # version 1 writes a number of this size


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if a library or the system had no memory left. No library is imported."""
    if isinstance(error, OutOfMemoryError | MemoryError) or type(error).__name__ in _NAMES:
        return True
    if isinstance(error, UserError):
        return False
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    is_of_library = isinstance(error, RuntimeError | OSError | ImportError)
    is_of_library |= type(error).__name__ == "SafetensorError"
    text = str(error).lower()
    return is_of_library and any(phrase in text for phrase in _PHRASES)


@contextmanager
def memory_errors(place: str, remedy: str) -> Iterator[None]:
    """Turn any library's error about memory into one line, and free what the work had allocated.

    Args:
        place: The work that needed the memory, which begins the line.
        remedy: What reduces the memory that it needs.

    Raises:
        OutOfMemoryError: The body ran out of memory.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # their variables keep tensors alive
        free_memory()
        raise OutOfMemoryError(
            f"{place}: out of memory ({memory_reason(error)}); {remedy}"
        ) from None


def memory_reason(error: BaseException) -> str:
    """Return the message of an error in one line, or its type if it has none."""
    return " ".join(str(error).split())[:_MOST_REASON] or type(error).__name__


def trim_heap() -> None:
    """Return the free memory of the C library to the system.

    glibc keeps freed blocks that lie between blocks in use. With blocks of many sizes, such as the
    tensors of batches of different lengths, a process grows to several times what it uses. Other C
    libraries have no such function: then nothing is done.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def free_memory() -> None:
    """Release memory that nothing uses. torch is used only if it is imported already."""
    gc.collect()
    trim_heap()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def check_memory(place: str, needed: int = 0, root: Path = Path("/")) -> None:
    """Check that work fits under the limits of the process and of its control group.

    The limit of address space (``ulimit -v``) must leave room for the threads of DuckDB and Arrow.
    The limits of memory of containers and jobs are those of their control groups (cgroups). Without
    limits nothing is checked. Costs less than a millisecond.

    Args:
        place: The work that needs the memory, for the message.
        needed: Bytes that the work allocates besides the libraries.
        root: Folder that holds ``proc`` and ``sys``.

    Raises:
        OutOfMemoryError: Too little memory is left. The libraries would end in a segmentation
            fault, or the system would kill the process.
    """
    limit = _address_limit()
    if limit is not None:
        used = _pages(0)
        threads = _SPACE_PER_THREAD * (os.cpu_count() or 1)
        _check_left(
            place, limit, used, needed + _SPACE + threads,
            "address space", "raise the limit (ulimit -v), or remove it",
        )  # fmt: skip
    for limit, used in _group_limits(root):
        _check_left(
            place, limit, used, needed + _RESIDENT,
            "memory of the container or job", "raise its limit of memory, or end other programs",
        )  # fmt: skip


def _check_left(place: str, limit: int, used: int, needed: int, kind: str, remedy: str) -> None:
    if limit - used < needed:
        raise OutOfMemoryError(
            f"{place}: {max(0, limit - used) // _MIB:,} MiB of the {limit // _MIB:,} MiB of {kind}"
            f" are left, but {needed // _MIB:,} MiB are needed; {remedy}"
        )


def available_memory(root: Path = Path("/")) -> int:
    """Return the memory in bytes that new allocations can take without swapping.

    The limits of the process's control groups count. Where the system does not report its memory,
    and without limits, the result is the largest int64.

    Args:
        root: Folder that holds ``proc`` and ``sys``.
    """
    available = [max(0, limit - used) for limit, used in _group_limits(root)]
    for line in _read(root / "proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            available.append(int(value.split()[0]) * 1024)
    return min(available, default=sys.maxsize)


def resident_memory() -> int:
    """Return the bytes of memory that the process uses now; 0 if the system does not report it."""
    return _pages(1) if _STATM.exists() else 0


def format_size(size: float) -> str:
    """Return a size in bytes for people.

    Examples:
        >>> format_size(8_400_000_000), format_size(23_000_000), format_size(1000), format_size(0)
        ('8.4 GB', '23 MB', '1 KB', '0 MB')
    """
    if 0 < size < 5e5:
        return f"{max(size / 1e3, 1):,.0f} KB"
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.0f} MB"


def _pages(column: int) -> int:
    """Return a figure of the process in bytes: 0 its address space, 1 its resident memory."""
    return int(_STATM.read_text().split()[column]) * os.sysconf("SC_PAGE_SIZE")


def _address_limit() -> int | None:
    """Return the limit of the process's address space in bytes, or None if there is none."""
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if limit == resource.RLIM_INFINITY or not _STATM.exists() else limit


def _group_limits(root: Path) -> Iterator[tuple[int, int]]:
    """Yield limit and use in bytes of each control group of the process that has a limit.

    The cache of files counts as free, because the system drops it. In a container, the path of the
    group can be that of the host; the groups that are not visible are left out.
    """
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        version = 1 if controllers else 2
        base = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        group = base / path.strip("/")
        for folder in (group, *group.parents):
            limit = _read(folder / _LIMIT_FILES[version])
            if limit.strip().isdigit() and int(limit) < _NO_LIMIT:
                yield int(limit), _group_use(folder, version)
            if folder == base:
                break


def _group_use(folder: Path, version: int) -> int:
    """Return the bytes that a control group uses, without the cache of files."""
    prefix = "total_" if version == 1 else ""
    rows = (line.split() for line in _read(folder / "memory.stat").splitlines())
    caches = {f"{prefix}active_file", f"{prefix}inactive_file"}
    cache = sum(int(row[1]) for row in rows if row[0] in caches)
    return int(_read(folder / _USE_FILES[version]) or 0) - cache


def _read(path: Path) -> str:
    """Return the text of a file of the system; an empty text if it cannot be read."""
    try:
        return path.read_text()
    except OSError:
        return ""
