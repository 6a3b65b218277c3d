"""Whether weights can be had: in the hub's cache, over the network, or not at all.

Left alone, the hub's client tries each file for half a minute and prints each failure, so the hub
is asked for the repository once, with a bound, before anything is downloaded.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from features.errors import UserError
from pipeline.backbones.base import UnavailableError

PATIENCE = 5.0
"""Seconds for the hub to answer."""

_PREFIX = "models--"  # of a repository's folder in the cache
_SMALL = ["*.json", "*.txt", "*.model"]  # configurations and vocabularies
_SAFE = ["model.safetensors", "model-*.safetensors"]
_PICKLED = ["pytorch_model.bin", "pytorch_model-*.bin"]


def trouble(repository: str) -> str:
    """Why a repository cannot be downloaded here and now; empty when the hub offers it."""
    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    try:
        HfApi(endpoint=constants.ENDPOINT).model_info(repository, timeout=PATIENCE)
    except RepositoryNotFoundError:
        return f"{constants.ENDPOINT} has no such repository that is open to you"
    except HfHubHTTPError as error:
        return f"{constants.ENDPOINT} answers with the status {error.response.status_code}"
    except ValueError:
        return f"{constants.ENDPOINT} answers, but not as a hub does"
    except Exception:  # the client's classes of errors change with its HTTP library
        return f"{constants.ENDPOINT} does not answer"
    return ""


@contextmanager
def at_once(repositories: list[str]) -> Iterator[None]:
    """Let a library find small files in the cache, or not, without waiting for a silent hub."""
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or any(map(trouble, repositories))
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def cached(repository: str) -> bool:
    """Whether the cache holds weights of a repository; looks at file names only."""
    flat = repository.strip("/").replace("/", "--")
    return _holds(Path(constants.HF_HUB_CACHE) / f"{_PREFIX}{flat}")


def held() -> list[str]:
    """Name the repositories of which the cache holds weights."""
    folders = Path(constants.HF_HUB_CACHE).glob(f"{_PREFIX}*")
    names = (path.name.removeprefix(_PREFIX) for path in folders if _holds(path))
    return sorted(name.replace("--", "/", 1) for name in names)


def _holds(folder: Path) -> bool:
    kinds = ("*.safetensors", "*.bin", "*.pt", "*.pth")
    return any(
        path.exists()  # a snapshot is a link; a broken download leaves one without its target
        for kind in kinds
        for path in folder.glob(f"snapshots/*/{kind}")
    )


def torch_file(name: str) -> Path:
    """Where torch keeps a file of weights that torchvision downloads; torch is not imported."""
    caches = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    home = Path(os.environ.get("TORCH_HOME", caches / "torch")).expanduser()
    return home / "hub" / "checkpoints" / name


def folder(name: str, repository: str) -> Path:
    """Give the local copy of a transformers repository, fetched when it is not in the cache.

    Raises:
        UserError: It is neither in the cache nor to be had.
    """
    if cached(repository):
        return Path(snapshot_download(repository, local_files_only=True))
    require(name, repository, f"hub repository {repository}")
    try:
        fetched = Path(snapshot_download(repository, allow_patterns=[*_SMALL, *_SAFE]))
        if not cached(repository):
            snapshot_download(repository, allow_patterns=_PICKLED)  # read as weights only
    except Exception as error:
        raise _broken(name, repository, error) from None
    return fetched


def vocabulary(name: str, repository: str) -> Path:
    """Give the local copy of a repository's tokenizer, without any weights.

    Raises:
        UserError: It is neither in the cache nor to be had.
    """
    found = _vocabulary(repository)
    if found is not None:
        return found
    require(name, repository, f"the tokenizer of {repository}")
    try:
        return Path(snapshot_download(repository, allow_patterns=_SMALL))
    except Exception as error:
        raise _broken(name, repository, error) from None


def has_vocabulary(repository: str) -> bool:
    """Whether the cache holds a repository's tokenizer."""
    return _vocabulary(repository) is not None


def _vocabulary(repository: str) -> Path | None:
    for known in ("tokenizer.json", "vocab.txt"):
        found = try_to_load_from_cache(repository, known)
        if isinstance(found, str):
            return Path(found).parent
    return None


def _broken(name: str, repository: str, error: Exception) -> UserError:
    line = " ".join(str(error).split())[:160] or type(error).__name__
    return UserError(f"backbone {name!r}: no download of {repository} ({line})")


def require(name: str, repository: str, what: str) -> None:
    """Make sure that the hub offers what the cache does not hold.

    Raises:
        UnavailableError: It does not.
    """
    why = trouble(repository)
    if why:
        raise UnavailableError(
            f"backbone {name!r}: its weights ({what}) are not in the cache"
            f" ({constants.HF_HUB_CACHE}) and {why}; give a local folder"
        )
