"""What is there: the machine, libraries, devices, decoders, weights and the warehouse.

Nothing here raises: whatever cannot be found out is a row that says why.
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
Found = tuple[str, bool, str]
Look = Callable[[], Iterable[Found]]
_LIBRARIES = {  # module: distribution
    "numpy": "numpy",
    "torch": "torch",
    "faiss": "faiss-cpu",
    "duckdb": "duckdb",
    "pyarrow": "pyarrow",
    "av": "av",
    "PIL": "pillow",
    "lmdb": "lmdb",
}
_SLOW = {  # seconds each: imported only when asked
    "torchvision": "torchvision",
    "transformers": "transformers",
    "open_clip": "open_clip_torch",
}
_EXTRAS = {"ray": "ray", "torchcodec": "torchcodec"}
_PICTURES = ("JPEG", "PNG", "GIF", "WEBP", "AVIF", "HEIF", "TIFF", "BMP", "JPEG2000")
_CLIPS = ("h264", "hevc", "vp8", "vp9", "av1", "mpeg4", "mpeg2video", "mjpeg", "prores", "gif")
_MEMORY = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One thing that was looked at."""

    part: str
    name: str
    there: bool
    says: str
    """Its version, size or place; of what is missing, why."""


def examine(warehouse: Path | None = None, *, thorough: bool = False) -> list[Row]:
    """Look at everything.

    Args:
        warehouse: The root; none: the one that commands would use.
        thorough: Import also the libraries that take seconds, instead of looking for them only.
    """
    looks: list[tuple[str, str, Look]] = [
        ("machine", "machine", _machine),
        ("libraries", "libraries", lambda: _libraries(thorough)),
        ("devices", "CUDA", _cuda),
        ("devices", "CPU in torch", _cpu),
        ("devices", "FAISS on GPU", _faiss),
        ("decoders", "pictures", _pictures),
        ("decoders", "clips", _clips),
        ("weights", "weights", _weights),
        ("warehouse", "root", lambda: _warehouse(warehouse)),
    ]
    rows = []
    for part, name, look in looks:
        try:
            for one, there, says in look():
                rows.append(Row(part=part, name=one, there=there, says=says))
        except Exception as error:  # what is broken must not hide the rest
            rows.append(Row(part=part, name=name, there=False, says=_line(error)))
    return rows


def _line(error: BaseException) -> str:
    said = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def _machine() -> Iterable[Found]:
    yield "python", True, f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    affinity = getattr(os, "sched_getaffinity", None)
    usable = len(affinity(0)) if affinity else os.cpu_count()
    yield "CPU threads", True, f"{usable} of {os.cpu_count()}"
    if not _MEMORY.is_file():
        return  # not on Linux
    total, free = (_kilobytes(key) * 1024 / GB for key in ("MemTotal", "MemAvailable"))
    bound = _CGROUP.read_text().strip() if _CGROUP.is_file() else "max"
    most = f", at most {int(bound) / GB:.1f} GB for this container" if bound.isdigit() else ""
    yield "memory", True, f"{total:.1f} GB, {free:.1f} GB of it free{most}"


def _kilobytes(key: str) -> int:
    lines = _MEMORY.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def _libraries(thorough: bool) -> Iterable[Found]:
    yield "mmrec", True, _version("mmrec")
    for module, distribution in (_LIBRARIES | _SLOW).items():
        if module in _SLOW and not thorough:
            yield _installed(module, distribution)
        else:
            yield _imported(module, distribution)
    for module, distribution in _EXTRAS.items():
        name, there, says = _installed(module, distribution)
        yield name, there, says if there else f"{says} (optional)"


def _imported(module: str, distribution: str) -> Found:
    try:
        found = importlib.import_module(module)
    except Exception as error:
        return module, False, f"cannot be imported ({_line(error)})"
    return module, True, str(getattr(found, "__version__", "")) or _version(distribution)


def _installed(module: str, distribution: str) -> Found:
    there = find_spec(module) is not None
    return module, there, _version(distribution) if there else "not installed"


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "of unknown version"


