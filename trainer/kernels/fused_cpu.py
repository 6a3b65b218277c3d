"""What stands between the matrix products of a transformer, fused for a CPU.

Each of these is one autograd node that keeps little, makes few passes over memory, and equals its
plain form up to rounding. Where torch has kernels of its own (an accelerator) or fuses by itself
(``torch.compile``), the plain form runs.

Legend: x, h any shape with width D; n sequences of T tokens, H heads, E width of a head.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

_layer_norm_backward = torch.ops.aten.native_layer_norm_backward
_gelu_backward = torch.ops.aten.gelu_backward


def dropout(x: Tensor, probability: float, training: bool) -> Tensor:
    """Dropout; on a CPU from random bytes, which are drawn much faster than floats.

    A byte decides, so there the probability is rounded to a multiple of 1/256; the scale goes by
    the rounded one, so that the expectation stays exact.
    """
    if not training or probability == 0 or plain(x):
        return functional.dropout(x, probability, training)
    dropped: Tensor = _Dropout.apply(x, *draw(x.shape, probability))
    return dropped


def add_norm(x: Tensor, h: Tensor, norm: nn.LayerNorm, probability: float) -> Tensor:
    """``norm(x + dropout(h))``; no dropout at probability 0."""
    if plain(x):
        whole: Tensor = norm(x + functional.dropout(h, probability))
        return whole
    stays, scale = draw(h.shape, probability) if probability else (None, 1.0)
    normed: Tensor = _AddNorm.apply(x, h, stays, scale, norm.weight, norm.bias, norm.eps)
    return normed


def gelu_dropout(x: Tensor, probability: float) -> Tensor:
    """``dropout(gelu(x))``; no dropout at probability 0."""
    if plain(x) or not probability:
        return functional.dropout(functional.gelu(x), probability)
    found: Tensor = _GeluDropout.apply(x, *draw(x.shape, probability))
    return found


def attend_pairs(
    query_n2HE: Tensor, difference_nHE: Tensor, value_n2HE: Tensor, probability: float
) -> Tensor:
    """Attention over sequences of two tokens, with dropout on its weights: (n, 2, H, E).

    A softmax over two scores is a sigmoid of their difference, so that of the keys only the
    difference is needed, first less second.
    """
    n, _, H, _ = query_n2HE.shape
    stays, scale = draw((n, 2, H, 2), probability) if probability else (None, 1.0)
    mixed: Tensor = _Pairs.apply(query_n2HE, difference_nHE, value_n2HE, stays, scale)
    return mixed


def plain(x: Tensor) -> bool:
    """Whether the plain form is the faster one for ``x``."""
    kind = x.device.type
    return kind != "cpu" or torch.is_autocast_enabled(kind) or torch.compiler.is_compiling()


def draw(shape: torch.Size | tuple[int, ...], probability: float) -> tuple[Tensor, float]:
    """Which numbers stay (1, else 0; uint8), and by what they are multiplied; on the CPU.

    Not bool: torch turns uint8 into floats four times faster.
    """
    below = min(255, round(probability * 256))
    count = torch.Size(shape).numel()
    words = torch.empty((count + 7) // 8, dtype=torch.int64).random_(-(2**63), None)
    stays = words.view(torch.uint8)[:count].ge_(below).view(shape)
    return stays, 256 / (256 - below)


def _masked(x: Tensor, stays: Tensor | None, scale: float) -> Tensor:
    """The product of all three; an integer mask is slow in a product, so it is made float."""
    return x if stays is None else stays.to(x.dtype).mul_(x).mul_(scale)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, stays: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(stays)
        ctx.scale = scale
        return _masked(x, stays, scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _masked(grad, ctx.saved_tensors[0], ctx.scale), None, None


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        h: Tensor,
        stays: Tensor | None,
        scale: float,
        weight_D: Tensor,
        bias_D: Tensor,
        eps: float,
    ) -> Tensor:
        z = x + h if stays is None else torch.addcmul(x, h, stays.to(h.dtype), value=scale)
        normed, mean, inverse = torch.native_layer_norm(z, weight_D.shape, weight_D, bias_D, eps)
        ctx.save_for_backward(z, mean, inverse, stays, weight_D, bias_D)
        ctx.scale = scale
        return normed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, mean, inverse, stays, weight_D, bias_D = ctx.saved_tensors
        into_x, into_weight_D, into_bias_D = _layer_norm_backward(
            grad, z, weight_D.shape, mean, inverse, weight_D, bias_D, (True, True, True)
        )
        into_h = _masked(into_x, stays, ctx.scale)
        return into_x, into_h, None, None, into_weight_D, into_bias_D, None


class _GeluDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, stays: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x, stays)
        ctx.scale = scale
        return _masked(functional.gelu(x), stays, scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, stays = ctx.saved_tensors
        return _gelu_backward(_masked(grad, stays, ctx.scale), x), None, None


class _Pairs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query_n2HE: Tensor,
        difference_nHE: Tensor,
        value_n2HE: Tensor,
        stays_n2H2: Tensor | None,
        scale: float,
    ) -> Tensor:
        sharp = query_n2HE.shape[-1] ** -0.5
        score_n2H = (query_n2HE * difference_nHE[:, None]).sum(-1).mul_(sharp)
        share_n2H2 = torch.stack([score_n2H.sigmoid(), score_n2H.neg().sigmoid()], -1)
        weight_n2H2 = _masked(share_n2H2, stays_n2H2, scale)
        ctx.save_for_backward(
            query_n2HE, difference_nHE, value_n2HE, stays_n2H2, share_n2H2, weight_n2H2
        )
        ctx.scale, ctx.sharp = scale, sharp
        mixed_n2HE = weight_n2H2[..., :1] * value_n2HE[:, :1]
        return mixed_n2HE.addcmul_(weight_n2H2[..., 1:], value_n2HE[:, 1:])

    @staticmethod
    def backward(ctx: Any, grad_n2HE: Tensor) -> tuple[Tensor | None, ...]:
        query, difference, value, stays, share, weight = ctx.saved_tensors
        into_value = torch.empty_like(value)
        into_weight = torch.empty_like(share)
        for j in range(2):
            torch.mul(grad_n2HE[:, 0], weight[:, 0, :, j, None], out=into_value[:, j])
            into_value[:, j].addcmul_(grad_n2HE[:, 1], weight[:, 1, :, j, None])
            into_weight[..., j] = (grad_n2HE * value[:, j, None]).sum(-1)
        into_share = _masked(into_weight, stays, ctx.scale)
        into_score = (into_share[..., 0] - into_share[..., 1]).mul_(share.prod(-1)).mul_(ctx.sharp)
        into_query = into_score[..., None] * difference[:, None]
        into_difference = into_score[:, 0, :, None] * query[:, 0]
        into_difference.addcmul_(into_score[:, 1, :, None], query[:, 1])
        return into_query, into_difference, into_value, None, None
