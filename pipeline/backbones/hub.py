"""Find the weights of a backbone in the hub's cache, or download them.

The hub's client would try each file for half a minute and print each failure. Hence the hub is
asked for the repository once, with a time limit, before anything is downloaded.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import (
    HfApi,
    constants,
    hf_hub_download,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
)

from features.errors import UserError
from pipeline.backbones.base import UnavailableError

PATIENCE = 5.0
"""Seconds for the hub to answer."""

_PREFIX = "models--"  # prefix of a repository's folder in the cache
_SMALL = ["*.json", "*.txt", "*.model"]  # configurations and vocabularies
_SAFE = ["model.safetensors", "model-*.safetensors"]
_MODULES = ["[0-9]_*/model.safetensors", "[0-9]_*/pytorch_model.bin"]  # of sentence-transformers
_PICKLED = ["pytorch_model.bin", "pytorch_model-*.bin"]


def reason_unavailable(repository: str) -> str:
    """Return why a repository cannot be downloaded now; empty if the hub offers it."""
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
def offline_unless_reachable(repositories: list[str]) -> Iterator[None]:
    """Keep a library from waiting for a hub that does not answer.

    The hub's client is set offline if one of the repositories cannot be downloaded: it then reads
    the cache only.
    """
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or any(map(reason_unavailable, repositories))
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def is_cached(repository: str) -> bool:
    """Return whether the cache has weights of a repository; only file names are read."""
    flat = repository.strip("/").replace("/", "--")
    return _has_weights(Path(constants.HF_HUB_CACHE) / f"{_PREFIX}{flat}")


def cached_repositories() -> list[str]:
    """Return the names of the repositories whose weights the cache has."""
    folders = Path(constants.HF_HUB_CACHE).glob(f"{_PREFIX}*")
    names = (path.name.removeprefix(_PREFIX) for path in folders if _has_weights(path))
    return sorted(name.replace("--", "/", 1) for name in names)


def _has_weights(folder: Path) -> bool:
    patterns = ("*.safetensors", "*.bin", "*.pt", "*.pth")
    return any(
        path.exists()  # a snapshot is a link; an interrupted download leaves one without target
        for pattern in patterns
        for path in folder.glob(f"snapshots/*/{pattern}")
    )


def torch_file(name: str) -> Path:
    """Return the path in torch's cache of weights that torchvision downloads, without torch."""
    caches = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    home = Path(os.environ.get("TORCH_HOME", caches / "torch")).expanduser()
    return home / "hub" / "checkpoints" / name


def folder(name: str, repository: str) -> Path:
    """Return the local folder of a transformers repository; download it if necessary.

    Args:
        name: Name of the backbone, for messages.
        repository: ``ORG/NAME`` on the hub.

    Raises:
        UserError: The repository is neither in the cache nor can it be downloaded.
    """
    if is_cached(repository):
        return Path(snapshot_download(repository, local_files_only=True))
    require(name, repository, f"hub repository {repository}")
    try:
        path = Path(snapshot_download(repository, allow_patterns=[*_SMALL, *_SAFE, *_MODULES]))
        if not is_cached(repository):
            snapshot_download(repository, allow_patterns=_PICKLED)  # read as weights only
    except Exception as error:
        raise _download_error(name, repository, error) from None
    return path


def file(name: str, repository: str, candidates: Sequence[str]) -> Path:
    """Return the local path of one file of a repository; download it if necessary.

    Args:
        name: Name of the backbone, for messages.
        repository: ``ORG/NAME`` on the hub.
        candidates: Names of files; the first that the repository has is taken.

    Raises:
        UserError: No file is in the cache or can be downloaded.
    """
    for candidate in candidates:
        path = try_to_load_from_cache(repository, candidate)
        if isinstance(path, str):
            return Path(path)
    require(name, repository, f"hub repository {repository}")
    error: Exception = FileNotFoundError(", ".join(candidates))
    for candidate in candidates:
        try:
            return Path(hf_hub_download(repository, candidate))
        except EntryNotFoundError as missing:
            error = missing
        except Exception as failed:
            raise _download_error(name, repository, failed) from None
    raise _download_error(name, repository, error)


def tokenizer_folder(name: str, repository: str) -> Path:
    """Return the local folder of a repository's tokenizer, without any weights.

    Args:
        name: Name of the backbone, for messages.
        repository: ``ORG/NAME`` on the hub.

    Raises:
        UserError: The tokenizer is neither in the cache nor can it be downloaded.
    """
    path = _cached_tokenizer(repository)
    if path is not None:
        return path
    require(name, repository, f"the tokenizer of {repository}")
    try:
        return Path(snapshot_download(repository, allow_patterns=_SMALL))
    except Exception as error:
        raise _download_error(name, repository, error) from None


def has_tokenizer(repository: str) -> bool:
    """Return whether the cache has a repository's tokenizer."""
    return _cached_tokenizer(repository) is not None


def _cached_tokenizer(repository: str) -> Path | None:
    for filename in ("tokenizer.json", "vocab.txt"):
        path = try_to_load_from_cache(repository, filename)
        if isinstance(path, str):
            return Path(path).parent
    return None


def _download_error(name: str, repository: str, error: Exception) -> UserError:
    line = " ".join(str(error).split())[:160] or type(error).__name__
    return UserError(f"backbone {name!r}: no download of {repository} ({line})")


def require(name: str, repository: str, content: str) -> None:
    """Check that the hub offers a repository that the cache lacks.

    Args:
        name: Name of the backbone, for messages.
        repository: ``ORG/NAME`` on the hub.
        content: Weights that are needed, for messages.

    Raises:
        UnavailableError: The hub does not offer it.
    """
    reason = reason_unavailable(repository)
    if reason:
        raise UnavailableError(
            f"backbone {name!r}: its weights ({content}) are not in the cache"
            f" ({constants.HF_HUB_CACHE}) and {reason}; give a local folder"
        )
