"""BERT4Rec (Sun et al., CIKM 2019): a bidirectional transformer that predicts masked items.

In training the mask token replaces some items of a window, and the model predicts these items from
both sides (a Cloze task, section 3.6 of the paper). To predict the next item, the mask token is
appended to the history. Because the paper trains on windows whose last item alone is masked as
well, a share ``last_share`` of the rows is masked so.

A head maps the state of a masked slot to a query, GELU(h W + b) with a LayerNorm, and each item has
a bias (Eq. 7). The bias is the last element of the item vector, and that element of a query is 1.

The paper trains on the validation items, writes ten masked copies of each window beforehand, and
ranks 101 items. Here validation and test items are never trained on, the masks are drawn in each
step, and the whole catalogue is ranked.

Legend: B batch, L sequence length, N items, M masked positions, D width.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.config import Choice, LayerCount, PositiveInt, Probability, Range
from trainer.data.batches import Batch, ItemFeatures, Sequences
from trainer.data.device_copy import to_device
from trainer.data.windows import WindowSampling
from trainer.kernels.elementwise import dropout
from trainer.losses.base import DrawnItems, ItemVectors, Loss, LossSettings, targets_at
from trainer.losses.registry import LOSSES
from trainer.models.base import Catalogue, Recommender
from trainer.modules.sequence_encoders import SequenceSettings, last_state, take_slots
from trainer.modules.tokens import all_exist
from trainer.modules.transformer import initialise, positions_from_end


@dataclass(frozen=True, kw_only=True)
class BERT4RecConfig(SequenceSettings, LossSettings):
    """Settings of BERT4Rec; presets ``published`` for Beauty and ``published-dense`` for ML-1M."""

    dim: PositiveInt = 64
    layers: LayerCount = 2
    heads: PositiveInt = 2
    hidden: PositiveInt = 256
    length: PositiveInt = 49
    """Largest number of items of a history that are read; the paper's 50 slots include the mask
    token."""
    dropout: Probability = 0.2
    loss: Annotated[str, Choice("loss", LOSSES)] = "softmax"
    """Loss of the masked items: ``softmax`` over the catalogue (the paper) or ``candidates``,
    ``in-batch`` over the items of the batch, ``bce`` with one sampled negative."""
    mask_ratio: Probability = 0.2
    """Share of the items of a window that are masked (the paper: 0.2 for ML-1M, 0.6 for Beauty)."""
    last_share: Annotated[
        float, Range(0, 1, "in [0, 1]", includes_high=True)
    ] = 0.1  # fmt: skip
    """Share of the rows whose last item alone is masked (the paper: 1 of 11)."""
    stride: PositiveInt = 25
    """Interactions between two windows of a user."""


class BERT4Rec(Recommender):
    """Masked item prediction over item ids."""

    settings_class = BERT4RecConfig
    settings: BERT4RecConfig
    train_defaults: ClassVar = {"monitor": "NDCG@10"}
    presets: ClassVar = {
        "published": {
            "batch_size": 256,
            "dropout": 0.5,
            "mask_ratio": 0.6,
            "stride": 5,
            "final_norm": False,
            "norm_eps": 1e-12,
            "inner_dropout": False,
            "lr": 1e-4,
            "warmup": 100,
            "clip": 5.0,
        },
        "published-dense": {
            "batch_size": 256,
            "length": 199,
            "mask_ratio": 0.2,
            "stride": 100,
            "final_norm": False,
            "norm_eps": 1e-12,
            "inner_dropout": False,
            "lr": 1e-4,
            "warmup": 100,
            "clip": 5.0,
        },
    }
    item_tables = ("item.", "bias_N1")
    transfer_groups: ClassVar = {"users": ("position.", "mask_D", "norm.", "transformer.", "head.")}
    reverse_positions = ("position.weight",)

    def __init__(self, settings: BERT4RecConfig, catalogue: Catalogue) -> None:
        super().__init__(settings, catalogue)
        dim = settings.dim
        self.item = nn.Embedding(catalogue.n_items, dim)
        self.bias_N1 = nn.Parameter(torch.zeros(catalogue.n_items, 1))
        self.mask_D = nn.Parameter(0.02 * torch.randn(dim))
        self.position = nn.Embedding(settings.length + 1, dim)
        self.norm = nn.LayerNorm(dim, eps=settings.norm_eps)
        self.transformer = settings.transformer(attention_dropout=settings.dropout, causal=False)
        self.head = nn.Sequential(
            nn.Linear(dim, dim), nn.GELU(), nn.LayerNorm(dim, eps=settings.norm_eps)
        )
        self.masked_loss: Loss = LOSSES.find(settings.loss)(settings)
        initialise(self)

    @property
    def window_sampling(self) -> WindowSampling:
        """Windows with random ends."""
        return WindowSampling(
            length=self.settings.length + 1, stride=self.settings.stride, every_target=False
        )

    @property
    def history(self) -> int:
        """Largest number of items of a history that are read; the mask token follows them."""
        return self.settings.length

    def encode_items(self, features: ItemFeatures) -> Tensor:
        """Return the learned item vectors with the item's bias as the last element: (N, D + 1)."""
        return torch.cat([self.settings.normalise(self.item.weight), self.bias_N1], dim=1)

    def encode_sequences(
        self, item_vectors_ND: Tensor, sequences: Sequences, features: ItemFeatures
    ) -> Tensor:
        """Encode the mask token appended to each history: (B, D + 1)."""
        extended = Sequences(
            items_BL=functional.pad(sequences.items_BL, (0, 1)), lengths_B=sequences.lengths_B + 1
        )
        columns_L = torch.arange(extended.items_BL.shape[1], device=extended.items_BL.device)
        is_masked_BL = columns_L == sequences.lengths_B[:, None]
        states_BLD = self._states(extended, is_masked_BL)
        return self._queries(last_state(states_BLD, extended))

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return the loss of the masked items."""
        windows = batch.sequences.on_host
        is_masked_BL = self._draw_masks(windows, batch.generator)
        history_BL = windows.items_BL if self.masked_loss.reads_history else None
        targets, slot_M = targets_at(
            is_masked_BL, windows.items_BL, history_BL=history_BL, includes_slot=False
        )
        targets = targets.to(batch.device)
        is_masked_BL, slot_M = (to_device(x, batch.device) for x in (is_masked_BL, slot_M))
        drawn = self.masked_loss.draw(targets, batch)
        items = self._loss_items(batch, drawn)
        states_BLD = self._states(batch.sequences, is_masked_BL)
        query_ME = self._queries(take_slots(states_BLD, slot_M))
        return {"loss": self.masked_loss(query_ME, items, targets, batch, drawn)}

    def _loss_items(self, batch: Batch, drawn: DrawnItems | None) -> ItemVectors:
        """Return the vectors of the items that the loss scores."""
        if self.masked_loss.needs_catalogue:
            return ItemVectors(vectors_KD=self.encode_items(batch.features))
        ids_K = batch.distinct_items(None if drawn is None else drawn.on_host.items_X)
        vectors_KD = self.settings.normalise(self.item(ids_K))
        bias_K1 = functional.embedding(ids_K, self.bias_N1)
        return ItemVectors(vectors_KD=torch.cat([vectors_KD, bias_K1], dim=1), ids_K=ids_K)

    def row_tables(self) -> list[nn.Embedding]:
        """Return the table of item vectors if the loss reads a part of it."""
        return [] if self.masked_loss.needs_catalogue else [self.item]

    def _draw_masks(self, sequences: Sequences, generator: torch.Generator) -> Tensor:
        """Return (B, L) bool, true at the items to predict; each row has at least one."""
        valid_BL = sequences.mask_BL
        random_BL = torch.rand(valid_BL.shape, generator=generator)
        only_last_B1 = torch.rand(len(valid_BL), 1, generator=generator)
        columns_L = torch.arange(valid_BL.shape[1])
        is_last_BL = columns_L == sequences.lengths_B[:, None] - 1
        # The item with the smallest number is masked in every row.
        random_BL = random_BL.masked_fill(~valid_BL, 2.0)
        least_BL = random_BL == random_BL.amin(1, keepdim=True)
        chosen_BL = ((random_BL < self.settings.mask_ratio) | least_BL) & valid_BL
        return torch.where(only_last_B1 < self.settings.last_share, is_last_BL, chosen_BL)

    def _states(self, sequences: Sequences, is_masked_BL: Tensor) -> Tensor:
        """Return the state of each slot: (B, L, D)."""
        valid_BL = sequences.mask_BL
        items_BL = torch.where(valid_BL, sequences.items_BL, sequences.items_BL[:1, :1])
        x_BLD = torch.where(is_masked_BL[..., None], self.mask_D, self.item(items_BL))
        x_BLD = x_BLD + self.position(positions_from_end(sequences.lengths_B, valid_BL.shape[1]))
        x_BLD = dropout(self.norm(x_BLD), self.settings.dropout, self.training)
        states_BLD: Tensor = self.transformer(x_BLD, None if all_exist(valid_BL) else valid_BL)
        return states_BLD

    def _queries(self, states_MD: Tensor) -> Tensor:
        """Map states to queries (M, D + 1), whose last element multiplies the item's bias."""
        query_MD = self.settings.normalise(self.head(states_MD))
        return functional.pad(query_MD, (0, 1), value=1.0)
