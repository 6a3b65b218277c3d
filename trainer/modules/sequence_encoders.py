"""Sequence encoders over item vectors: self-attention, recurrence, dilated convolutions.

All encoders are causal: the state at a position depends on the items up to that position. Sequences
are padded on the right, so states of items do not depend on padding.

Legend: B batch, L sequence length, D width.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.config import (
    Choice,
    LayerCount,
    NetworkSettings,
    NormEpsilon,
    PositiveInt,
    check_multiple,
)
from trainer.data.batches import Sequences
from trainer.kernels.elementwise import dropout
from trainer.modules.transformer import ACTIVATIONS, BlockConfig, Transformer, positions_from_end

_KERNEL = 3  # width of NextItNet's convolutions
_DILATIONS = (1, 4)  # of the two residual blocks in a layer of NextItNet


@dataclass(frozen=True, kw_only=True)
class SequenceSettings(NetworkSettings):
    """Settings of a sequence encoder, the same in every model."""

    layers: LayerCount = 2
    """Number of layers of the sequence encoder."""
    heads: PositiveInt = 2
    """Number of attention heads of the sequence encoder."""
    length: PositiveInt = 20
    """Largest number of items of a history that the sequence encoder reads."""
    activation: Annotated[str, Choice("activation", ACTIVATIONS)] = "gelu"
    """Activation of the feed-forward networks of the sequence encoder, ``gelu`` or ``relu``. As
    published by MMSR and PMMRec: ``relu``."""
    final_norm: bool = True
    """Use a LayerNorm after the last block of self-attention. As published by MMSR and PMMRec:
    false."""
    attention_bias: bool = True
    """Use biases in the self-attention of the sequence encoder. As published by MMSR and PMMRec:
    false."""
    norm_eps: NormEpsilon = 1e-5
    """Epsilon of the LayerNorms of the sequence encoder. As published by MMSR and PMMRec: 1e-6,
    with ``nextitnet`` 1e-8."""

    def check(self) -> None:
        """Raise a UserError unless ``dim`` is a multiple of ``heads``."""
        super().check()
        check_multiple(self, "dim", "heads")

    def transformer(self, *, attention_dropout: float, causal: bool) -> Transformer:
        """Return a new transformer with these settings."""
        config = BlockConfig(
            dim=self.dim,
            heads=self.heads,
            hidden=self.hidden,
            dropout=self.dropout,
            attention_dropout=attention_dropout,
            causal=causal,
            activation=self.activation,
            attention_bias=self.attention_bias,
            inner_dropout=self.inner_dropout,
            norm_eps=self.norm_eps,
        )
        return Transformer(config, layers=self.layers, final_norm=self.final_norm)


class SequenceEncoder(nn.Module, ABC):
    """Base class of causal encoders of the item vectors of a history.

    Args:
        settings: Settings of the encoder.
        attention_dropout: Dropout probability of attention weights; ignored without attention.
    """

    def __init__(self, settings: SequenceSettings, attention_dropout: float) -> None:
        super().__init__()
        self.settings = settings

    @abstractmethod
    def forward(self, x_BLD: Tensor, lengths_B: Tensor) -> Tensor:
        """Return the state after each item: (B, L, D).

        Args:
            x_BLD: Item vectors, padded on the right.
            lengths_B: (B,) int64, the number of items of each sequence, at least 1.
        """


class SASRecEncoder(SequenceEncoder):
    """Causal self-attention (Kang and McAuley, ICDM 2018).

    Learned positions count from the newest item.

    Args:
        settings: Settings of the encoder.
        attention_dropout: Dropout probability of attention weights.
        is_causal: If false, a state depends on all items of the sequence (for pre-training).
    """

    def __init__(
        self, settings: SequenceSettings, attention_dropout: float, *, is_causal: bool = True
    ) -> None:
        super().__init__(settings, attention_dropout)
        self.is_causal = is_causal
        self.position = nn.Embedding(settings.length, settings.dim)
        self.norm = nn.LayerNorm(settings.dim, eps=settings.norm_eps)
        self.transformer = settings.transformer(
            attention_dropout=attention_dropout, causal=is_causal
        )

    def forward(self, x_BLD: Tensor, lengths_B: Tensor) -> Tensor:
        """Return the state after each item: (B, L, D)."""
        x_BLD = x_BLD + self.position(positions_from_end(lengths_B, x_BLD.shape[1]))
        x_BLD = dropout(self.norm(x_BLD), self.settings.dropout, self.training)
        mask_BL = None
        if not self.is_causal:
            mask_BL = torch.arange(x_BLD.shape[1], device=x_BLD.device) < lengths_B[:, None]
        states_BLD: Tensor = self.transformer(x_BLD, mask_BL)
        return states_BLD


class GRUEncoder(SequenceEncoder):
    """GRU4Rec (Hidasi et al., arXiv:1511.06939): a GRU without biases, then a linear layer."""

    def __init__(self, settings: SequenceSettings, attention_dropout: float) -> None:
        super().__init__(settings, attention_dropout)
        self.gru = nn.GRU(
            settings.dim, settings.dim, num_layers=settings.layers, bias=False, batch_first=True
        )
        self.out = nn.Linear(settings.dim, settings.dim)

    def forward(self, x_BLD: Tensor, lengths_B: Tensor) -> Tensor:
        """Return the state after each item: (B, L, D)."""
        hidden_BLD, _ = self.gru(dropout(x_BLD, self.settings.dropout, self.training))
        states_BLD: Tensor = self.out(hidden_BLD)
        return states_BLD


class NextItNetEncoder(SequenceEncoder):
    """NextItNet (Yuan et al., WSDM 2019): residual blocks of dilated causal convolutions.

    A layer is two residual blocks (Figure 3b of the paper), with dilations 1 and 4. Each block has
    two convolutions: one with the dilation of the block, and one with twice the dilation.
    """

    def __init__(self, settings: SequenceSettings, attention_dropout: float) -> None:
        super().__init__(settings, attention_dropout)
        dilations = _DILATIONS * settings.layers
        self.blocks = nn.ModuleList(_Residual(settings, dilation) for dilation in dilations)
        self.out = nn.Linear(settings.dim, settings.dim)

    def forward(self, x_BLD: Tensor, lengths_B: Tensor) -> Tensor:
        """Return the state after each item: (B, L, D)."""
        x_BLD = dropout(x_BLD, self.settings.dropout, self.training)
        for block in self.blocks:
            x_BLD = block(x_BLD)
        states_BLD: Tensor = self.out(x_BLD)
        return states_BLD


class _Residual(nn.Module):
    def __init__(self, settings: SequenceSettings, dilation: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            CausalConvolution(settings.dim, dilation * factor) for factor in (1, 2)
        )
        self.norms = nn.ModuleList(
            nn.LayerNorm(settings.dim, eps=settings.norm_eps) for _ in range(2)
        )

    def forward(self, x_BLD: Tensor) -> Tensor:
        y_BLD = x_BLD
        for convolve, norm in zip(self.convolutions, self.norms, strict=True):
            y_BLD = norm(convolve(y_BLD)).relu()
        return x_BLD + y_BLD


class CausalConvolution(nn.Module):
    """out_t = sum_k W_k x_(t - (2 - k) dilation) + b; inputs before the sequence are zero.

    The convolution is one linear layer over the three shifted inputs. It is initialised like the
    other linear layers, and is faster on a CPU than a dilated convolution over short sequences.
    """

    def __init__(self, dim: int, dilation: int) -> None:
        super().__init__()
        self.dilation = dilation
        self.map = nn.Linear(_KERNEL * dim, dim)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Return the convolved sequence: (B, L, D)."""
        length = x_BLD.shape[1]
        reach = (_KERNEL - 1) * self.dilation
        padded_BPD = functional.pad(x_BLD, (0, 0, reach, 0))
        shifted = [
            padded_BPD[:, k * self.dilation : k * self.dilation + length] for k in range(_KERNEL)
        ]
        out_BLD: Tensor = self.map(torch.cat(shifted, dim=-1))
        return out_BLD


def last_state(states_BLD: Tensor, sequences: Sequences) -> Tensor:
    """Return the state at the last item of each sequence: (B, D)."""
    rows_B = torch.arange(states_BLD.shape[0], device=states_BLD.device)
    return states_BLD[rows_B, sequences.lengths_B - 1]


def take_slots(x_BLD: Tensor, slot_M: Tensor) -> Tensor:
    """Return the vectors of some slots: (M, D).

    Args:
        x_BLD: A vector for each slot.
        slot_M: (M,) int64, indices of slots in the flattened B x L.
    """
    return x_BLD.flatten(0, 1).index_select(0, slot_M)
