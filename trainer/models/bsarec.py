"""BSARec (Shin et al., AAAI 2024): self-attention beside a low-pass filter over the history.

A block mixes two outputs, ``alpha`` times the filter and 1 - ``alpha`` times causal self-attention.
The filter keeps the low frequencies of the sequence and scales the others by the square of a
learned vector (Eq. 6 to 9 of the paper).

The frequencies are those of a sequence of ``length`` slots whose empty slots are zero. The low-pass
filter is then a circular convolution, and the output at slot i depends on all slots, later ones
included. The two values of ``rows`` keep the target out of its input:

- ``prefixes`` is the published form: the filter covers the whole prefix, and only the item after
  the prefix is predicted.
- ``windows`` predicts every position, so the convolution leaves out the later slots. At the last
  slot, one block of both forms gives the same output.

The released code filters over learned padding as well, and ranks a padding item.

Legend: B batch, L sequence length, T slots, D width.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from trainer.config import LayerCount, PositiveInt, Probability, Range
from trainer.kernels.attention import self_attention
from trainer.kernels.elementwise import add_norm, dropout
from trainer.models.base import Catalogue
from trainer.models.causal import CausalSettings
from trainer.models.item_ids import ItemIdRecommender
from trainer.models.sasrec import SASRec
from trainer.modules.sequence_encoders import SequenceEncoder
from trainer.modules.transformer import (
    BlockConfig,
    TransformerBlock,
    initialise,
    positions_from_end,
)


@dataclass(frozen=True, kw_only=True)
class BSARecConfig(CausalSettings):
    """Settings of BSARec. The preset ``published`` is for Amazon Beauty."""

    dim: PositiveInt = 64
    layers: LayerCount = 2
    heads: PositiveInt = 2
    hidden: PositiveInt = 256
    length: PositiveInt = 50
    dropout: Probability = 0.4
    alpha: Annotated[float, Range(0, 1, "in [0, 1]", includes_high=True)] = 0.3
    """Weight of the filter; self-attention has the weight 1 - ``alpha`` (0.3 and 0.7 were compared
    on the validation split of ml-100k)."""
    cutoff: PositiveInt = 5
    """The filter keeps the frequencies 0 to ``cutoff`` // 2 (c in the paper)."""


class BSARec(ItemIdRecommender):
    """Self-attention and a low-pass filter over item ids."""

    settings_class = BSARecConfig
    settings: BSARecConfig
    unread = ("final_norm",)
    train_defaults: ClassVar = SASRec.train_defaults
    presets: ClassVar = {
        "published": {
            "rows": "prefixes",
            "heads": 1,
            "alpha": 0.7,
            "dropout": 0.5,
            "batch_size": 256,
            "lr": 5e-4,
            "schedule": "constant",
            "epochs": 200,
            "norm_eps": 1e-12,
            "inner_dropout": False,
            "weight_decay": 0.0,
            "clip": 0.0,
            "monitor": "NDCG@20",
        }
    }

    def __init__(self, settings: BSARecConfig, catalogue: Catalogue) -> None:
        super().__init__(settings, catalogue)
        self.sequence_encoder = _Encoder(settings)
        initialise(self)


class _Encoder(SequenceEncoder):
    def __init__(self, settings: BSARecConfig) -> None:
        super().__init__(settings, settings.dropout)
        self.position = nn.Embedding(settings.length, settings.dim)
        self.norm = nn.LayerNorm(settings.dim, eps=settings.norm_eps)
        self.blocks = nn.ModuleList(_Block(settings) for _ in range(settings.layers))

    def forward(self, x_BLD: Tensor, lengths_B: Tensor) -> Tensor:
        """Return the state after each item: (B, L, D)."""
        positions_BL = positions_from_end(lengths_B, x_BLD.shape[1])
        x_BLD = self.norm(x_BLD + self.position(positions_BL))
        x_BLD = dropout(x_BLD, self.settings.dropout, self.training)
        slots_L = torch.arange(x_BLD.shape[1], device=x_BLD.device)
        exists_BL1 = (slots_L < lengths_B[:, None])[..., None]
        for block in self.blocks:
            x_BLD = block(x_BLD, exists_BL1)
        return x_BLD