def _cuda() -> Iterable[Found]:
    import torch

    if torch.version.cuda is None:
        yield "CUDA", False, f"torch {torch.__version__} is built without it"
        return
    torch.cuda.init()  # raises where there is no driver or no device, and says which
    yield "CUDA", True, f"{torch.version.cuda}, {torch.cuda.device_count()} devices"
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        kind = torch.cuda.get_device_properties(index)
        bf16 = ", bf16" if kind.major >= 8 else ""
        said = f"{kind.name}, {total / GB:.1f} GB, {free / GB:.1f} GB free{bf16}"
        yield f"cuda:{index}", True, said


def _cpu() -> Iterable[Found]:
    import torch

    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.is_file() else set()
    bf16 = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in flags]
    kind = torch.backends.cpu.get_cpu_capability()
    fast = " and ".join(bf16) if bf16 else "without fast bf16"
    yield "CPU in torch", True, f"{torch.get_num_threads()} threads, {kind}, {fast}"


def _faiss() -> Iterable[Found]:
    import faiss

    if not hasattr(faiss, "StandardGpuResources"):
        yield "FAISS on GPU", False, "faiss is built without it"
        return
    count = faiss.get_num_gpus()
    yield "FAISS on GPU", count > 0, f"built with it, sees {count} GPUs"


def _pictures() -> Iterable[Found]:
    from PIL import Image, features

    Image.init()
    have = [kind for kind in _PICTURES if kind in Image.OPEN]
    lack = [kind for kind in _PICTURES if kind not in have]
    yield "pictures", True, " ".join(have) + (f"; not {' '.join(lack)}" if lack else "")
    turbo = bool(features.check("libjpeg_turbo"))
    says = f"{features.version('libjpeg_turbo')}" if turbo else "JPEGs are decoded more slowly"
    yield "libjpeg-turbo", turbo, says


def _clips() -> Iterable[Found]:
    import av

    have = [name for name in _CLIPS if _decodes(av, name)]
    lack = [name for name in _CLIPS if name not in have]
    yield "clips", bool(have), " ".join(have) + (f"; not {' '.join(lack)}" if lack else "")


def _decodes(av: Any, name: str) -> bool:
    try:
        av.codec.Codec(name, "r")
    except ValueError:  # PyAV's UnknownCodecError is one
        return False
    return True


def _weights() -> Iterable[Found]:
    from huggingface_hub import constants

    from pipeline.backbones import hub
    from pipeline.backbones.listing import list_backbones

    rows = list_backbones()
    ready = [row["name"] for row in rows if row["offline"]]
    yield "run offline", bool(ready), f"{len(ready)} of {len(rows)}: {' '.join(ready)}"
    yield "hub's cache", Path(constants.HF_HUB_CACHE).is_dir(), str(constants.HF_HUB_CACHE)
    held = hub.cached_repositories()
    yield "in it", bool(held), " ".join(held) or "no weights"
    torch_cache = hub.torch_file("any").parent
    yield "torch's cache", torch_cache.is_dir(), str(torch_cache)
    if constants.is_offline_mode():
        yield "network", False, "HF_HUB_OFFLINE is set: nothing is downloaded"


def _warehouse(root: Path | None) -> Iterable[Found]:
    from features.warehouse import Warehouse

    warehouse = Warehouse(root)
    path = warehouse.root.resolve()
    there = path.is_dir()
    yield "root", there, f"{path}{'' if there else ' (not there yet)'}"
    nearest = next(folder for folder in (path, *path.parents) if folder.is_dir())
    disk = shutil.disk_usage(nearest)
    yield "disk", True, f"{disk.free / GB:.1f} GB free of {disk.total / GB:.1f} GB"
    writable = os.access(nearest, os.W_OK)
    yield "writable", writable, "yes" if writable else f"{nearest} may not be written"
    yield (
        "datasets",
        bool(warehouse.datasets()),
        " ".join(warehouse.datasets()) or "none is prepared",
    )
