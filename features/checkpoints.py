"""What names the weights of a checkpoint, for whoever writes a table and whoever reads it."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_VOLATILE = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")


def stored_config(folder: Path) -> dict[str, Any]:
    """Read a transformers folder's ``config.json``, less what changes without changing anything."""
    stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return {key: value for key, value in stored.items() if key not in _VOLATILE}


def fingerprint(
    tensors: Mapping[str, Any], config: Mapping[str, Any], without: Sequence[str] = ()
) -> str:
    """Hash weights and configuration: the same in whatever file or folder they were stored.

    Args:
        tensors: Name -> torch tensor.
        config: What gives them their meaning.
        without: Names of weights that the checkpoint lacks: they are random, and not used.
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
