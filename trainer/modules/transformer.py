"""The transformer that the sequence towers share.

Legend: B batch, T tokens, D width, H heads, E width of a head, M tokens whose output is wanted.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.kernels.activation_checkpoint import linear
from trainer.kernels.fused_cpu import add_norm, attend_pairs, dropout, gelu_dropout, plain


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

    def forward(
        self,
        x_BTD: Tensor,
        keys: Tensor | None,
        causal: bool,
        at_M: Tensor | None = None,
    ) -> Tensor:
        """Apply the block.

        Args:
            x_BTD: Tokens.
            keys: True where a token may be attended to, (B, T) by all, or (B or 1, T, T) by each;
                ``None``: everywhere, and always so where ``causal``.
            causal: Whether a token sees only itself and what stands before it.
            at_M: Which tokens the outputs are wanted of, as numbers in B x T; ``None``: of all.

        Returns:
            (B, T, D), or with ``at_M`` (M, D).
        """
        mixed_BTD = self._mix(x_BTD, keys, causal)
        if at_M is not None:
            x_BTD, mixed_BTD = (x.flatten(0, 1).index_select(0, at_M) for x in (x_BTD, mixed_BTD))
        p = self.dropout if self.training else 0.0
        x_BTD = add_norm(x_BTD, linear(self.out, mixed_BTD), self.norm_attention, p)
        inner_BTF = gelu_dropout(linear(self.up, x_BTD), p)
        return add_norm(x_BTD, linear(self.down, inner_BTF), self.norm_feed, p)

    def _mix(self, x_BTD: Tensor, keys: Tensor | None, causal: bool) -> Tensor:
        """The values, weighted by attention: (B, T, D)."""
        assert keys is None or not causal
        B, T, D = x_BTD.shape
        E = D // self.heads
        p = self.attention_dropout if self.training else 0.0
        if T == 2 and keys is None and not causal and not plain(x_BTD):
            query_BTD = linear(self.qkv, x_BTD, slice(0, D))
            key_BD = linear(self.qkv, x_BTD[:, 0] - x_BTD[:, 1], slice(D, 2 * D), bias=False)
            value_BTD = linear(self.qkv, x_BTD, slice(2 * D, 3 * D))
            mixed_BTHE = attend_pairs(
                query_BTD.view(B, T, self.heads, E),
                key_BD.view(B, self.heads, E),
                value_BTD.view(B, T, self.heads, E),
                p,
            )
            return mixed_BTHE.view(B, T, D)
        query_BHTE, key_BHTE, value_BHTE = (
            linear(self.qkv, x_BTD).view(B, T, 3, self.heads, E).permute(2, 0, 3, 1, 4)
        )
        mask = None if keys is None else keys[:, None] if keys.ndim == 3 else keys[:, None, None]
        if p and not plain(x_BTD):
            mixed_BHTE = _attend(query_BHTE, key_BHTE, value_BHTE, mask, causal, p)
        else:
            mixed_BHTE = functional.scaled_dot_product_attention(
                query_BHTE,
                key_BHTE,
                value_BHTE,
                attn_mask=mask,
                dropout_p=p,
                is_causal=causal,
            )
        return mixed_BHTE.transpose(1, 2).reshape(B, T, D)


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

    @property
    def compiled(self) -> bool:
        """Whether ``torch.compile`` has it."""
        return self._compiled_call_impl is not None

    def forward(
        self, x_BTD: Tensor, keys: Tensor | None = None, at_BT: Tensor | None = None
    ) -> Tensor:
        """Encode (B, T, D).

        A causal stack needs no ``keys`` where padding stands on the right: no token looks there.
        Another one needs them, true where a token may be attended to: (B, T) by all tokens, or
        (B or 1, T, T), which token by which. With ``at_BT``, bool, only the outputs of those M
        tokens are computed and given, row by row: (M, D).
        """
        at_M = None if at_BT is None else at_BT.flatten().nonzero()[:, 0]
        last = len(self.blocks) - 1
        for number, block in enumerate(self.blocks):
            x_BTD = block(x_BTD, keys, self.causal, at_M if number == last else None)
        normed: Tensor = self.norm(x_BTD)
        return normed


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


def _attend(
    query_BHTE: Tensor,
    key_BHTE: Tensor,
    value_BHTE: Tensor,
    mask: Tensor | None,
    causal: bool,
    probability: float,
) -> Tensor:
    """Attention with dropout on its weights: torch's own draws the mask slowly on a CPU."""
    T, E = query_BHTE.shape[-2:]
    score_BHTT = (query_BHTE * E**-0.5) @ key_BHTE.transpose(-1, -2)
    if causal:
        mask = torch.ones(T, T, dtype=torch.bool, device=score_BHTT.device).tril()
    if mask is not None:
        score_BHTT = score_BHTT.masked_fill(~mask, -torch.inf)
    return dropout(score_BHTT.softmax(-1), probability, training=True) @ value_BHTE
