"""The one place that chooses between a plain form and its CPU kernel.

An operator in this package is a function in its plain form, written with torch's operators, and a
kernel that computes the same values faster on a CPU. :func:`with_cpu_kernel` joins the two.
"""

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Concatenate, ParamSpec

import torch
from torch import Tensor

P = ParamSpec("P")
Operator = Callable[Concatenate[Tensor, P], Tensor]

_kernels_enabled = os.environ.get("MMREC_KERNELS", "on") != "off"


def use_kernels(x: Tensor) -> bool:
    """Return whether operators run their CPU kernel on ``x``.

    They do on a CPU, unless autocast is on, ``torch.compile`` traces the call (it fuses operators
    itself), the environment variable ``MMREC_KERNELS`` is ``off``, or the call is made inside
    :func:`plain_forms`.
    """
    device = x.device.type
    return (
        _kernels_enabled
        and device == "cpu"
        and not torch.is_autocast_enabled(device)
        and not torch.compiler.is_compiling()
    )


@contextmanager
def plain_forms() -> Iterator[None]:
    """Run every operator in its plain form inside the context."""
    global _kernels_enabled
    before, _kernels_enabled = _kernels_enabled, False
    try:
        yield
    finally:
        _kernels_enabled = before


def with_cpu_kernel(kernel: Operator[P]) -> Callable[[Operator[P]], Operator[P]]:
    """Decorate a plain form so that ``kernel`` replaces it where :func:`use_kernels` is true.

    Args:
        kernel: Takes the same arguments as the plain form. Its values and gradients are equal to
            those of the plain form up to rounding; random masks are drawn in another way.
    """

    def decorate(plain: Operator[P]) -> Operator[P]:
        def operator(x: Tensor, /, *args: P.args, **kwargs: P.kwargs) -> Tensor:
            chosen = kernel if use_kernels(x) else plain
            return chosen(x, *args, **kwargs)

        functools.update_wrapper(operator, plain)
        return operator

    return decorate
