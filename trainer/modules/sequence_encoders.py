"""Sequence towers over item vectors: self-attention, recurrence, dilated convolutions.

All are causal: the state at a position depends on the items up to it. Sequences are padded on the
right, where no causal tower looks, so padding changes nothing.

Legend: B batch, L sequence length, D width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.data.batches import Sequences
from trainer.kernels.elementwise import dropout
from trainer.modules.transformer import Transformer, positions_from_end

_KERNEL = 3  # of NextItNet's convolutions
_DILATIONS = (1, 4)  # of the two residual blocks that a layer of NextItNet holds


@dataclass(frozen=True, kw_only=True, slots=True)
class TowerConfig:
    """What a sequence tower is built from."""

    dim: int
    """Width D of item vectors and states."""
    layers: int = 2
    """Blocks: of MMSR's paper 2, 4 and 2 for sasrec, gru and nextitnet."""
    heads: int = 2
    """Attention heads (sasrec)."""
    hidden: int = 1024
    """Width of the feed-forward networks (sasrec)."""
    length: int = 20
    """Most items of a sequence."""
    dropout: float = 0.1
    """Probability, on the items and inside."""


class SASRecTower(nn.Module):
    """Causal self-attention (Kang and McAuley, ICDM 2018), as in ``trainer.models.sasrec``."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.config = config
        self.position = nn.Embedding(config.length, config.dim)
        self.norm = nn.LayerNorm(config.dim)
        self.transformer = Transformer(
            layers=config.layers,
            dim=config.dim,
            heads=config.heads,
            hidden=config.hidden,
            dropout=config.dropout,
            attention_dropout=config.dropout,
            causal=True,
        )

    def forward(self, x_BLD: Tensor, lengths_B: Tensor) -> Tensor:
        """The state after each item: (B, L, D)."""
        x_BLD = x_BLD + self.position(positions_from_end(lengths_B, x_BLD.shape[1]))
        x_BLD = dropout(self.norm(x_BLD), self.config.dropout, self.training)
        states_BLD: Tensor = self.transformer(x_BLD)
        return states_BLD


class GRUTower(nn.Module):
    """GRU4Rec (Hidasi et al., arXiv:1511.06939): a GRU without biases and a linear map after it."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.config = config
        self.gru = nn.GRU(
            config.dim, config.dim, num_layers=config.layers, bias=False, batch_first=True
        )
        self.out = nn.Linear(config.dim, config.dim)

    def forward(self, x_BLD: Tensor, lengths_B: Tensor) -> Tensor:
        """The state after each item: (B, L, D)."""
        hidden_BLD, _ = self.gru(dropout(x_BLD, self.config.dropout, self.training))
        states_BLD: Tensor = self.out(hidden_BLD)
        return states_BLD


class NextItNetTower(nn.Module):
    """NextItNet (Yuan et al., WSDM 2019): residual blocks of dilated causal convolutions.

    A layer is two residual blocks (its Figure 3b), with dilations 1 and 4; each block convolves
    with its dilation and with twice that.
    """

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.config = config
        dilations = _DILATIONS * config.layers
        self.blocks = nn.ModuleList(_Residual(config.dim, dilation) for dilation in dilations)
        self.out = nn.Linear(config.dim, config.dim)

    def forward(self, x_BLD: Tensor, lengths_B: Tensor) -> Tensor:
        """The state after each item: (B, L, D)."""
        x_BLD = dropout(x_BLD, self.config.dropout, self.training)
        for block in self.blocks:
            x_BLD = block(x_BLD)
        states_BLD: Tensor = self.out(x_BLD)
        return states_BLD


class _Residual(nn.Module):
    def __init__(self, dim: int, dilation: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            _CausalConvolution(dim, dilation * factor) for factor in (1, 2)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))

    def forward(self, x_BLD: Tensor) -> Tensor:
        y_BLD = x_BLD
        for convolve, norm in zip(self.convolutions, self.norms, strict=True):
            y_BLD = norm(convolve(y_BLD)).relu()
        return x_BLD + y_BLD


class _CausalConvolution(nn.Module):
    """out_t = sum_k W_k x_(t - (2 - k) dilation) + b; before the sequence stands zero.

    One matrix product over the three shifted inputs side by side: a linear layer, so that it is
    drawn like the others, and faster on a CPU than a dilated convolution over short sequences.
    """

    def __init__(self, dim: int, dilation: int) -> None:
        super().__init__()
        self.dilation = dilation
        self.map = nn.Linear(_KERNEL * dim, dim)

    def forward(self, x_BLD: Tensor) -> Tensor:
        length = x_BLD.shape[1]
        reach = (_KERNEL - 1) * self.dilation
        padded_BPD = functional.pad(x_BLD, (0, 0, reach, 0))
        shifted = [
            padded_BPD[:, k * self.dilation : k * self.dilation + length] for k in range(_KERNEL)
        ]
        out_BLD: Tensor = self.map(torch.cat(shifted, dim=-1))
        return out_BLD


TOWERS: dict[str, type[nn.Module]] = {
    "sasrec": SASRecTower,
    "gru": GRUTower,
    "nextitnet": NextItNetTower,
}


def last_state(states_BLD: Tensor, sequences: Sequences) -> Tensor:
    """The state at each sequence's last item: (B, D)."""
    rows_B = torch.arange(len(states_BLD), device=states_BLD.device)
    return states_BLD[rows_B, sequences.lengths_B - 1]
