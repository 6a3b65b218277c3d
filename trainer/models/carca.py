"""CARCA (Rashed et al., RecSys 2022), with text and image features: CARCA++ of MMSR and PMMRec.

An item of a history is a vector of its id, its features and the date of the interaction (Eq. 1 to
3 of the paper). Self-attention blocks read the history, and a candidate item, with the date of the
request, attends to their states (cross-attention, Eq. 8 to 11). The score of a candidate is a
linear map of the result, so it is not an inner product. There are no positions.

The date of the request is known when a list is asked for. In an evaluation it is the time of the
held-out interaction, as in the released code. Without times there is no context.

Differences from the released code:

- Its self-attention is not causal although each position has a target, so that all targets but the
  last are among the keys. Here an item attends to the items before it (``rows=windows``), or only
  the last item of a row is predicted (``rows=prefixes``).
- It multiplies the id vectors of histories by sqrt(D), and not those of candidates. Here an item
  has one vector.
- It cuts the dates of histories to whole numbers at test. Here dates are as in training.
- It ranks 101 candidates. Here the whole catalogue is ranked.

Legend: B batch, L sequence length, N items, C candidates, D width, W width of all features, H
heads, E width of a head, S dates of a moment (6), M predicted positions.
"""

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from features.errors import UserError
from trainer.config import (
    Choice,
    LayerCount,
    PositiveInt,
    Probability,
    WidthSettings,
    check_multiple,
)
from trainer.data.batches import Batch, ItemFeatures, Sequences
from trainer.data.device_copy import to_device
from trainer.data.negative_sampling import sample_unseen
from trainer.data.windows import WindowSampling
from trainer.kernels.elementwise import dropout
from trainer.losses.base import ItemVectors
from trainer.losses.bce import logits_bce
from trainer.models.base import Catalogue, Recommender
from trainer.models.causal import ROWS, next_item_targets, row_windows
from trainer.modules.sequence_encoders import last_state, take_slots

_DATES = 6
_EXPANSION = 5  # the width of joined features and dates is 5 D
_ELEMENTS = 2**23  # of the largest tensor of a block of scores


@dataclass(frozen=True, kw_only=True)
class CARCAConfig(WidthSettings):
    """Settings of CARCA. Sizes and dropout are those of the released code for Beauty."""

    dim: PositiveInt = 90
    layers: LayerCount = 3
    """Number of self-attention blocks."""
    heads: PositiveInt = 1
    """Number of attention heads."""
    length: PositiveInt = 75
    """Largest number of items of a history that are read."""
    dropout: Probability = 0.5
    """Dropout probability of attention weights and feed-forward networks."""
    residual: bool = True
    """Multiply the result of the cross-attention by the candidate (Beauty and Games: true; Men and
    Fashion: false)."""
    rows: Annotated[str, Choice("rows", ROWS)] = "windows"
    """``windows``: each window of a history is a row, and every item after the first is a target;
    ``prefixes``: each prefix of a history is a row, and the item after it is the only target."""

    def check(self) -> None:
        """Raise a UserError unless ``dim`` is a multiple of ``heads``."""
        super().check()
        check_multiple(self, "dim", "heads")


