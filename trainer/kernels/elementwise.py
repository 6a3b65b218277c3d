"""Element-wise operators between the matrix products of a transformer.

Each CPU kernel is one autograd node: it saves few tensors for the backward pass and makes few
passes over memory.

Legend: x, h tensors of any shape whose last dimension has size D.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.kernels.dispatch import with_cpu_kernel

_layer_norm_backward = torch.ops.aten.native_layer_norm_backward
_gelu_backward = torch.ops.aten.gelu_backward


def draw_dropout_mask(
    shape: torch.Size | tuple[int, ...], probability: float
) -> tuple[Tensor, float]:
    """Draw a dropout mask from random bytes, which is much faster on a CPU than from floats.

    A byte decides for each element, so the probability is rounded to a multiple of 1/256. The scale
    belongs to the rounded probability, so the expectation stays exact.

    Returns:
        A uint8 mask of ``shape``, 1 where an element is kept, and the scale of the kept elements.
        (The mask is not bool because torch converts uint8 to floats four times faster.)
    """
    threshold = min(255, round(probability * 256))
    count = torch.Size(shape).numel()
    words = torch.empty((count + 7) // 8, dtype=torch.int64).random_(-(2**63), None)
    mask = words.view(torch.uint8)[:count].ge_(threshold).view(shape)
    return mask, 256 / (256 - threshold)


def apply_mask(x: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Return ``x * mask * scale``, or ``x`` without a mask."""
    # The mask is converted first: a product with an integer tensor is slow.
    return x if mask is None else mask.to(x.dtype).mul_(x).mul_(scale)


def _dropout_cpu(x: Tensor, probability: float, training: bool) -> Tensor:
    if not training or probability == 0:
        return x
    dropped: Tensor = _Dropout.apply(x, *draw_dropout_mask(x.shape, probability))
    return dropped


@with_cpu_kernel(_dropout_cpu)
def dropout(x: Tensor, probability: float, training: bool) -> Tensor:
    """Return ``x`` after dropout, a tensor of the same shape."""
    return functional.dropout(x, probability, training)


def _add_norm_cpu(x: Tensor, h: Tensor, norm: nn.LayerNorm, probability: float) -> Tensor:
    mask, scale = draw_dropout_mask(h.shape, probability) if probability else (None, 1.0)
    normed: Tensor = _AddNorm.apply(x, h, mask, scale, norm.weight, norm.bias, norm.eps)
    return normed


@with_cpu_kernel(_add_norm_cpu)
def add_norm(x: Tensor, h: Tensor, norm: nn.LayerNorm, probability: float) -> Tensor:
    """Return ``norm(x + dropout(h))``: the residual connection of a post-LN transformer.

    Args:
        x: (..., D), the input of the sublayer.
        h: (..., D), the output of the sublayer.
        norm: LayerNorm over the last dimension.
        probability: Dropout probability on ``h``; 0 outside training.
    """
    normed: Tensor = norm(x + functional.dropout(h, probability))
    return normed


def _gelu_dropout_cpu(x: Tensor, probability: float) -> Tensor:
    if not probability:
        return functional.gelu(x)
    activated: Tensor = _GeluDropout.apply(x, *draw_dropout_mask(x.shape, probability))
    return activated


@with_cpu_kernel(_gelu_dropout_cpu)
def gelu_dropout(x: Tensor, probability: float) -> Tensor:
    """Return ``dropout(gelu(x))``; ``probability`` is 0 outside training."""
    return functional.dropout(functional.gelu(x), probability)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.scale = scale
        return apply_mask(x, mask, scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return apply_mask(grad, ctx.saved_tensors[0], ctx.scale), None, None


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        h: Tensor,
        mask: Tensor | None,
        scale: float,
        weight_D: Tensor,
        bias_D: Tensor,
        eps: float,
    ) -> Tensor:
        z = x + h if mask is None else torch.addcmul(x, h, mask.to(h.dtype), value=scale)
        normed, mean, inverse = torch.native_layer_norm(z, weight_D.shape, weight_D, bias_D, eps)
        ctx.save_for_backward(z, mean, inverse, mask, weight_D, bias_D)
        ctx.scale = scale
        return normed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, mean, inverse, mask, weight_D, bias_D = ctx.saved_tensors
        grad_x, grad_weight_D, grad_bias_D = _layer_norm_backward(
            grad, z, weight_D.shape, mean, inverse, weight_D, bias_D, (True, True, True)
        )
        grad_h = apply_mask(grad_x, mask, ctx.scale)
        return grad_x, grad_h, None, None, grad_weight_D, grad_bias_D, None


class _GeluDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x, mask)
        ctx.scale = scale
        return apply_mask(functional.gelu(x), mask, scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, mask = ctx.saved_tensors
        return _gelu_backward(apply_mask(grad, mask, ctx.scale), x), None, None
