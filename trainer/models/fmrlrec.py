"""fMRLRec (Wang et al., EMNLP 2024): nested widths over one linear recurrent block.

The features of an item, each modality scaled to length 1, are concatenated and mapped by a linear
layer. One pre-norm block reads the vectors of a history: a linear recurrent unit (Orvieto et al.,
ICML 2023) and a gated feed-forward network. Each map of the block is block-triangular over the
widths 8, 16, ..., D, so that the first s elements of all vectors are a complete model of width s
for each of these widths. The loss is the mean of the next-item losses at all widths; the ranking
uses the full width. There are no item ids, and an item without features is the bias alone.

Differences from the released code (yueqirex/fMRLRec, 8eb7d97): there the first item of a user is a
target as well, after an empty slot, and each epoch has one row for each user, its newest items.

Legend: B batch, L sequence length, K items, W width of the features, D width.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.config import LayerCount, PositiveInt, Probability
from trainer.data.batches import Batch, ItemFeatures
from trainer.kernels.elementwise import dropout
from trainer.losses.base import ItemVectors
from trainer.models.base import Catalogue
from trainer.models.causal import CausalSettings
from trainer.models.item_features import FeatureRecommender
from trainer.modules.sequence_encoders import SequenceEncoder, take_slots

_LARGEST_RADIUS = 0.1  # of the initial recurrence: a memory of about one step


@dataclass(frozen=True, kw_only=True)
class FMRLRecConfig(CausalSettings):
    """Settings of fMRLRec."""

    dim: PositiveInt = 256
    """Largest width (the paper: 1024)."""
    least_width: PositiveInt = 8
    """Smallest nested width; each other width is twice the one before, up to ``dim``."""
    layers: LayerCount = 1
    length: PositiveInt = 50
    dropout: Probability = 0.1
    """Dropout probability of item vectors and in the block (the paper, for Beauty: 0.6)."""

    @property
    def widths(self) -> tuple[int, ...]:
        """The nested widths, ascending; the last one is ``dim``."""
        doublings = range(max(1, self.dim // self.least_width).bit_length())
        smaller = [self.least_width << number for number in doublings]
        return *(width for width in smaller if width < self.dim), self.dim


class FMRLRec(FeatureRecommender):
    """A linear recurrent unit over features, trained at several nested widths.

    Raises:
        UserError: There are no features.
    """

    settings_class = FMRLRecConfig
    settings: FMRLRecConfig
    unread = (
        "heads",
        "hidden",
        "activation",
        "final_norm",
        "attention_bias",
        "inner_dropout",
    )
    train_defaults: ClassVar = {"monitor": "NDCG@10"}
    presets: ClassVar = {
        "published": {  # for Amazon Beauty
            "dim": 1024,
            "dropout": 0.6,
            "lr": 1e-4,
            "batch_size": 32,
            "clip": 5.0,
            "schedule": "cosine",
            "warmup": 100,
            "epochs": 500,
        }
    }
    reverse_positions: ClassVar = ()

    def __init__(self, settings: FMRLRecConfig, catalogue: Catalogue) -> None:
        super().__init__(settings, catalogue)
        self.item_encoder = _Projection(settings, catalogue.widths)
        self.sequence_encoder = _Encoder(settings)

    def encode_some(self, items_K: Tensor, features: ItemFeatures) -> Tensor:
        """Encode the given items from their features: (K, D)."""
        vectors_KD: Tensor = self.item_encoder(items_K, features)
        return vectors_KD

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return the mean of the next-item losses at all widths."""
        settings = self.settings
        inputs, targets, slot_M = self.targets(batch)
        drawn = self.next_item_loss.draw(targets, batch)
        items = self.batch_items(batch, drawn)
        state_MD = take_slots(self.states(items, inputs), slot_M)
        losses = []
        for width in settings.widths:
            vectors = settings.normalise(items.vectors_KD[:, :width])
            scored = ItemVectors(vectors_KD=vectors, ids_K=items.ids_K)
            query = settings.normalise(state_MD[:, :width])
            losses.append(self.next_item_loss(query, scored, targets, batch, drawn))
        return {"loss": torch.stack(losses).mean()}


class _Projection(nn.Module):
    """One linear layer over the concatenated features; an absent modality is zero."""

    def __init__(self, settings: FMRLRecConfig, widths: Mapping[str, int]) -> None:
        super().__init__()
        self.inputs = nn.ModuleDict(
            {name: nn.Linear(width, settings.dim, bias=False) for name, width in widths.items()}
        )
        self.bias_D = nn.Parameter(torch.zeros(settings.dim))
        bound = sum(widths.values()) ** -0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, items_K: Tensor, features: ItemFeatures) -> Tensor:
        """Return the item vectors: (K, D)."""
        vectors_KD = self.bias_D.expand(len(items_K), -1)
        for name, project in self.inputs.items():
            unit_KW = functional.normalize(features.rows(name, items_K), dim=-1)
            vectors_KD = vectors_KD + project(unit_KW) * features.present[name][items_K, None]
        return vectors_KD


