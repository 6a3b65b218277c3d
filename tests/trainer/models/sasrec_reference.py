"""The states of SASRec for one history, written from the equations, for tests of several models."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def sasrec_states(encoder: Any, x_LD: Tensor) -> Tensor:
    """The state after each item of one history: (L, D)."""
    settings, length = encoder.settings, len(x_LD)
    x = encoder.norm(x_LD + encoder.position.weight[torch.arange(length - 1, -1, -1)])
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    for block in encoder.transformer.blocks:
        query, key, value = block.qkv(x).chunk(3, dim=-1)
        attended = []
        for head in range(settings.heads):
            width = settings.dim // settings.heads
            part = slice(head * width, (head + 1) * width)
            scores = (query[:, part] @ key[:, part].T / width**0.5).masked_fill(future, -torch.inf)
            attended.append(scores.softmax(-1) @ value[:, part])
        x = block.norm_attention(x + block.out(torch.cat(attended, dim=-1)))
        x = block.norm_feed(x + block.down(functional.gelu(block.up(x))))
    states: Tensor = encoder.transformer.norm(x)
    return states
