"""Switch a module to evaluation mode for a block of code."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def dropout_disabled(module: nn.Module, disabled: bool = True) -> Iterator[None]:
    """Set evaluation mode, in which dropout changes nothing, and restore the mode at the end.

    Args:
        module: The module; the modes of its submodules change with it.
        disabled: If false, nothing changes.
    """
    was_training = module.training
    if not disabled or not was_training:
        yield
        return
    module.eval()
    try:
        yield
    finally:
        module.train()