class _Encoder(SequenceEncoder):
    def __init__(self, settings: FMRLRecConfig) -> None:
        super().__init__(settings, settings.dropout)
        self.blocks = nn.ModuleList(_Block(settings) for _ in range(settings.layers))

    def forward(self, x_BLD: Tensor, lengths_B: Tensor) -> Tensor:
        """Return the state after each item: (B, L, D)."""
        x_BLD = dropout(x_BLD, self.settings.dropout, self.training)
        for block in self.blocks:
            x_BLD = block(x_BLD)
        return x_BLD


class _Block(nn.Module):
    """x + LRU(LN(x)), then x + W_2 (SiLU(W_g z) W_1 z) with z = LN(x)."""

    def __init__(self, settings: FMRLRecConfig) -> None:
        super().__init__()
        self.probability = settings.dropout
        widths = settings.widths
        self.norm_recurrence = NestedNorm(widths, settings.norm_eps)
        self.recurrence = LinearRecurrence(widths)
        self.norm_feed = NestedNorm(widths, settings.norm_eps)
        self.gate, self.up, self.down = (NestedLinear(widths) for _ in range(3))

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Return the output of the block: (B, L, D)."""
        state_BLD = self.recurrence(self.norm_recurrence(x_BLD))
        x_BLD = x_BLD + dropout(state_BLD, self.probability, self.training)
        z_BLD = self.norm_feed(x_BLD)
        up_BLD = dropout(self.up(z_BLD), self.probability, self.training)
        fed_BLD = self.down(functional.silu(self.gate(z_BLD)) * up_BLD)
        return x_BLD + dropout(fed_BLD, self.probability, self.training)


class NestedLinear(nn.Module):
    """A block-triangular linear map: outputs s_(k-1) to s_k read the first s_k inputs.

    Args:
        widths: The nested widths s_1 < s_2 < ...
        bias: Whether the map has biases.
    """

    def __init__(self, widths: Sequence[int], *, bias: bool = True) -> None:
        super().__init__()
        self.widths = tuple(widths)
        self.parts = nn.ModuleList(
            nn.Linear(width, width - before, bias=bias)
            for before, width in zip((0, *widths), widths, strict=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the mapped vectors: (..., D)."""
        mapped = [part(x[..., :width]) for part, width in zip(self.parts, self.widths, strict=True)]
        return torch.cat(mapped, dim=-1)


class NestedNorm(nn.Module):
    """A LayerNorm of each range s_(k-1) to s_k.

    Args:
        widths: The nested widths s_1 < s_2 < ...
        eps: Epsilon of the LayerNorms.
    """

    def __init__(self, widths: Sequence[int], eps: float) -> None:
        super().__init__()
        self.sizes = [width - before for before, width in zip((0, *widths), widths, strict=False)]
        self.parts = nn.ModuleList(nn.LayerNorm(size, eps=eps) for size in self.sizes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised vectors: (..., D)."""
        ranges = x.split(self.sizes, dim=-1)
        normed = [part(values) for part, values in zip(self.parts, ranges, strict=True)]
        return torch.cat(normed, dim=-1)


class LinearRecurrence(nn.Module):
    """y_t = Re(W_out h_t + b_out), h_t = lambda h_(t-1) + gamma (W_in x_t + b_in), complex.

    lambda = exp(-exp(nu) + i exp(theta)), and gamma = exp(g). The sequence is computed in
    log2(L) steps, each of which doubles the reach: after step i, h_t has the terms of 2^i slots.

    Args:
        widths: The nested widths of the maps.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        dim = widths[-1]
        # The squared radius of lambda is uniform in (0, 0.01), and its phase in (0, 2 pi).
        radius_D = _LARGEST_RADIUS * torch.rand(dim).clamp_min(1e-6).sqrt()
        phase_D = 2 * math.pi * torch.rand(dim).clamp_min(1e-6)
        self.nu_D = nn.Parameter((-radius_D.log()).log())
        self.theta_D = nn.Parameter(phase_D.log())
        self.gamma_D = nn.Parameter((1 - radius_D.square()).sqrt().log())
        self.in_real, self.in_imaginary = NestedLinear(widths), NestedLinear(widths)
        # The real part of the output has no imaginary bias.
        self.out_real, self.out_imaginary = NestedLinear(widths), NestedLinear(widths, bias=False)
        for part in (self.in_imaginary, self.out_imaginary):  # complex maps start real
            for parameter in part.parameters():
                nn.init.zeros_(parameter)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Return the output after each slot: (B, L, D)."""
        with torch.autocast(x_BLD.device.type, enabled=False):  # complex numbers have no bfloat16
            if x_BLD.dtype not in (torch.float32, torch.float64):
                x_BLD = x_BLD.float()
            log_lambda_D = torch.complex(-self.nu_D.exp(), self.theta_D.exp())
            gamma_D = self.gamma_D.exp()
            h_BLD = torch.complex(gamma_D * self.in_real(x_BLD), gamma_D * self.in_imaginary(x_BLD))
            reach = 1
            while reach < x_BLD.shape[1]:
                before_BLD = functional.pad(h_BLD[:, :-reach], (0, 0, reach, 0))
                h_BLD = h_BLD + (reach * log_lambda_D).exp() * before_BLD
                reach *= 2
            out_BLD: Tensor = self.out_real(h_BLD.real) - self.out_imaginary(h_BLD.imag)
            return out_BLD
