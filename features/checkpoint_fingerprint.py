"""Fingerprints of checkpoints, for extraction and for tuning blocks."""

import hashlib
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_VOLATILE = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")


def stored_config(folder: Path) -> dict[str, Any]:
    """Read ``config.json`` of a transformers folder, without entries that do not affect outputs."""
    stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return {key: value for key, value in stored.items() if key not in _VOLATILE}


def fingerprint(
    tensors: Mapping[str, Any], config: Mapping[str, Any], without: Sequence[str] = ()
) -> str:
    """Return a hash of weights and configuration that does not depend on their files.

    Args:
        tensors: Name -> torch tensor.
        config: Configuration of the model.
        without: Names of weights that the checkpoint lacks. They are random and not used.
    """
    import torch

    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    unset = set(without)
    for name, tensor in sorted(tensors.items()):
        if name in unset:
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence warnings, logs and progress bars of transformers; restore them at the end."""
    import transformers

    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(logging.ERROR)
    progress = transformers.logging.is_progress_bar_enabled()
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if progress:
            transformers.logging.enable_progress_bar()  # type: ignore[no-untyped-call]
