"""S3-Rec (Zhou et al., CIKM 2020): self-supervised pre-training on attributes, then SASRec.

``mmrec pretrain --model s3rec`` trains a bidirectional encoder with four objectives on histories
some of whose items are masked: attributes of the items that are not masked (AAP), the masked items
(MIP), their attributes (MAP), and a masked segment (SP), with the weights 0.2, 1, 1 and 0.5.
``mmrec train --model s3rec --init RUN`` fine-tunes the same weights as a causal encoder.

The attributes are the columns of the items that the setting ``attributes`` names, such as
``attributes=categories``. In the released code, segments of other users are cut from whole
histories, test items included; here they are cut from the training windows of the batch. The
released code pre-trains for a fixed number of epochs; here validation ranks the next item at an
appended mask token, and the best epoch is kept.

Legend: B batch, L sequence length, M masked positions, A attributes, D width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from features.errors import UserError
from trainer.config import Choice, NonNegativeFloat, Probability
from trainer.data.batches import Batch, ItemFeatures, Sequences
from trainer.data.device_copy import to_device
from trainer.losses.base import Targets, targets_at
from trainer.losses.s3rec import attribute_loss, ranking_loss
from trainer.models.base import Catalogue, Pretraining
from trainer.models.item_ids import ItemIdRecommender
from trainer.models.sasrec import SASRec, SASRecConfig
from trainer.modules.attributes import AttributeSettings, multi_hot
from trainer.modules.sequence_encoders import SASRecEncoder, last_state, take_slots
from trainer.modules.transformer import initialise

_RELEASED: Mapping[str, Any] = {
    "lr": 1e-3,
    "schedule": "constant",
    "norm_eps": 1e-12,
    "final_norm": False,
    "inner_dropout": False,
    "weight_decay": 0.0,
    "clip": 0.0,
}
"""What the pre-training and the fine-tuning of the released code share."""
_HEADS = ("aap", "mip", "map", "sp")
_REDRAWS = 4  # of negatives that are in the row; few are drawn again


@dataclass(frozen=True, kw_only=True)
class S3RecConfig(SASRecConfig, AttributeSettings):
    """Settings of S3-Rec."""

    dropout: Probability = 0.5
    objective: Annotated[str, Choice("objective", ("next", "pretrain"))] = "next"
    """``next``: predict the next item (fine-tuning); ``pretrain``: the four objectives."""
    mask_ratio: Probability = 0.2
    """Share of the items that are masked in pre-training; the last item always is."""
    aap: NonNegativeFloat = 0.2
    """Weight of the attributes of items that are not masked."""
    mip: NonNegativeFloat = 1.0
    """Weight of the masked items."""
    map: NonNegativeFloat = 1.0
    """Weight of the attributes of masked items."""
    sp: NonNegativeFloat = 0.5
    """Weight of the masked segments."""

    def check(self) -> None:
        """Raise a UserError if pre-training has no attributes or nothing to learn."""
        super().check()
        if self.objective == "pretrain" and not self.attribute_columns.columns:
            raise UserError(
                "s3rec pre-trains on attributes of items, and none are named;"
                " set attributes=COLUMN, such as attributes=categories"
            )
        if self.aap + self.mip + self.map + self.sp == 0:
            raise UserError("aap, mip, map and sp are 0, so nothing is learned; set one above 0")


class S3Rec(ItemIdRecommender):
    """SASRec that can be pre-trained on the attributes of items."""

    settings_class = S3RecConfig
    settings: S3RecConfig
    unread = ("block",)
    train_defaults: ClassVar = SASRec.train_defaults
    pretraining = Pretraining(
        task="next-item",
        settings={"objective": "pretrain", "epochs": 100, "schedule": "constant"},
        presets={
            "released": {
                **_RELEASED,
                "rows": "prefixes",
                "batch_size": 100,
                "epochs": 300,
                "patience": 300,
            }
        },
    )
    presets: ClassVar = {
        "released": {
            **_RELEASED,
            "loss": "bce",
            "batch_size": 256,
            "epochs": 200,
            "monitor": "NDCG@20",
        }
    }
    transfer_groups: ClassVar = {
        "items": ("item_encoder.", "attribute."),
        "users": ("sequence_encoder.", "mask_D", "heads."),
    }

    def __init__(self, settings: S3RecConfig, catalogue: Catalogue) -> None:
        super().__init__(settings, catalogue)
        is_causal = settings.objective == "next"
        self.sequence_encoder = SASRecEncoder(settings, settings.dropout, is_causal=is_causal)
        if not is_causal:
            self.n_attributes = catalogue.n_attributes
            self.attribute = nn.Embedding(catalogue.n_attributes, settings.dim)
            self.mask_D = nn.Parameter(0.02 * torch.randn(settings.dim))
            self.heads = nn.ModuleDict(
                {name: nn.Linear(settings.dim, settings.dim) for name in _HEADS}
            )
        initialise(self)

    @property
    def history(self) -> int:
        """Largest number of items of a history that are read; in pre-training a mask follows."""
        return self.settings.length - (self.settings.objective == "pretrain")

    def encode_sequences(
        self, item_vectors_ND: Tensor, sequences: Sequences, features: ItemFeatures
    ) -> Tensor:
        """Return the state at each history's last item, or at an appended mask token: (B, D)."""
        if self.settings.objective == "next":
            return super().encode_sequences(item_vectors_ND, sequences, features)
        extended = Sequences(
            items_BL=functional.pad(sequences.items_BL, (0, 1)), lengths_B=sequences.lengths_B + 1
        )
        columns_L = torch.arange(extended.items_BL.shape[1], device=extended.items_BL.device)
        states_BLD = self._encode(extended, columns_L == sequences.lengths_B[:, None])
        query_BD: Tensor = self.heads["mip"](last_state(states_BLD, extended))
        return self.settings.normalise(query_BD)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return the next-item loss, or the four objectives and their weighted sum as ``loss``."""
        if self.settings.objective == "next":
            return super().loss(batch)
        device, windows = batch.device, self._inputs(batch.sequences.on_host)
        is_masked_BL = self._draw_masks(windows, batch.generator)
        masked, masked_slot_M = targets_at(is_masked_BL, windows.items_BL)
        shown, shown_slot_M = targets_at(windows.mask_BL & ~is_masked_BL, windows.items_BL)
        negatives_M = self._other_items(masked, windows, batch)
        states_BLD = self._encode(windows.to(device), to_device(is_masked_BL, device))
        masked, shown = masked.to(device), shown.to(device)
        masked_slot_M, shown_slot_M, negatives_M = (
            to_device(x, device) for x in (masked_slot_M, shown_slot_M, negatives_M)
        )
        mapped = {name: self.heads[name](states_BLD) for name in ("aap", "mip", "map")}
        terms = {
            "aap": self._attributes(take_slots(mapped["aap"], shown_slot_M), shown.item_M, batch),
            "mip": ranking_loss(
                take_slots(mapped["mip"], masked_slot_M),
                self.item_encoder(masked.item_M),
                self.item_encoder(negatives_M),
            ),
            "map": self._attributes(take_slots(mapped["map"], masked_slot_M), masked.item_M, batch),
            "sp": self._segments(windows, device, batch.generator),
        }
        losses = {name: term / len(windows.lengths_B) for name, term in terms.items()}
        weights = {name: getattr(self.settings, name) for name in losses}
        total = torch.stack([weights[name] * value for name, value in losses.items()]).sum()
        return {"loss": total, **{name: value.detach() for name, value in losses.items()}}

    def _inputs(self, windows: Sequences) -> Sequences:
        """Return the windows without their first item if they are longer than the encoder."""
        longest = self.settings.length
        if windows.items_BL.shape[1] <= longest:
            return windows
        excess_B = (windows.lengths_B - longest).clamp_min(0)
        columns_L = torch.arange(longest)
        return Sequences(
            items_BL=windows.items_BL.gather(1, columns_L + excess_B[:, None]),
            lengths_B=windows.lengths_B - excess_B,
            users_B=windows.users_B,
        )

    def _draw_masks(self, windows: Sequences, generator: torch.Generator) -> Tensor:
        """Return (B, L) bool: a share of the items, and the last item of each row."""
        valid_BL = windows.mask_BL
        random_BL = torch.rand(valid_BL.shape, generator=generator)
        columns_L = torch.arange(valid_BL.shape[1])
        is_last_BL = columns_L == windows.lengths_B[:, None] - 1
        return ((random_BL < self.settings.mask_ratio) & valid_BL) | is_last_BL

    def _encode(self, sequences: Sequences, is_masked_BL: Tensor) -> Tensor:
        """Return the state of each slot (B, L, D); masked slots hold the mask token."""
        padding = sequences.items_BL[0, 0]
        items_BL = torch.where(sequences.mask_BL, sequences.items_BL, padding)
        x_BLD = torch.where(is_masked_BL[..., None], self.mask_D, self.item_encoder(items_BL))
        states_BLD: Tensor = self.sequence_encoder(x_BLD, sequences.lengths_B)
        return states_BLD

    def _attributes(self, state_MD: Tensor, items_M: Tensor, batch: Batch) -> Tensor:
        has_attribute_MA = multi_hot(items_M, batch.features, self.n_attributes)
        return attribute_loss(state_MD, self.attribute.weight, has_attribute_MA.to(state_MD))

    def _other_items(self, masked: Targets, windows: Sequences, batch: Batch) -> Tensor:
        """Draw for each masked item an item that is not in its row: (M,), on the CPU."""
        n_items = batch.features.n_items - batch.train.hidden
        own_ML = torch.where(windows.mask_BL, windows.items_BL, -1)[masked.row_M]
        drawn_M = torch.randint(n_items, masked.item_M.shape, generator=batch.generator)
        for _ in range(_REDRAWS):
            again_M = torch.randint(n_items, masked.item_M.shape, generator=batch.generator)
            is_own_M = (drawn_M[:, None] == own_ML).any(1)
            drawn_M = torch.where(is_own_M, again_M, drawn_M)
        return drawn_M

    def _segments(
        self, windows: Sequences, device: torch.device, generator: torch.Generator
    ) -> Tensor:
        """Return the loss of the masked segments (SP, Eq. 11).

        A segment of 1 to half of the items is masked. Its own vector is that of the sequence in
        which all other items are masked; the negative has a segment of other rows in its place.
        """
        valid_BL, lengths_B = windows.mask_BL, windows.lengths_B
        random_B2 = torch.rand(len(lengths_B), 2, generator=generator)
        size_B = 1 + (random_B2[:, 0] * (lengths_B // 2).clamp_min(1)).long()
        start_B = (random_B2[:, 1] * (lengths_B - size_B + 1)).long()
        columns_L = torch.arange(valid_BL.shape[1])
        inside_BL = (columns_L >= start_B[:, None]) & (columns_L < (start_B + size_B)[:, None])
        flat_I = windows.items_BL[valid_BL]
        shift_B = torch.randint(len(flat_I), (len(lengths_B),), generator=generator)
        other_BL = flat_I[(shift_B[:, None] + columns_L) % len(flat_I)]
        others = Sequences(items_BL=other_BL, lengths_B=lengths_B).to(device)
        windows, inside_BL = windows.to(device), to_device(inside_BL, device)
        context_BD, own_BD, other_BD = (
            last_state(self._encode(sequences, is_masked_BL), sequences)
            for sequences, is_masked_BL in (
                (windows, inside_BL),
                (windows, ~inside_BL),
                (others, ~inside_BL),
            )
        )
        return ranking_loss(self.heads["sp"](context_BD), own_BD, other_BD)
