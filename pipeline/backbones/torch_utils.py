"""Helpers of the backbones that run in torch: device, arithmetic, padding, conversion.

Legend: B inputs of a batch, T tokens of an input, D width of a token or vector.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from features.errors import UserError
from pipeline.backbones.base import TokenIds, Vectors
from pipeline.media.errors import one_line

PROBE = "A título, IN CAPS: don't \u65e5\u672c 5x5 \U0001f3ac  end\n"
"""A text that two tokenizers rarely split alike: its tokens identify the tokenizer."""


def choose_backbone_device(device: str | None) -> torch.device:
    """Return the given device; without one a CUDA device if there is one, else the CPU.

    Raises:
        UserError: torch has no such device on this machine.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        line = str(error).splitlines()[0]
        raise UserError(
            f"device {device!r} cannot be used here ({line}); give --device cpu"
        ) from None
    return chosen


def freeze(model: torch.nn.Module, device: torch.device) -> None:
    """Freeze a model and move it to a device, with the channels of its convolutions last.

    This order makes a ResNet-50 10% faster on a CPU, and suits the tensor cores of a GPU.
    """
    model.eval().requires_grad_(False).to(device).to(memory_format=torch.channels_last)


@contextmanager
def loading(name: str, library: str, location: Path) -> Iterator[None]:
    """Turn any error of a library that loads a checkpoint into one line.

    Args:
        name: Name of the backbone, for the message.
        library: Name of the library, for the message.
        location: Folder or file of the checkpoint, for the message.

    Raises:
        UserError: The checkpoint cannot be loaded.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # a damaged checkpoint can raise any error
        raise UserError(
            f"backbone {name!r}: {library} cannot load {location} ({one_line(error)})"
        ) from None


def short_hash(*values: Any) -> str:
    """Return a hash of values that JSON can express: 8 hexadecimal digits."""
    document = json.dumps(values, sort_keys=True)
    return hashlib.sha256(document.encode()).hexdigest()[:8]


def batch_size(device: torch.device) -> int:
    """Return the number of inputs of a forward pass that suits the device."""
    return 32 if device.type == "cpu" else 256  # a CPU gains nothing from larger batches


@contextmanager
def forward(device: torch.device, compute: str) -> Iterator[None]:
    """Run without gradients, under autocast if ``compute`` is ``bfloat16``."""
    is_bfloat16 = compute == "bfloat16"
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=is_bfloat16):
        yield


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a batch to the device; to a GPU from pinned memory, without waiting for the copy."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def pad(texts: Sequence[TokenIds], value: int, device: torch.device) -> torch.Tensor:
    """Stack token ids to (B, longest), padded with ``value``."""
    ids_BT = np.full((len(texts), max(len(ids) for ids in texts)), value, dtype=np.int64)
    for row, ids in zip(ids_BT, texts, strict=True):
        row[: len(ids)] = ids
    return send(torch.from_numpy(ids_BT), device)


def split(tokens_BTD: torch.Tensor, lengths: Sequence[int] | None = None) -> list[Vectors]:
    """Copy tokens to the host and cut their padding off.

    Args:
        tokens_BTD: Hidden states, or the grid (B, D, rows, columns) of a convolution.
        lengths: Number of tokens of each input; None keeps all.

    Returns:
        (T, D) float32 for each input; the cells of a grid row by row.
    """
    if tokens_BTD.ndim == 4:
        tokens_BTD = tokens_BTD.flatten(2).transpose(1, 2)
    vectors_BTD = to_numpy(tokens_BTD)
    ends = lengths or [vectors_BTD.shape[1]] * len(vectors_BTD)
    return [tokens_TD[:end] for tokens_TD, end in zip(vectors_BTD, ends, strict=True)]


def without_padding(ids: TokenIds, pad: int, *, ends: bool) -> int:
    """Return the number of tokens of a padded text.

    Args:
        ids: Ids of the text, followed by those of its padding.
        pad: Id of the padding.
        ends: Whether the padding's id is that of the end mark too, as in SigLIP. The first of
            these ids then belongs to the text.
    """
    positions = np.flatnonzero(ids != pad)
    last = int(positions[-1]) + 1 if len(positions) else 0
    return max(1, min(last + ends, len(ids)))


def unit_mean(images_BD: torch.Tensor, texts_BD: torch.Tensor) -> torch.Tensor:
    """Return the mean of the vectors of images and texts in one space, each at unit length."""
    normalize = torch.nn.functional.normalize
    return (normalize(images_BD.float(), dim=-1) + normalize(texts_BD.float(), dim=-1)) / 2


def to_numpy(vectors_BD: torch.Tensor) -> Vectors:
    """Copy vectors to the host as float32."""
    return np.asarray(vectors_BD.float().cpu().numpy(), dtype=np.float32)
