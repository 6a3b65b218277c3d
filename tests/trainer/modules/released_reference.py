"""The released encoders of MMSR and PMMRec, written from their equations, vector by vector.

Nothing is shared with the code under test: each sum is a loop, and the weights are read by name.

Legend: T tokens of one item or one history, D width, E width of a head.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]


def part(weights: Weights, prefix: str) -> Weights:
    """Return the weights below a prefix, without the prefix."""
    return {
        name.removeprefix(f"{prefix}."): value
        for name, value in weights.items()
        if name.startswith(f"{prefix}.")
    }


def norm(x_D: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias."""
    centred_D = x_D - x_D.mean()
    return centred_D / torch.sqrt((centred_D**2).mean() + eps) * weight_D + bias_D


def linear(x_D: Tensor, weights: Weights, name: str) -> Tensor:
    """W x + b; an absent bias is 0."""
    return weights[f"{name}.weight"] @ x_D + weights.get(f"{name}.bias", torch.zeros(()))


def relu(x: Tensor) -> Tensor:
    """max(0, x)."""
    return x.clamp_min(0)


def gelu(x: Tensor) -> Tensor:
    """x times the normal distribution function at x."""
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def attend(
    query: list[Tensor], key: list[Tensor], value: list[Tensor], bias: Tensor, heads: int
) -> list[Tensor]:
    """softmax(q k / sqrt(E) + bias) v, head by head; ``bias`` is -1e9 where a key is hidden."""
    E = len(query[0]) // heads
    mixed = []
    for t, query_D in enumerate(query):
        output = []
        for head in range(heads):
            own = slice(head * E, (head + 1) * E)
            scores = [query_D[own] @ k[own] / math.sqrt(E) + bias[t, s] for s, k in enumerate(key)]
            exponentials = [(score - max(scores)).exp() for score in scores]
            total = sum(exponentials[1:], exponentials[0])
            pairs = zip(exponentials, value, strict=True)
            output.append(torch.stack([w / total * v[own] for w, v in pairs]).sum(0))
        mixed.append(torch.cat(output))
    return mixed


def block(
    x: list[Tensor],
    weights: Weights,
    bias: Tensor,
    *,
    heads: int,
    eps: float,
    activate: Callable[[Tensor], Tensor],
) -> list[Tensor]:
    """Post-norm: LN(x + attention(x)), then LN(x + feed-forward(x))."""
    projected = [linear(x_D, weights, "qkv").chunk(3) for x_D in x]
    query, key, value = ([vectors[i] for vectors in projected] for i in range(3))
    states = []
    for x_D, mixed_D in zip(x, attend(query, key, value, bias, heads), strict=True):
        name = "norm_attention"
        summed_D = x_D + linear(mixed_D, weights, "out")
        y_D = norm(summed_D, weights[f"{name}.weight"], weights[f"{name}.bias"], eps)
        fed_D = y_D + linear(activate(linear(y_D, weights, "up")), weights, "down")
        states.append(norm(fed_D, weights["norm_feed.weight"], weights["norm_feed.bias"], eps))
    return states


def encode_history(
    items: list[Tensor], weights: Weights, *, slots: int, heads: int, layers: int
) -> list[Tensor]:
    """Encode a history, padded on the left to ``slots`` with positions from the left.

    ReLU, no LayerNorm after the last block, no biases in attention, epsilon 1e-6.
    """
    eps, empty = 1e-6, slots - len(items)
    padded = [torch.zeros_like(items[0])] * empty + items
    table = weights["position.weight"].flip(0)
    x = [
        norm(x_D + table[slot], weights["norm.weight"], weights["norm.bias"], eps)
        for slot, x_D in enumerate(padded)
    ]
    bias = torch.zeros(slots, slots, dtype=torch.float64)
    for row in range(slots):
        for column in range(slots):
            if column > row or column < empty:
                bias[row, column] = -1e9
    for layer in range(layers):
        own = part(weights, f"transformer.blocks.{layer}")
        assert not [name for name in own if name in ("qkv.bias", "out.bias")]
        x = block(x, own, bias, heads=heads, eps=eps, activate=relu)
    return x[empty:]


def merge_attention(
    modalities: list[list[Tensor]], weights: Weights, *, heads: int, layers: int
) -> Tensor:
    """The mean over the tokens of both modalities after BERT layers: GELU, epsilon 1e-12."""
    x = [x_D for tokens in modalities for x_D in tokens]
    bias = torch.zeros(len(x), len(x), dtype=torch.float64)
    for layer in range(layers):
        own = part(weights, f"blocks.{layer}")
        x = block(x, own, bias, heads=heads, eps=1e-12, activate=gelu)
    return torch.stack(x).mean(0)


def co_attention(
    modalities: list[list[Tensor]], weights: Weights, *, heads: int, layers: int
) -> Tensor:
    """LXMERT's cross-modality layers over typed tokens, then a map of both means."""
    eps = 1e-12
    x = [[x_D + weights["types"][m] for x_D in own] for m, own in enumerate(modalities)]
    for layer in range(layers):
        cross = part(weights, f"cross.{layer}")
        crossed = []
        for m in range(2):
            query = [linear(x_D, cross, "query") for x_D in x[m]]
            pairs = [linear(x_D, cross, "key_value").chunk(2) for x_D in x[1 - m]]
            bias = torch.zeros(len(query), len(pairs), dtype=torch.float64)
            mixed = attend(query, [k for k, _ in pairs], [v for _, v in pairs], bias, heads)
            crossed.append(
                [
                    norm(
                        x_D + linear(mixed_D, cross, "out"),
                        cross["norm.weight"],
                        cross["norm.bias"],
                        eps,
                    )
                    for x_D, mixed_D in zip(x[m], mixed, strict=True)
                ]
            )
        x = [
            block(
                tokens,
                part(weights, f"own.{2 * layer + m}"),
                torch.zeros(len(tokens), len(tokens), dtype=torch.float64),
                heads=heads,
                eps=eps,
                activate=gelu,
            )
            for m, tokens in enumerate(crossed)
        ]
    pooled_D = torch.cat([torch.stack(tokens).mean(0) for tokens in x])
    return linear(pooled_D, weights, "map")
