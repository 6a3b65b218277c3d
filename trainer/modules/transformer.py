"""The transformer encoder that the sequence encoders and the attention fusions share.

Legend: B batch, T tokens, D width, F width of the feed-forward network, M selected tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.kernels.attention import self_attention
from trainer.kernels.elementwise import add_norm, dropout, gelu_dropout

ACTIVATIONS = ("gelu", "relu")
"""Values of the setting ``activation``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockConfig:
    """Sizes and options of a transformer block. The default options are those of BERT."""

    dim: int
    """Width D; a multiple of ``heads``."""
    heads: int
    """Number of attention heads."""
    hidden: int
    """Width F of the feed-forward network."""
    dropout: float
    """Probability on the output of both sublayers, and inside the feed-forward network."""
    attention_dropout: float
    """Probability on the attention weights."""
    causal: bool
    """If true, a token attends only to itself and the tokens before it."""
    activation: str = "gelu"
    """Activation of the feed-forward network, one of ``ACTIVATIONS``."""
    attention_bias: bool = True
    """Whether the linear layers of the attention have biases."""
    inner_dropout: bool = True
    """Whether the activations inside the feed-forward network have dropout."""
    norm_eps: float = 1e-5
    """Epsilon of the LayerNorms."""


class TransformerBlock(nn.Module):
    """A post-LN transformer block (Vaswani et al., 2017)."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.config = config
        dim, bias = config.dim, config.attention_bias
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.out = nn.Linear(dim, dim, bias=bias)
        self.up = nn.Linear(dim, config.hidden)
        self.down = nn.Linear(config.hidden, dim)
        self.norm_attention = nn.LayerNorm(dim, eps=config.norm_eps)
        self.norm_feed = nn.LayerNorm(dim, eps=config.norm_eps)

    def forward(
        self, x_BTD: Tensor, mask: Tensor | None = None, selected_M: Tensor | None = None
    ) -> Tensor:
        """Apply the block.

        Args:
            x_BTD: Tokens.
            mask: True where a token may be attended to, (B, T) or (B or 1, T, T), see
                :func:`trainer.kernels.attention.self_attention`; ``None`` in a causal block.
            selected_M: Indices of tokens in the flattened B x T. Only the outputs of these tokens
                are computed; ``None``: those of all tokens.

        Returns:
            (B, T, D), or (M, D) with ``selected_M``.
        """
        probability = self.config.dropout if self.training else 0.0
        attended = self_attention(
            x_BTD,
            self.qkv,
            self.config.heads,
            mask=mask,
            causal=self.config.causal,
            probability=self.config.attention_dropout if self.training else 0.0,
        )
        x = x_BTD
        if selected_M is not None:
            x, attended = (t.flatten(0, 1).index_select(0, selected_M) for t in (x, attended))
        x = add_norm(x, self.out(attended), self.norm_attention, probability)
        return self.feed_forward(x)

    def feed_forward(self, x: Tensor) -> Tensor:
        """Apply the feed-forward network, its residual connection and its LayerNorm: (..., D)."""
        probability = self.config.dropout if self.training else 0.0
        inner = probability if self.config.inner_dropout else 0.0
        if self.config.activation == "gelu":
            hidden = gelu_dropout(self.up(x), inner)
        else:
            hidden = dropout(self.up(x).relu(), inner, self.training)
        return add_norm(x, self.down(hidden), self.norm_feed, probability)


class Transformer(nn.Module):
    """A stack of post-LN blocks, and a LayerNorm after the last block.

    Args:
        config: Sizes and options of each block.
        layers: Number of blocks.
        final_norm: Whether there is a LayerNorm after the last block.
    """

    can_compile = True

    def __init__(self, config: BlockConfig, *, layers: int, final_norm: bool = True) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(TransformerBlock(config) for _ in range(layers))
        self.norm = nn.LayerNorm(config.dim, eps=config.norm_eps) if final_norm else nn.Identity()

    @property
    def compiled(self) -> bool:
        """True after :meth:`compile` was called."""
        return self._compiled_call_impl is not None

    def forward(
        self, x_BTD: Tensor, mask: Tensor | None = None, selected_M: Tensor | None = None
    ) -> Tensor:
        """Encode tokens.

        Args:
            x_BTD: Tokens.
            mask: True where a token may be attended to, (B, T) or (B or 1, T, T), see
                :func:`trainer.kernels.attention.self_attention`. A causal stack takes no mask: with
                padding on the right, no token attends to padding.
            selected_M: Indices of tokens in the flattened B x T. The last block computes only the
                outputs of these tokens; ``None``: those of all tokens.

        Returns:
            (B, T, D), or (M, D) with ``selected_M``.
        """
        *first, last = self.blocks
        for block in first:
            x_BTD = block(x_BTD, mask)
        normed: Tensor = self.norm(last(x_BTD, mask, selected_M))
        return normed


def initialise(module: nn.Module, std: float = 0.02) -> None:
    """Draw the weights of linear layers and embeddings from N(0, std^2); set biases to 0."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, std=std)
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)


def initialise_glorot(module: nn.Module) -> None:
    """Draw the weights of linear layers and embeddings from the Glorot normal distribution.

    Biases of linear layers become 0. Source: the released code of MMSR. With smaller weights, such
    as those of :func:`initialise`, the three-layer DNN of MMSR learns little at small widths.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.xavier_normal_(part.weight)
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)


def positions_from_end(lengths_B: Tensor, width: int) -> Tensor:
    """Return the position of each slot, counted from the last item, which has position 0.

    Args:
        lengths_B: (B,) int64, the lengths of the sequences.
        width: Number of slots, padding included.

    Returns:
        (B, width) int64; 0 in the slots of padding, which follow the last item.
    """
    columns_L = torch.arange(width, device=lengths_B.device)
    return (lengths_B[:, None] - 1 - columns_L).clamp_min(0)
