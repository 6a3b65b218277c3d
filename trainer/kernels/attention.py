"""Multi-head self-attention, with CPU kernels for short sequences and for dropout.

Legend: B batch, T tokens, D width, H heads, E width of a head, D = H * E.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.kernels.dispatch import with_cpu_kernel
from trainer.kernels.elementwise import apply_mask, draw_dropout_mask, dropout


def _self_attention_cpu(
    x_BTD: Tensor,
    projection: nn.Linear,
    heads: int,
    *,
    mask: Tensor | None,
    causal: bool,
    probability: float,
) -> Tensor:
    if x_BTD.shape[1] == 2 and mask is None and not causal:
        return _pair_attention(x_BTD, projection, heads, probability)
    query_BHTE, key_BHTE, value_BHTE = _split_heads(projection(x_BTD), heads)
    attend = _attend_with_fast_dropout if probability else _attend
    return _merge_heads(attend(query_BHTE, key_BHTE, value_BHTE, mask, causal, probability))


@with_cpu_kernel(_self_attention_cpu)
def self_attention(
    x_BTD: Tensor,
    projection: nn.Linear,
    heads: int,
    *,
    mask: Tensor | None,
    causal: bool,
    probability: float,
) -> Tensor:
    """Return multi-head self-attention before its output projection (Vaswani et al., 2017).

    Args:
        x_BTD: Tokens.
        projection: Maps D to 3 D: queries, keys and values, in this order.
        heads: Number of heads H.
        mask: True where a token may be attended to: (B, T) by every token, or (B or 1, T, T), where
            element (i, j) is true if token i may attend to token j. ``None``: no mask.
        causal: Whether a token attends only to itself and the tokens before it; not with ``mask``.
        probability: Dropout probability on the attention weights; 0 outside training.

    Returns:
        (B, T, D).
    """
    query_BHTE, key_BHTE, value_BHTE = _split_heads(projection(x_BTD), heads)
    return _merge_heads(_attend(query_BHTE, key_BHTE, value_BHTE, mask, causal, probability))


def _split_heads(qkv_BTF: Tensor, heads: int) -> Tensor:
    """Return (3, B, H, T, E): queries, keys and values."""
    B, T, F = qkv_BTF.shape
    return qkv_BTF.view(B, T, 3, heads, F // (3 * heads)).permute(2, 0, 3, 1, 4)


def _merge_heads(x_BHTE: Tensor) -> Tensor:
    """Return (B, T, D)."""
    return x_BHTE.transpose(1, 2).flatten(2)


def _attend(
    query_BHTE: Tensor,
    key_BHTE: Tensor,
    value_BHTE: Tensor,
    mask: Tensor | None,
    causal: bool,
    probability: float,
) -> Tensor:
    return functional.scaled_dot_product_attention(
        query_BHTE,
        key_BHTE,
        value_BHTE,
        attn_mask=_per_head(mask),
        dropout_p=probability,
        is_causal=causal,
    )


def _attend_with_fast_dropout(
    query_BHTE: Tensor,
    key_BHTE: Tensor,
    value_BHTE: Tensor,
    mask: Tensor | None,
    causal: bool,
    probability: float,
) -> Tensor:
    """Equal :func:`_attend`, with the fast dropout mask: torch's own is slow on a CPU."""
    T, E = query_BHTE.shape[-2:]
    score_BHTT = (query_BHTE * E**-0.5) @ key_BHTE.transpose(-1, -2)
    allowed = _per_head(mask)
    if causal:
        allowed = torch.ones(T, T, dtype=torch.bool, device=score_BHTT.device).tril()
    if allowed is not None:
        score_BHTT = score_BHTT.masked_fill(~allowed, -torch.inf)
    return dropout(score_BHTT.softmax(-1), probability, training=True) @ value_BHTE


def _per_head(mask: Tensor | None) -> Tensor | None:
    """Return the mask with dimensions for heads and, of a (B, T) mask, for queries."""
    if mask is None:
        return None
    return mask[:, None] if mask.ndim == 3 else mask[:, None, None]


def _pair_attention(x_B2D: Tensor, projection: nn.Linear, heads: int, probability: float) -> Tensor:
    """Equal :func:`self_attention` for two tokens, for 5/6 of the projection's products.

    A softmax over two scores is the sigmoid of their difference, so only the difference of the two
    keys is needed.
    """
    B, _, D = x_B2D.shape
    weight, bias = projection.weight, projection.bias
    query_bias, value_bias = (None, None) if bias is None else (bias[:D], bias[2 * D :])
    query_B2D = functional.linear(x_B2D, weight[:D], query_bias)
    difference_BD = functional.linear(x_B2D[:, 0] - x_B2D[:, 1], weight[D : 2 * D])
    value_B2D = functional.linear(x_B2D, weight[2 * D :], value_bias)
    mask, scale = draw_dropout_mask((B, 2, heads, 2), probability) if probability else (None, 1.0)
    mixed_B2HE: Tensor = _PairAttention.apply(
        query_B2D.view(B, 2, heads, -1),
        difference_BD.view(B, heads, -1),
        value_B2D.view(B, 2, heads, -1),
        mask,
        scale,
    )
    return mixed_B2HE.view(B, 2, D)


class _PairAttention(torch.autograd.Function):
    """Attention over two tokens, given the difference of their keys (first minus second)."""

    @staticmethod
    def forward(
        ctx: Any,
        query_B2HE: Tensor,
        difference_BHE: Tensor,
        value_B2HE: Tensor,
        mask_B2H2: Tensor | None,
        scale: float,
    ) -> Tensor:
        temperature = query_B2HE.shape[-1] ** -0.5
        score_B2H = (query_B2HE * difference_BHE[:, None]).sum(-1).mul_(temperature)
        softmax_B2H2 = torch.stack([score_B2H.sigmoid(), score_B2H.neg().sigmoid()], -1)
        weight_B2H2 = apply_mask(softmax_B2H2, mask_B2H2, scale)
        ctx.save_for_backward(
            query_B2HE, difference_BHE, value_B2HE, mask_B2H2, softmax_B2H2, weight_B2H2
        )
        ctx.scale, ctx.temperature = scale, temperature
        mixed_B2HE = weight_B2H2[..., :1] * value_B2HE[:, :1]
        return mixed_B2HE.addcmul_(weight_B2H2[..., 1:], value_B2HE[:, 1:])

    @staticmethod
    def backward(ctx: Any, grad_B2HE: Tensor) -> tuple[Tensor | None, ...]:
        query, difference, value, mask, softmax, weight = ctx.saved_tensors
        grad_value = torch.empty_like(value)
        grad_weight = torch.empty_like(softmax)
        for j in range(2):
            torch.mul(grad_B2HE[:, 0], weight[:, 0, :, j, None], out=grad_value[:, j])
            grad_value[:, j].addcmul_(grad_B2HE[:, 1], weight[:, 1, :, j, None])
            grad_weight[..., j] = (grad_B2HE * value[:, j, None]).sum(-1)
        grad_softmax = apply_mask(grad_weight, mask, ctx.scale)
        grad_score = (grad_softmax[..., 0] - grad_softmax[..., 1]).mul_(softmax.prod(-1))
        grad_score = grad_score.mul_(ctx.temperature)
        grad_query = grad_score[..., None] * difference[:, None]
        grad_difference = grad_score[:, 0, :, None] * query[:, 0]
        grad_difference.addcmul_(grad_score[:, 1, :, None], query[:, 1])
        return grad_query, grad_difference, grad_value, None, None
