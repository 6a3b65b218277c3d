"""Examine the installation: machine, libraries, devices, decoders, weights and the warehouse.

Nothing here raises: an examination that fails becomes a row with the reason.
"""

import importlib
import os
import platform
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

GB = 1e9
Finding = tuple[str, bool, str]
"""Name, whether it is available, and the detail of a row."""
Examination = Callable[[], Iterable[Finding]]
_LIBRARIES = {  # module: distribution
    "numpy": "numpy",
    "torch": "torch",
    "faiss": "faiss-cpu",
    "duckdb": "duckdb",
    "pyarrow": "pyarrow",
    "av": "av",
    "PIL": "pillow",
}
_SLOW = {  # take seconds each: imported only with ``thorough``
    "torchvision": "torchvision",
    "transformers": "transformers",
    "open_clip": "open_clip_torch",
}
_EXTRAS = {
    "ray": "ray",
    "sentence_transformers": "sentence-transformers",
    "torchcodec": "torchcodec",
}
_IMAGE_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "AVIF", "HEIF", "TIFF", "BMP", "JPEG2000")
_VIDEO_CODECS = (
    "h264",
    "hevc",
    "vp8",
    "vp9",
    "av1",
    "mpeg4",
    "mpeg2video",
    "mjpeg",
    "prores",
    "gif",
)
_MEMORY = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One result of the examination."""

    part: str
    name: str
    available: bool
    detail: str
    """Version, size or location; for something missing, the reason."""


def examine(warehouse: Path | None = None, *, thorough: bool = False) -> list[Row]:
    """Examine the installation.

    Args:
        warehouse: Root of the warehouse; None takes the one that commands use.
        thorough: Import the libraries that take seconds too, instead of only finding them.

    Returns:
        One row for each result, the rows of a part together.
    """
    examinations: list[tuple[str, str, Examination]] = [
        ("machine", "machine", _machine),
        ("libraries", "libraries", lambda: _libraries(thorough)),
        ("devices", "CUDA", _cuda),
        ("devices", "CPU in torch", _cpu),
        ("devices", "FAISS on GPU", _faiss),
        ("decoders", "images", _images),
        ("decoders", "videos", _videos),
        ("weights", "weights", _weights),
        ("warehouse", "root", lambda: _warehouse(warehouse)),
    ]
    rows = []
    for part, part_name, examination in examinations:
        try:
            for name, available, detail in examination():
                rows.append(Row(part=part, name=name, available=available, detail=detail))
        except Exception as error:  # a failure must not hide the other parts
            rows.append(Row(part=part, name=part_name, available=False, detail=_line(error)))
    return rows


def _line(error: BaseException) -> str:
    message = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def _machine() -> Iterable[Finding]:
    yield "python", True, f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    affinity = getattr(os, "sched_getaffinity", None)
    usable = len(affinity(0)) if affinity else os.cpu_count()
    yield "CPU threads", True, f"{usable} of {os.cpu_count()}"
    if not _MEMORY.is_file():
        return  # not on Linux
    total, free = (_kilobytes(key) * 1024 / GB for key in ("MemTotal", "MemAvailable"))
    limit = _CGROUP.read_text().strip() if _CGROUP.is_file() else "max"
    bound = f", at most {int(limit) / GB:.1f} GB for this container" if limit.isdigit() else ""
    yield "memory", True, f"{total:.1f} GB, {free:.1f} GB of it free{bound}"


def _kilobytes(key: str) -> int:
    lines = _MEMORY.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def _libraries(thorough: bool) -> Iterable[Finding]:
    yield "mmrec", True, _version("mmrec")
    for module, distribution in (_LIBRARIES | _SLOW).items():
        if module in _SLOW and not thorough:
            yield _installed(module, distribution)
        else:
            yield _imported(module, distribution)
    for module, distribution in _EXTRAS.items():
        name, available, detail = _installed(module, distribution)
        yield name, available, detail if available else f"{detail} (optional)"


def _imported(module: str, distribution: str) -> Finding:
    try:
        imported = importlib.import_module(module)
    except Exception as error:
        return module, False, f"cannot be imported ({_line(error)})"
    return module, True, str(getattr(imported, "__version__", "")) or _version(distribution)


def _installed(module: str, distribution: str) -> Finding:
    available = find_spec(module) is not None
    return module, available, _version(distribution) if available else "not installed"


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "of unknown version"


def _cuda() -> Iterable[Finding]:
    import torch

    if torch.version.cuda is None:
        yield "CUDA", False, f"torch {torch.__version__} is built without it"
        return
    torch.cuda.init()  # raises with the reason if there is no driver or no device
    yield "CUDA", True, f"{torch.version.cuda}, {torch.cuda.device_count()} devices"
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        kind = torch.cuda.get_device_properties(index)
        bf16 = ", bf16" if kind.major >= 8 else ""
        yield (
            f"cuda:{index}",
            True,
            f"{kind.name}, {total / GB:.1f} GB, {free / GB:.1f} GB free{bf16}",
        )


def _cpu() -> Iterable[Finding]:
    import torch

    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.is_file() else set()
    bf16 = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in flags]
    kind = torch.backends.cpu.get_cpu_capability()
    fast = " and ".join(bf16) if bf16 else "without fast bf16"
    yield "CPU in torch", True, f"{torch.get_num_threads()} threads, {kind}, {fast}"


def _faiss() -> Iterable[Finding]:
    import faiss

    if not hasattr(faiss, "StandardGpuResources"):
        yield "FAISS on GPU", False, "faiss is built without it"
        return
    count = faiss.get_num_gpus()
    yield "FAISS on GPU", count > 0, f"built with it, sees {count} GPUs"


def _images() -> Iterable[Finding]:
    from PIL import Image, features

    Image.init()
    have = [kind for kind in _IMAGE_FORMATS if kind in Image.OPEN]
    lack = [kind for kind in _IMAGE_FORMATS if kind not in have]
    yield "images", True, " ".join(have) + (f"; not {' '.join(lack)}" if lack else "")
    turbo = bool(features.check("libjpeg_turbo"))
    detail = f"{features.version('libjpeg_turbo')}" if turbo else "JPEGs are decoded more slowly"
    yield "libjpeg-turbo", turbo, detail


def _videos() -> Iterable[Finding]:
    import av

    have = [name for name in _VIDEO_CODECS if _decodes(av, name)]
    lack = [name for name in _VIDEO_CODECS if name not in have]
    yield "videos", bool(have), " ".join(have) + (f"; not {' '.join(lack)}" if lack else "")


def _decodes(av: Any, name: str) -> bool:
    try:
        av.codec.Codec(name, "r")
    except ValueError:  # PyAV's UnknownCodecError is one
        return False
    return True


def _weights() -> Iterable[Finding]:
    from huggingface_hub import constants

    from pipeline.backbones import hub
    from pipeline.backbones.listing import list_backbones

    rows = list_backbones()
    ready = [row["name"] for row in rows if row["offline"]]
    yield "run offline", bool(ready), f"{len(ready)} of {len(rows)}: {' '.join(ready)}"
    yield "hub's cache", Path(constants.HF_HUB_CACHE).is_dir(), str(constants.HF_HUB_CACHE)
    cached = hub.cached_repositories()
    yield "in it", bool(cached), " ".join(cached) or "no weights"
    torch_cache = hub.torch_file("any").parent
    yield "torch's cache", torch_cache.is_dir(), str(torch_cache)
    if constants.is_offline_mode():
        yield "network", False, "HF_HUB_OFFLINE is set: nothing is downloaded"


def _warehouse(root: Path | None) -> Iterable[Finding]:
    from features.warehouse import Warehouse

    warehouse = Warehouse(root)
    path = warehouse.root.resolve()
    exists = path.is_dir()
    yield "root", exists, f"{path}{'' if exists else ' (does not exist yet)'}"
    nearest = next(folder for folder in (path, *path.parents) if folder.is_dir())
    disk = shutil.disk_usage(nearest)
    yield "disk", True, f"{disk.free / GB:.1f} GB free of {disk.total / GB:.1f} GB"
    writable = os.access(nearest, os.W_OK)
    yield "writable", writable, "yes" if writable else f"no permission to write to {nearest}"
    yield (
        "datasets",
        bool(warehouse.datasets()),
        " ".join(warehouse.datasets()) or "none is prepared",
    )
