"""What every backbone that runs in torch shares: device, arithmetic, fingerprint, padding."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from features.errors import UserError
from pipeline.backends.contract import Tokens, Vectors


def choose_device(device: str | None) -> torch.device:
    """Take the device asked for, else a CUDA device, else the CPU.

    Raises:
        UserError: torch has no such device here.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        line = str(error).splitlines()[0]
        raise UserError(f"device {device!r} cannot be used here ({line}); try cpu") from None
    return chosen


def fingerprint(model: torch.nn.Module, config: dict[str, Any]) -> str:
    """Hash weights and configuration: the same in whatever file or folder they were stored."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def ready(model: torch.nn.Module, device: torch.device) -> None:
    """Freeze a model and move it to its device."""
    model.eval().requires_grad_(False).to(device)


def batch_size(device: torch.device) -> int:
    """Inputs of a forward pass: a CPU gains nothing beyond some tens, a GPU wants hundreds."""
    return 32 if device.type == "cpu" else 256


@contextmanager
def forward(device: torch.device, compute: str) -> Iterator[None]:
    """Run without gradients, under autocast when the arithmetic is ``bfloat16``."""
    low = compute == "bfloat16"
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=low):
        yield


def pad(texts: Sequence[Tokens], value: int, device: torch.device) -> torch.Tensor:
    """Stack token ids to (B, longest), filled up with ``value``."""
    ids_BT = np.full((len(texts), max(len(ids) for ids in texts)), value, dtype=np.int64)
    for row, ids in zip(ids_BT, texts, strict=True):
        row[: len(ids)] = ids
    return torch.from_numpy(ids_BT).to(device)


def to_numpy(vectors_BD: torch.Tensor) -> Vectors:
    """Bring vectors home as float32."""
    return np.asarray(vectors_BD.float().cpu().numpy(), dtype=np.float32)
