"""Causal self-attention with the LayerNorms before the layers, as SASRec has it.

Kang and McAuley, ICDM 2018, section 3; ``released``: kang205/SASRec@2edc854. The first layer reads
sqrt(D) times the item vectors plus learned positions, without a LayerNorm. The attention has no
output projection.

Legend: B batch, L sequence length, D width, H heads, E width of a head.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.kernels.elementwise import dropout
from trainer.modules.sequence_encoders import SequenceEncoder, SequenceSettings
from trainer.modules.transformer import positions_from_end


class PreNormEncoder(SequenceEncoder):
    """Self-attention with blocks x + dropout(attention(norm(x))), then x + dropout(feed(norm(x))).

    Args:
        settings: Settings of the encoder.
        released: Blocks of the released code: each residual connection adds norm(x) in place of x,
            the keys and the values are maps of x and the queries are maps of norm(x), and the
            dropout of the attention is on its weights in place of its output.
    """

    def __init__(self, settings: SequenceSettings, *, released: bool) -> None:
        super().__init__(settings, attention_dropout=settings.dropout)
        self.position = nn.Embedding(settings.length, settings.dim)
        self.blocks = nn.ModuleList(
            _Block(settings, released=released) for _ in range(settings.layers)
        )
        self.norm = (
            nn.LayerNorm(settings.dim, eps=settings.norm_eps)
            if settings.final_norm
            else nn.Identity()
        )

    def forward(self, x_BLD: Tensor, lengths_B: Tensor) -> Tensor:
        """Return the state after each item: (B, L, D)."""
        x_BLD = x_BLD * self.settings.dim**0.5
        x_BLD = x_BLD + self.position(positions_from_end(lengths_B, x_BLD.shape[1]))
        x_BLD = dropout(x_BLD, self.settings.dropout, self.training)
        for block in self.blocks:
            x_BLD = block(x_BLD)
        states_BLD: Tensor = self.norm(x_BLD)
        return states_BLD


class _Block(nn.Module):
    def __init__(self, settings: SequenceSettings, *, released: bool) -> None:
        super().__init__()
        self.settings = settings
        self.released = released
        dim, eps = settings.dim, settings.norm_eps
        self.query = nn.Linear(dim, dim, bias=settings.attention_bias)
        self.key = nn.Linear(dim, dim, bias=settings.attention_bias)
        self.value = nn.Linear(dim, dim, bias=settings.attention_bias)
        self.up = nn.Linear(dim, settings.hidden)
        self.down = nn.Linear(settings.hidden, dim)
        self.norm_attention = nn.LayerNorm(dim, eps=eps)
        self.norm_feed = nn.LayerNorm(dim, eps=eps)

    def forward(self, x_BLD: Tensor) -> Tensor:
        probability = self.settings.dropout
        normed_BLD = self.norm_attention(x_BLD)
        if self.released:
            x_BLD = normed_BLD + self.attend(normed_BLD, x_BLD, probability)
        else:
            attended_BLD = self.attend(normed_BLD, normed_BLD, 0.0)
            x_BLD = x_BLD + dropout(attended_BLD, probability, self.training)
        normed_BLD = self.norm_feed(x_BLD)
        output_BLD = dropout(self.feed(normed_BLD), probability, self.training)
        return (normed_BLD if self.released else x_BLD) + output_BLD

    def attend(self, query_BLD: Tensor, key_BLD: Tensor, probability: float) -> Tensor:
        """Return causal attention with dropout on its weights: (B, L, D).

        Padding is on the right, so no item attends to padding.
        """
        heads = self.settings.heads
        query_BHLE, key_BHLE, value_BHLE = (
            part(input_BLD).unflatten(-1, (heads, -1)).transpose(1, 2)
            for part, input_BLD in (
                (self.query, query_BLD),
                (self.key, key_BLD),
                (self.value, key_BLD),
            )
        )
        mixed_BHLE: Tensor = functional.scaled_dot_product_attention(
            query_BHLE,
            key_BHLE,
            value_BHLE,
            dropout_p=probability if self.training else 0.0,
            is_causal=True,
        )
        return mixed_BHLE.transpose(1, 2).flatten(2)

    def feed(self, x_BLD: Tensor) -> Tensor:
        """Return the output of the feed-forward network: (B, L, D)."""
        activation = functional.gelu if self.settings.activation == "gelu" else torch.relu
        inner = self.settings.dropout if self.settings.inner_dropout else 0.0
        hidden_BLF = dropout(activation(self.up(x_BLD)), inner, self.training)
        output_BLD: Tensor = self.down(hidden_BLF)
        return output_BLD
