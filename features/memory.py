"""Memory: recognise an error of any library that has run out of it, and check the limit first.

Libraries report the same fault in many ways, and some end with a segmentation fault where the
system refuses address space to their threads.
"""

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
_STATM = Path("/proc/self/statm")
_MEMINFO = Path("/proc/meminfo")


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


def free_memory() -> None:
    """Release memory that nothing uses. torch is used only if it is imported already."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def check_address_space(place: str) -> None:
    """Check that DuckDB and Arrow can start their threads under the limit of the process.

    Without a limit (``ulimit -v``) nothing is checked. Costs a few microseconds.

    Args:
        place: The work that needs the memory, for the message.

    Raises:
        OutOfMemoryError: Too little address space is left. The libraries would end in a
            segmentation fault.
    """
    limit = _address_limit()
    if limit is None:
        return
    used = int(_STATM.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    needed = _SPACE + _SPACE_PER_THREAD * (os.cpu_count() or 1)
    if limit - used < needed:
        raise OutOfMemoryError(
            f"{place}: {max(0, limit - used) // _MIB:,} MiB of the {limit // _MIB:,} MiB of address"
            f" space are left, but {needed // _MIB:,} MiB are needed; raise the limit (ulimit -v),"
            " or remove it"
        )


def available_memory() -> int:
    """Return the memory in bytes that new allocations can take without swapping.

    Where the system does not report it, the result is the largest int64.
    """
    try:
        for line in _MEMINFO.read_text().splitlines():
            name, _, value = line.partition(":")
            if name == "MemAvailable":
                return int(value.split()[0]) * 1024
    except OSError:
        pass
    return sys.maxsize


def _address_limit() -> int | None:
    """Return the limit of the process's address space in bytes, or None if there is none."""
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if limit == resource.RLIM_INFINITY or not _STATM.exists() else limit
