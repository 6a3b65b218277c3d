"""Selective activation checkpointing: keep matrix products, recompute what is element-wise."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from trainer.kernels.dispatch import use_kernels

_SAVED = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
_contexts = functools.partial(create_selective_checkpoint_contexts, _SAVED)

_CHUNK_ELEMENTS = 2**19  # the activations of a chunk stay in the cache of a core
_LEAST_ELEMENTS = 2**22  # up to this size, chunks would save only some hundred megabytes


def checkpoint_elementwise(run: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Return ``run(*inputs)`` and keep only the outputs of its linear layers for the backward pass.

    The backward pass recomputes all other operators, with the same random numbers. Called on chunks
    of :func:`tokens_per_chunk` tokens, this costs little time and saves most of the memory for
    activations.

    Args:
        run: A function of ``inputs``, of parameters and of tensors that it closes over; all of them
            get their gradients. Its random numbers come from torch's default generator.
        inputs: Tensors.
    """
    output: Tensor = checkpoint(run, *inputs, use_reentrant=False, context_fn=_contexts)
    return output


def tokens_per_chunk(weight_D: Tensor, tokens: int) -> int:
    """Return the number of tokens per chunk; 0 disables chunking and recomputation.

    Chunks pay on a CPU, with many tokens.

    Args:
        weight_D: A parameter of the model; its device and its width D decide.
        tokens: The number of tokens of the step.
    """
    dim = len(weight_D)
    if not torch.is_grad_enabled() or tokens * dim <= _LEAST_ELEMENTS or not use_kernels(weight_D):
        return 0
    return max(1, _CHUNK_ELEMENTS // dim)