class CARCA(Recommender):
    """Self-attention over a history, and cross-attention of a candidate item.

    Raises:
        UserError: There are no features.
    """

    settings_class = CARCAConfig
    settings: CARCAConfig
    needs_features = True
    reads_times = True
    has_vectors = False
    train_defaults: ClassVar = {"batch_size": 128, "lr": 1e-3, "monitor": "NDCG@10"}
    presets: ClassVar = {
        "published": {
            "rows": "prefixes",
            "lr": 1e-4,
            "weight_decay": 1e-4,
            "clip": 0.0,
            "epochs": 1000,
            "validate_every": 20,
        }
    }
    item_tables = ("item.",)
    transfer_groups: ClassVar = {
        "items": ("item.", "features_map.", "context_map.", "join."),
        "users": ("blocks.", "norm.", "cross.", "out."),
    }

    def __init__(self, settings: CARCAConfig, catalogue: Catalogue) -> None:
        super().__init__(settings, catalogue)
        if not catalogue.widths:
            raise UserError(
                "carca needs features; run mmrec extract for this dataset, or train sasrec"
            )
        dim = settings.dim
        self.names = tuple(catalogue.widths)
        self.time_unit = catalogue.time_unit
        self.item = nn.Embedding(catalogue.n_items, dim)
        self.features_map = nn.Linear(sum(catalogue.widths.values()), _EXPANSION * dim)
        self.context_map = (
            nn.Linear(_DATES, _EXPANSION * dim, bias=False) if catalogue.time_unit else None
        )
        self.join = nn.Linear(dim + _EXPANSION * dim, dim)
        self.blocks = nn.ModuleList(_Block(settings) for _ in range(settings.layers))
        self.norm = nn.LayerNorm(dim, eps=1e-8)
        self.cross = _Attention(settings)
        self.out = nn.Linear(dim, 1)
        for part in self.modules():
            if isinstance(part, nn.Linear | nn.Embedding):
                nn.init.normal_(part.weight, std=0.01)
            if isinstance(part, nn.Linear) and part.bias is not None:
                nn.init.zeros_(part.bias)

    @property
    def remarks(self) -> tuple[str, ...]:
        """A sentence if there is no context."""
        if self.context_map is not None:
            return ()
        return ("carca: the interactions have no times, so there is no context of dates",)

    @property
    def window_sampling(self) -> WindowSampling:
        """Windows over whole histories, or a window for each prefix with ``rows=prefixes``."""
        return row_windows(self.settings.rows, self.settings.length)

    @property
    def history(self) -> int:
        """Largest number of items of a history that are read."""
        return self.settings.length

    def encode_items(self, features: ItemFeatures) -> Tensor:
        """Return the vectors of all items without a date: (N, D)."""
        return self.encode_some(
            torch.arange(features.n_items, device=self.item.weight.device), features
        )

    def encode_some(self, items_K: Tensor, features: ItemFeatures) -> Tensor:
        """Return the vectors of the given items without a date: (K, D)."""
        feature_KW = torch.cat([features.rows(name, items_K) for name in self.names], dim=1)
        joined = torch.cat([self.item(items_K), self.features_map(feature_KW)], dim=1)
        vectors_KD: Tensor = self.join(joined)
        return vectors_KD

    def row_tables(self) -> list[nn.Embedding]:
        """Return the table of item vectors, of which a step reads the items of its batch."""
        return [self.item]

    def encode_sequences(
        self, item_vectors_ND: Tensor, sequences: Sequences, features: ItemFeatures
    ) -> Tensor:
        """Return the state at each history's last item: (B, D). A score reads all states."""
        return last_state(self.states(item_vectors_ND, sequences), sequences)

    def states(self, item_vectors_ND: Tensor, sequences: Sequences) -> Tensor:
        """Return the states of the self-attention blocks: (B, L, D); those of padding are 0."""
        exists_BL = sequences.mask_BL
        items_BL = torch.where(exists_BL, sequences.items_BL, sequences.items_BL[:1, :1])
        x_BLD = functional.embedding(items_BL, item_vectors_ND)
        times_BL = sequences.on_host.times_BL
        if times_BL is not None:
            x_BLD = x_BLD + self._date_vectors(times_BL)
        x_BLD = dropout(x_BLD * exists_BL[..., None], self.settings.dropout, self.training)
        mask_BLL = self._reads(exists_BL)
        for block in self.blocks:
            x_BLD = block(x_BLD, mask_BLL) * exists_BL[..., None]
        states_BLD: Tensor = self.norm(x_BLD) * exists_BL[..., None]
        return states_BLD

    def score(self, item_vectors_ND: Tensor, sequences: Sequences, first: int, last: int) -> Tensor:
        """Return the scores of a block of items: (B, C)."""
        states_BLD = self.states(item_vectors_ND, sequences)
        candidate_CD = item_vectors_ND[first:last]
        rows = max(1, _ELEMENTS // (len(candidate_CD) * max(states_BLD.shape[1:])))
        blocks = []
        for begin in range(0, len(states_BLD), rows):
            part = slice(begin, begin + rows)
            candidate_BCD = candidate_CD.expand(len(states_BLD[part]), -1, -1)
            request_B = sequences.on_host.request_B
            if request_B is not None:
                request_B1D = self._date_vectors(request_B[part, None])
                candidate_BCD = candidate_BCD + request_B1D
            mask_B1L = sequences.mask_BL[part, None]
            blocks.append(self._logits(candidate_BCD, states_BLD[part], mask_B1L))
        return torch.cat(blocks)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return the binary cross-entropy with one sampled negative for each target."""
        times_BL = batch.sequences.on_host.times_BL
        inputs, targets, slot_M = next_item_targets(
            batch, only_last=self.settings.rows == "prefixes"
        )
        users_M = batch.users_on_host[targets.on_host.row_M]
        unseen = sample_unseen(batch.train, users_M, batch.generator)
        negative_M, exists_M = (to_device(x, batch.device) for x in unseen)
        ids_K = batch.distinct_items(unseen[0])
        items = ItemVectors(vectors_KD=self.encode_some(ids_K, batch.features), ids_K=ids_K)
        dates_BLD = None
        if times_BL is not None:
            dates_BLD = self._date_vectors(times_BL[:, 1:])
            inputs = replace(inputs.on_host, times_BL=times_BL[:, :-1]).to(batch.device)
        row_BL = items.rows(inputs.items_BL)
        states_BLD = self.states(items.vectors_KD, replace(inputs, items_BL=row_BL))
        logits = []
        for items_M in (targets.item_M, negative_M):
            candidate_BL = torch.zeros_like(inputs.items_BL)
            candidate_BL.view(-1)[slot_M] = items.rows(items_M)
            candidate_BLD = functional.embedding(candidate_BL, items.vectors_KD)
            if dates_BLD is not None:
                candidate_BLD = candidate_BLD + dates_BLD
            mask_BLL = torch.ones_like(self._reads(inputs.mask_BL)).tril() & inputs.mask_BL[:, None]
            logits_BL = self._logits(candidate_BLD, states_BLD, mask_BLL)
            logits.append(take_slots(logits_BL, slot_M).float())
        return {"loss": logits_bce(logits[0], logits[1], exists_M, int(unseen[1].sum()))}

    def _reads(self, exists_BL: Tensor) -> Tensor:
        """Return (B, L, L) bool, true where an item of a history may attend to another one."""
        mask_BLL = exists_BL[:, None].expand(-1, exists_BL.shape[1], -1)
        return mask_BLL.tril() if self.settings.rows == "windows" else mask_BLL

    def _logits(self, candidate_BCD: Tensor, states_BLD: Tensor, mask_BCL: Tensor) -> Tensor:
        """Return the scores of candidates (B, C) that attend to the states of a history."""
        read_BCD = self.cross(candidate_BCD, states_BLD, mask_BCL)
        if self.settings.residual:
            read_BCD = read_BCD * candidate_BCD
        logits_BC: Tensor = self.out(read_BCD)[..., 0]
        return logits_BC

    def _date_vectors(self, times: Tensor) -> Tensor:
        """Return what dates add to the vectors of items: (..., D); ``times`` are on the CPU."""
        assert self.context_map is not None
        assert self.time_unit is not None
        date_values = to_device(dates(times, self.time_unit), self.join.weight.device)
        context = self.context_map(date_values.to(self.join.weight.dtype))
        return functional.linear(context, self.join.weight[:, self.settings.dim :])


class _Attention(nn.Module):
    """Multi-head attention without an output projection; the maps have a leaky ReLU."""

    def __init__(self, settings: CARCAConfig) -> None:
        super().__init__()
        self.settings = settings
        self.query, self.key, self.value = (nn.Linear(settings.dim, settings.dim) for _ in range(3))

    def forward(self, query_BCD: Tensor, key_BLD: Tensor, mask_BCL: Tensor) -> Tensor:
        """Return the values that each query reads, zero where it may read nothing: (B, C, D)."""
        heads = self.settings.heads
        query_BHCE, key_BHLE, value_BHLE = (
            functional.leaky_relu(layer(x)).unflatten(-1, (heads, -1)).transpose(1, 2)
            for layer, x in ((self.query, query_BCD), (self.key, key_BLD), (self.value, key_BLD))
        )
        score_BHCL = query_BHCE @ key_BHLE.transpose(-1, -2) / query_BHCE.shape[-1] ** 0.5
        lowest = torch.finfo(score_BHCL.dtype).min
        weight_BHCL = score_BHCL.masked_fill(~mask_BCL[:, None], lowest).softmax(-1)
        weight_BHCL = dropout(weight_BHCL * mask_BCL[:, None], self.settings.dropout, self.training)
        read_BCD: Tensor = (weight_BHCL @ value_BHLE).transpose(1, 2).flatten(2)
        return read_BCD


class _Block(nn.Module):
    """Self-attention that multiplies the normalised query, and a feed-forward network."""

    def __init__(self, settings: CARCAConfig) -> None:
        super().__init__()
        self.settings = settings
        self.norm_query = nn.LayerNorm(settings.dim, eps=1e-8)
        self.norm_feed = nn.LayerNorm(settings.dim, eps=1e-8)
        self.attention = _Attention(settings)
        self.up = nn.Linear(settings.dim, settings.dim)
        self.down = nn.Linear(settings.dim, settings.dim)

    def forward(self, x_BLD: Tensor, mask_BLL: Tensor) -> Tensor:
        """Apply the block: (B, L, D)."""
        probability = self.settings.dropout
        query_BLD = self.norm_query(x_BLD)
        x_BLD = query_BLD * self.attention(query_BLD, x_BLD, mask_BLL)
        x_BLD = self.norm_feed(x_BLD)
        hidden_BLD = dropout(functional.leaky_relu(self.up(x_BLD)), probability, self.training)
        fed_BLD: Tensor = dropout(self.down(hidden_BLD), probability, self.training)
        return x_BLD + fed_BLD


def dates(times: Tensor, unit: str) -> Tensor:
    """Return the dates of times: (..., 6) float32, each about 0 to 1.

    The numbers are the year since 1970, the month, the day of the month, the weekday, the day of
    the year and the week of the year.

    Args:
        times: int64 times since 1970, on the CPU.
        unit: Unit of the times as numpy names it.
    """
    day = times.numpy().astype(f"datetime64[{unit}]").astype("datetime64[D]")
    month, year = day.astype("datetime64[M]"), day.astype("datetime64[Y]")
    day_of_year = (day - year).astype(np.int64)
    values = np.stack(
        [
            year.astype(np.int64) / 100,
            (month - year).astype(np.int64) / 11,
            (day - month).astype(np.int64) / 30,
            (day.astype(np.int64) + 3) % 7 / 6,  # 1970-01-01 was a Thursday; Monday is 0
            day_of_year / 365,
            day_of_year // 7 / 52,
        ],
        axis=-1,
    )
    return torch.from_numpy(values.astype(np.float32))
