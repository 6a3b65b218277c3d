"""Copies of host tensors on the device, made without waiting for the device.

What needs the values of a batch, such as its distinct items, the lengths of its windows or the
predicted positions, is computed on the host, where the batch is cut. The device gets the results:
a training step never reads a tensor back.
"""

from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the host to a device without waiting; on the CPU return it unchanged."""
    if device.type == "cpu":
        return x
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceCopy:
    """Base class of dataclasses of tensors that remember the tensors on the host."""

    host: Self | None = None
    """The same values on the CPU; ``None`` if the tensors are on the CPU, or were made on the
    device."""

    def to(self, device: torch.device) -> Self:
        """Return the copy of tensors of the host on a device; on the CPU the tensors themselves."""
        if device.type == "cpu":
            return self
        copies: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                copies[field.name] = to_device(value, device)
            elif isinstance(value, DeviceCopy) and field.name != "host":
                copies[field.name] = value.to(device)
        return replace(self, host=self, **copies)

    @property
    def on_host(self) -> Self:
        """The values on the CPU. Without ``host``, tensors of a device are read, which waits."""
        if self.host is not None:
            return self.host
        copies: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor) and value.device.type != "cpu":
                copies[field.name] = value.cpu()
            elif isinstance(value, DeviceCopy):
                copies[field.name] = value.on_host
        return replace(self, **copies) if copies else self
