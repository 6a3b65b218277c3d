"""Whether weights can be had: in the hub's cache, over the network, or not at all.

Left alone, the hub's client tries five times and prints each failure, so the network is asked
once, with a bound, before anything is downloaded.
"""

from pathlib import Path

from huggingface_hub import constants, get_session, snapshot_download

from features.errors import UserError

PATIENCE = 5.0
"""Seconds for the hub to answer."""

_SMALL = ["*.json", "*.txt", "*.model"]  # configurations and vocabularies
_SAFE = ["model.safetensors", "model-*.safetensors"]
_PICKLED = ["pytorch_model.bin", "pytorch_model-*.bin"]


def reachable() -> bool:
    """Whether the hub answers within some seconds; never in offline mode (``HF_HUB_OFFLINE``)."""
    if constants.is_offline_mode():
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=PATIENCE)
    except Exception:  # the client's classes of errors change with its HTTP library
        return False
    return True


def cached(repository: str) -> bool:
    """Whether the cache holds weights of a repository; looks at file names only."""
    folder = Path(constants.HF_HUB_CACHE) / f"models--{repository.strip('/').replace('/', '--')}"
    kinds = ("*.safetensors", "*.bin", "*.pt", "*.pth")
    return any(
        path.exists()  # a snapshot is a link; a broken download leaves one without its target
        for kind in kinds
        for path in folder.glob(f"snapshots/*/{kind}")
    )


def folder(name: str, repository: str) -> Path:
    """Give the local copy of a transformers repository, fetched when it is not in the cache.

    Raises:
        UserError: It is neither in the cache nor to be had.
    """
    if cached(repository):
        return Path(snapshot_download(repository, local_files_only=True))
    if not reachable():
        raise unavailable(name, f"hub repository {repository}")
    try:
        fetched = Path(snapshot_download(repository, allow_patterns=[*_SMALL, *_SAFE]))
        if not cached(repository):
            snapshot_download(repository, allow_patterns=_PICKLED)  # read as weights only
    except Exception as error:
        line = str(error).strip().splitlines()[0][:160]
        raise UserError(f"backbone {name!r}: no download of {repository} ({line})") from None
    return fetched


def unavailable(name: str, what: str) -> UserError:
    """Build the error for weights that are neither here nor reachable."""
    offline = constants.is_offline_mode()
    why = "HF_HUB_OFFLINE is set" if offline else f"{constants.ENDPOINT} does not answer"
    return UserError(
        f"backbone {name!r}: its weights ({what}) are not in the cache"
        f" ({constants.HF_HUB_CACHE}) and {why}; offline works: --image hashed --text hashed,"
        " or the folder of a local checkpoint as backbone"
    )
