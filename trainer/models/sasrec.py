"""SASRec (Kang and McAuley, ICDM 2018): the baseline of item ids.

A causal transformer over learned item vectors. It differs from the paper where later work showed
the paper's choice to be the weaker one: a full softmax over the catalogue instead of one sampled
negative (Klenitskiy and Vasilev, RecSys 2023), windows over the whole history, and BERT's order of
layers (a LayerNorm on the embedded items, post-LN blocks, GELU). ``score=cosine`` trains on
cosines, as MMSRec does. There is no dropout on attention weights: on ml-100k it gave nothing on
validation, and without it attention needs no L x L matrix.

Legend: B batch, L sequence length, N items, D width, M predicted positions.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from features.errors import unknown
from trainer.checks import (
    check_heads,
    check_not_negative,
    check_positive,
    check_probability,
    check_temperature,
)
from trainer.data.batches import Batch, ItemFeatures, Sequences
from trainer.data.windows import WindowSampling
from trainer.kernels.elementwise import dropout
from trainer.losses.softmax import draw_candidates, full_softmax, part_softmax
from trainer.models.base import Catalogue, Recommender
from trainer.modules.transformer import Transformer, initialise, positions_from_end

_SCORES = ("dot", "cosine")


@dataclass(frozen=True, kw_only=True, slots=True)
class SASRecConfig:
    """Hyper-parameters of SASRec."""

    dim: int = 64
    """Width of item vectors and of the transformer."""
    layers: int = 2
    """Transformer blocks."""
    heads: int = 2
    """Attention heads."""
    hidden: int = 256
    """Width of the feed-forward networks."""
    length: int = 50
    """Most items of a history that are read."""
    dropout: float = 0.4
    """Probability, in the transformer and on the embedded items."""
    score: str = "dot"
    """What ranks: ``dot``, the inner product, or ``cosine``, which keeps popular items from growing
    longer than others."""
    temperature: float = 1.0
    """Divides the scores in the loss; a cosine needs one of about 0.1."""
    candidates: int = 0
    """Items that the softmax of a step runs over: the targets, and others drawn evenly that stand
    for all the rest; 0: the whole catalogue."""

    def __post_init__(self) -> None:
        check_positive(self, "dim", "layers", "heads", "hidden", "length")
        check_temperature(self, "temperature")
        check_probability(self, "dropout")
        check_not_negative(self, "candidates")
        check_heads(self.dim, self.heads)
        if self.score not in _SCORES:
            raise unknown("score", self.score, list(_SCORES))


class SASRec(Recommender):
    """Self-attentive sequential recommendation over item ids."""

    transfer_groups: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "items": ("item.",),
        "users": ("position.", "norm.", "transformer."),
    }
    item_tables = ("item.",)
    reverse_positions = ("position.weight",)

    def __init__(self, config: SASRecConfig, catalogue: Catalogue) -> None:
        super().__init__()
        self.config = config
        self.item = nn.Embedding(catalogue.n_items, config.dim)
        self.position = nn.Embedding(config.length, config.dim)
        self.norm = nn.LayerNorm(config.dim)
        self.transformer = Transformer(
            layers=config.layers,
            dim=config.dim,
            heads=config.heads,
            hidden=config.hidden,
            dropout=config.dropout,
            attention_dropout=0.0,
            causal=True,
        )
        initialise(self)

    @property
    def window_sampling(self) -> WindowSampling:
        """Windows over the whole history: every interaction is a target, the newest up to twice."""
        return WindowSampling(
            length=self.config.length + 1, stride=self.config.length, every_target=True
        )

    @property
    def history(self) -> int:
        """Most items of a history that are read."""
        return self.config.length

    def encode_items(self, features: ItemFeatures) -> Tensor:
        """The learned item vectors (N, D), with ``score=cosine`` each of length 1."""
        return self._scored(self.item.weight)

    def encode_sequences(
        self, item_vectors_ND: Tensor, sequences: Sequences, features: ItemFeatures
    ) -> Tensor:
        """The state at each history's last item: (B, D), with ``score=cosine`` of length 1."""
        hidden_BLD = self._hidden(sequences)
        rows_B = torch.arange(len(hidden_BLD), device=hidden_BLD.device)
        return hidden_BLD[rows_B, sequences.lengths_B - 1]

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy of the next item at every position of every window."""
        item_ND = self.encode_items(batch.features)
        windows = batch.sequences
        inputs = Sequences(
            items_BL=windows.items_BL[:, :-1], lengths_B=(windows.lengths_B - 1).clamp_min(1)
        )
        hidden_BLD = self._hidden(inputs)
        valid_BL = windows.mask_BL[:, 1:]
        target_M = windows.items_BL[:, 1:][valid_BL]
        query_MD = hidden_BLD[valid_BL]
        scale = 1 / self.config.temperature
        if not self.config.candidates:
            return {"loss": full_softmax(query_MD, item_ND, target_M, scale)}
        draw = batch.generator
        part = draw_candidates(target_M, len(item_ND), self.config.candidates, draw)
        item_KD = functional.embedding(part.items_K, item_ND)
        return {"loss": part_softmax(query_MD, item_KD, part, scale)}

    def _hidden(self, sequences: Sequences) -> Tensor:
        items_BL = sequences.items_BL
        positions_BL = positions_from_end(sequences.lengths_B, items_BL.shape[1])
        x_BLD = self.item(items_BL) + self.position(positions_BL)
        x_BLD = dropout(self.norm(x_BLD), self.config.dropout, self.training)
        return self._scored(self.transformer(x_BLD))

    def _scored(self, x: Tensor) -> Tensor:
        return functional.normalize(x, dim=-1) if self.config.score == "cosine" else x
