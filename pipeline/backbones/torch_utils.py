"""What every backbone that runs in torch shares: device, arithmetic, fingerprint, padding."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from features.errors import UserError
from pipeline.backbones.base import TokenIds, Vectors

PROBE = "A título, IN CAPS: don't \u65e5\u672c 5x5 \U0001f3ac  end\n"
"""A text whose tokens tell tokenizers apart."""


def choose_backbone_device(device: str | None) -> torch.device:
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


def ready(model: torch.nn.Module, device: torch.device) -> None:
    """Freeze a model and move it to its device, its convolutions with the channels last.

    So a ResNet-50 takes a tenth less time on a CPU; a GPU's tensor cores want them so as well.
    """
    model.eval().requires_grad_(False).to(device).to(memory_format=torch.channels_last)


def batch_size(device: torch.device) -> int:
    """Inputs of a forward pass: a CPU gains nothing beyond some tens, a GPU wants hundreds."""
    return 32 if device.type == "cpu" else 256


@contextmanager
def forward(device: torch.device, compute: str) -> Iterator[None]:
    """Run without gradients, under autocast when the arithmetic is ``bfloat16``."""
    low = compute == "bfloat16"
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=low):
        yield


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Bring a batch to the device; to a GPU out of pinned memory, without waiting for it."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def pad(texts: Sequence[TokenIds], value: int, device: torch.device) -> torch.Tensor:
    """Stack token ids to (B, longest), filled up with ``value``."""
    ids_BT = np.full((len(texts), max(len(ids) for ids in texts)), value, dtype=np.int64)
    for row, ids in zip(ids_BT, texts, strict=True):
        row[: len(ids)] = ids
    return send(torch.from_numpy(ids_BT), device)


class _ReachedError(Exception):
    """Carries what a block has made out of a forward pass that is not wanted any further."""

    def __init__(self, output: torch.Tensor) -> None:
        super().__init__()
        self.output = output


def stop_after(block: torch.nn.Module, run: Callable[[], Any]) -> torch.Tensor:
    """Run a forward pass up to the end of one of its modules; give that module's output."""

    def leave(module: torch.nn.Module, given: Any, output: Any) -> None:
        raise _ReachedError(output[0] if isinstance(output, tuple) else output)

    hook = block.register_forward_hook(leave)
    try:
        run()
    except _ReachedError as reached:
        return reached.output
    finally:
        hook.remove()
    raise AssertionError("the forward pass does not reach this module")


def split(tokens_BTD: torch.Tensor, lengths: Sequence[int] | None = None) -> list[Vectors]:
    """Bring tokens home: (T, D) float32 for each input, its padding cut off; grids row by row."""
    if tokens_BTD.ndim == 4:  # planes of a convolution: (B, D, rows, columns)
        tokens_BTD = tokens_BTD.flatten(2).transpose(1, 2)
    home_BTD = to_numpy(tokens_BTD)
    ends = lengths or [home_BTD.shape[1]] * len(home_BTD)
    return [tokens_TD[:end] for tokens_TD, end in zip(home_BTD, ends, strict=True)]


def without_padding(ids: TokenIds, pad: int, *, ends: bool) -> int:
    """Count the tokens of a padded text.

    Args:
        ids: Of the text, then of its padding.
        pad: What it is padded with.
        ends: Whether that is the end mark too, as in SigLIP: then one of them is the text's.
    """
    real = np.flatnonzero(ids != pad)
    last = int(real[-1]) + 1 if len(real) else 0
    return max(1, min(last + ends, len(ids)))


def unit_mean(images_BD: torch.Tensor, texts_BD: torch.Tensor) -> torch.Tensor:
    """One vector of a picture and a text in one space: the mean of both at unit length."""
    normalize = torch.nn.functional.normalize
    return (normalize(images_BD.float(), dim=-1) + normalize(texts_BD.float(), dim=-1)) / 2


UNIT_MEAN = "mean of the picture's and the text's features, each of unit length"


def to_numpy(vectors_BD: torch.Tensor) -> Vectors:
    """Bring vectors home as float32."""
    return np.asarray(vectors_BD.float().cpu().numpy(), dtype=np.float32)
