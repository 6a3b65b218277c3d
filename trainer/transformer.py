"""The transformer that the sequence towers share.

Legend: B batch, T tokens, D width, H heads, E width of a head.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional


class Block(nn.Module):
    """Self-attention and a feed-forward network, each with dropout, a residual and a LayerNorm.

    Args:
        dim: Width D; a multiple of ``heads``.
        heads: Attention heads H.
        hidden: Width of the feed-forward network.
        dropout: Probability, on the feed-forward's inside and both outputs.
        attention_dropout: Probability, on attention weights.
    """

    def __init__(
        self, *, dim: int, heads: int, hidden: int, dropout: float, attention_dropout: float
    ) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.attention_dropout = attention_dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.up = nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim)
        self.norm_attention = nn.LayerNorm(dim)
        self.norm_feed = nn.LayerNorm(dim)

    def forward(self, x_BTD: Tensor, keys_BT: Tensor | None, causal: bool) -> Tensor:
        """Apply the block; ``keys_BT`` is true where a token may be attended to."""
        x_BTD = self.norm_attention(x_BTD + self._attend(x_BTD, keys_BT, causal))
        normed: Tensor = self.norm_feed(x_BTD + self._feed(x_BTD))
        return normed

    def _attend(self, x_BTD: Tensor, keys_BT: Tensor | None, causal: bool) -> Tensor:
        B, T, D = x_BTD.shape
        q_BHTE, k_BHTE, v_BHTE = (
            self.qkv(x_BTD).view(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        )
        mixed_BHTE = functional.scaled_dot_product_attention(
            q_BHTE,
            k_BHTE,
            v_BHTE,
            attn_mask=None if keys_BT is None else keys_BT[:, None, None, :],
            dropout_p=self.attention_dropout if self.training else 0.0,
            is_causal=causal,
        )
        return self._drop(self.out(mixed_BHTE.transpose(1, 2).reshape(B, T, D)))

    def _feed(self, x_BTD: Tensor) -> Tensor:
        return self._drop(self.down(self._drop(functional.gelu(self.up(x_BTD)))))

    def _drop(self, x: Tensor) -> Tensor:
        return dropout(x, self.dropout, self.training)


class Transformer(nn.Module):
    """A stack of post-LN blocks and one LayerNorm after it.

    Args:
        layers: Number of blocks.
        dim: Width D.
        heads: Attention heads.
        hidden: Width of the feed-forward networks.
        dropout: Probability.
        attention_dropout: Probability, on attention weights.
        causal: Whether a token sees only itself and what stands before it.
    """

    def __init__(
        self,
        *,
        layers: int,
        dim: int,
        heads: int,
        hidden: int,
        dropout: float,
        attention_dropout: float,
        causal: bool,
    ) -> None:
        super().__init__()
        self.causal = causal
        self.blocks = nn.ModuleList(
            Block(
                dim=dim,
                heads=heads,
                hidden=hidden,
                dropout=dropout,
                attention_dropout=attention_dropout,
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, x_BTD: Tensor, keys_BT: Tensor | None = None) -> Tensor:
        """Encode (B, T, D).

        A causal stack needs no ``keys_BT`` where padding stands on the right: no token looks
        there. A bidirectional one needs it, true where a token may be attended to.
        """
        for block in self.blocks:
            x_BTD = block(x_BTD, keys_BT, self.causal)
        normed: Tensor = self.norm(x_BTD)
        return normed


def dropout(x: Tensor, probability: float, training: bool) -> Tensor:
    """Dropout; on a CPU from random bytes, which are drawn 2.5 times faster than floats.

    A byte decides, so there the probability is rounded to a multiple of 1/256; the scale goes by
    the rounded one, so that the expectation stays exact.
    """
    if not training or probability == 0 or x.device.type != "cpu":
        return functional.dropout(x, probability, training)
    below = min(255, round(probability * 256))
    words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64).random_(-(2**63), None)
    keep = (words.view(torch.uint8)[: x.numel()] >= below).view(x.shape)
    return x * keep * (256 / (256 - below))


def initialise(module: nn.Module, std: float = 0.02) -> None:
    """Draw linear and embedding weights from N(0, std); biases 0, LayerNorm (1, 0)."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, std=std)
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)


def positions_from_end(lengths_B: Tensor, width: int) -> Tensor:
    """(B, width) position of each slot counted from the sequence's last item, which is 0.

    Slots of padding, which stand after the last item, are 0 too.
    """
    columns_L = torch.arange(width, device=lengths_B.device)
    return (lengths_B[:, None] - 1 - columns_L).clamp_min(0)