class _Block(TransformerBlock):
    """A transformer block whose attention is mixed with the filter."""

    def __init__(self, settings: BSARecConfig) -> None:
        super().__init__(
            BlockConfig(
                dim=settings.dim,
                heads=settings.heads,
                hidden=settings.hidden,
                dropout=settings.dropout,
                attention_dropout=settings.dropout,
                causal=True,
                activation=settings.activation,
                attention_bias=settings.attention_bias,
                inner_dropout=settings.inner_dropout,
                norm_eps=settings.norm_eps,
            )
        )
        self.alpha = settings.alpha
        self.slots = settings.length
        self.cutoff = settings.cutoff
        self.is_causal = settings.rows == "windows"
        self.beta_D = nn.Parameter(torch.randn(settings.dim))
        self.norm_filter = nn.LayerNorm(settings.dim, eps=settings.norm_eps)

    def forward(  # type: ignore[override]  # the mask is of slots, not of attention
        self, x_BTD: Tensor, exists_BT1: Tensor
    ) -> Tensor:
        """Apply the block to sequences whose empty slots are at the end: (B, T, D)."""
        probability = self.config.dropout if self.training else 0.0
        kernel_TT = low_pass(
            self.slots, self.cutoff, x_BTD.shape[1], is_causal=self.is_causal, device=x_BTD.device
        ).to(x_BTD.dtype)
        low_BTD = kernel_TT @ x_BTD.masked_fill(~exists_BT1, 0)
        filtered_BTD = low_BTD + self.beta_D.square() * (x_BTD - low_BTD)
        filtered_BTD = add_norm(x_BTD, filtered_BTD, self.norm_filter, probability)
        attended_BTD = self_attention(
            x_BTD, self.qkv, self.config.heads, mask=None, causal=True,
            probability=self.config.attention_dropout if self.training else 0.0,
        )  # fmt: skip
        attended_BTD = add_norm(x_BTD, self.out(attended_BTD), self.norm_attention, probability)
        return self.feed_forward(self.alpha * filtered_BTD + (1 - self.alpha) * attended_BTD)


def low_pass(
    slots: int, cutoff: int, width: int, *, is_causal: bool, device: torch.device | None = None
) -> Tensor:
    """Return the low-pass filter as a matrix (T, T) that multiplies a sequence (T, D).

    The filter is ``irfft(rfft(x, n=slots)[: cutoff // 2 + 1], n=slots)`` for a sequence that zeros
    extend to ``slots``. Element (i, j) of the matrix depends on (i - j) modulo ``slots``:
    1 / slots * sum over |m| <= cutoff // 2 of cos(2 pi m (i - j) / slots).

    Args:
        slots: Number of slots of the discrete Fourier transform.
        cutoff: Frequencies 0 to ``cutoff`` // 2 are kept.
        width: Number of slots T that the sequence has, at most ``slots``.
        is_causal: If true, the elements with j > i are 0.
        device: Device of the matrix; ``None``: the CPU.
    """
    slots_T = torch.arange(width, dtype=torch.float64, device=device)
    distance_TT = slots_T[:, None] - slots_T
    highest = min(cutoff // 2, slots // 2)
    frequencies = torch.arange(1, highest + 1, dtype=torch.float64, device=device)
    # Each frequency has a mirror image, but for the last one of an even number of slots.
    weights = 2 - (2 * frequencies == slots).double()
    waves_TTM = torch.cos(2 * math.pi / slots * distance_TT[..., None] * frequencies)
    kernel_TT = (1 + waves_TTM @ weights) / slots
    return kernel_TT.tril() if is_causal else kernel_TT
