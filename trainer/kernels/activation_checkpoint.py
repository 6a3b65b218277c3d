"""Selective activation checkpointing: keep matrix products, recompute what is element-wise."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

_SAVED = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
_contexts = functools.partial(create_selective_checkpoint_contexts, _SAVED)


def checkpoint_elementwise(run: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Return ``run(*inputs)`` and keep only the outputs of its linear layers for the backward pass.

    The backward pass recomputes all other operators, with the same random numbers. Called on pieces
    whose activations fit in the cache of a CPU core, this costs little time and saves most of the
    memory for activations.

    Args:
        run: A function of ``inputs`` and of parameters. Its random numbers come from torch's
            default generator.
        inputs: Tensors; the gradients of those that need one are computed.
    """
    output: Tensor = checkpoint(run, *inputs, use_reentrant=False, context_fn=_contexts)
    return output
