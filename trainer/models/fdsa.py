"""FDSA (Zhang et al., IJCAI 2019): two self-attention streams, of item ids and of item features.

The features of an item are fields: a column of attributes, or a modality with a feature table. A
vanilla attention over the fields gives the feature vector of the item (Eq. 2 and 3 of the paper).
The last states of both streams are concatenated and mapped to a query (Eq. 8), which is compared
with learned item vectors, so an item without training interactions cannot be found by its features.

RecBole shares one LayerNorm among the inputs and the output, and one table of positions among the
streams; here each has its own. The paper
trains with one sampled negative (``loss=bce``), RecBole and mmrec with a softmax.

Legend: B batch, L sequence length, K items, F fields, D width.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from features.errors import UserError
from trainer.config import Choice, LayerCount, PositiveInt, Probability
from trainer.data.batches import Batch, ItemFeatures, Sequences
from trainer.data.device_copy import to_device
from trainer.kernels.elementwise import dropout
from trainer.models.base import Catalogue
from trainer.models.causal import CausalSettings
from trainer.models.item_ids import ItemIdRecommender
from trainer.models.text_transfer import RECBOLE
from trainer.modules.attributes import AttributeSettings, attribute_means
from trainer.modules.sequence_encoders import SASRecEncoder, last_state, take_slots
from trainer.modules.transformer import initialise


@dataclass(frozen=True, kw_only=True)
class FDSAConfig(CausalSettings, AttributeSettings):
    """Settings of FDSA."""

    dim: PositiveInt = 64
    layers: LayerCount = 2
    """Number of layers of each stream."""
    heads: PositiveInt = 2
    hidden: PositiveInt = 256
    length: PositiveInt = 50
    dropout: Probability = 0.5
    fields: Annotated[str, Choice("fields", ("features", "attributes", "both"))] = "features"
    """Fields of an item: its ``features`` (one for each table), its ``attributes`` (one for each
    column of the setting ``attributes``; the paper), or ``both``."""

    def check(self) -> None:
        """Raise a UserError if attributes are asked for and no column is named."""
        super().check()
        if self.fields != "features" and not self.attribute_columns.columns:
            raise UserError(
                f"fields={self.fields!r} reads attributes, and none are named;"
                " set attributes=COLUMN, such as attributes=categories"
            )


class FDSA(ItemIdRecommender):
    """Self-attention over item ids, and self-attention over item features.

    Raises:
        UserError: There are neither features nor attributes to read.
    """

    settings_class = FDSAConfig
    settings: FDSAConfig
    needs_features = True
    takes_chunks = False  # both streams are encoded at once
    train_defaults: ClassVar = {"monitor": "NDCG@10"}
    presets: ClassVar = {"released": {**RECBOLE, "monitor": "MRR"}}
    transfer_groups: ClassVar = {
        "items": ("item_encoder.", "projections.", "attribute.", "field_attention."),
        "users": ("sequence_encoder.", "feature_stream.", "out.", "norm."),
    }
    reverse_positions = (
        "sequence_encoder.position.weight",
        "feature_stream.position.weight",
    )

    def __init__(self, settings: FDSAConfig, catalogue: Catalogue) -> None:
        super().__init__(settings, catalogue)
        dim = settings.dim
        self.columns = () if settings.fields == "features" else settings.attribute_columns.columns
        self.names = () if settings.fields == "attributes" else tuple(catalogue.widths)
        if not self.columns and not self.names:
            raise UserError(
                "fdsa needs features; run mmrec extract for this dataset, or set fields=attributes"
                " and attributes=COLUMN"
            )
        self.projections = nn.ModuleDict(
            {name: nn.Linear(catalogue.widths[name], dim) for name in self.names}
        )
        if self.columns:
            self.attribute = nn.Embedding(catalogue.n_attributes, dim)
        self.field_attention = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, 1))
        self.sequence_encoder = SASRecEncoder(settings, settings.dropout)
        self.feature_stream = SASRecEncoder(settings, settings.dropout)
        self.out = nn.Linear(2 * dim, dim)
        self.norm = nn.LayerNorm(dim, eps=settings.norm_eps)
        initialise(self)

    def encode_sequences(
        self, item_vectors_ND: Tensor, sequences: Sequences, features: ItemFeatures
    ) -> Tensor:
        """Return the query at each history's last item: (B, D)."""
        states_BLD = self.both_states(sequences, features)
        return self.settings.normalise(last_state(states_BLD, sequences))

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return the next-item loss over the predicted positions."""
        inputs, targets, slot_M = self.targets(batch)
        drawn = self.next_item_loss.draw(targets, batch)
        items = self.batch_items(batch, drawn)
        states_BLD = self.both_states(inputs, batch.features)
        query_MD = self.settings.normalise(take_slots(states_BLD, slot_M))
        return {"loss": self.next_item_loss(query_MD, items, targets, batch, drawn)}

    def both_states(self, sequences: Sequences, features: ItemFeatures) -> Tensor:
        """Return the mapped states of both streams after each item: (B, L, D)."""
        rows, device = sequences.on_host, sequences.items_BL.device
        items_BL = torch.where(rows.mask_BL, rows.items_BL, rows.items_BL[0, 0])
        distinct = items_BL.unique(return_inverse=True)
        ids_K, row_BL, items_BL = (to_device(x, device) for x in (*distinct, items_BL))
        feature_BLD = functional.embedding(row_BL, self.item_features(ids_K, features))
        states_BLE = torch.cat(
            [
                self.sequence_encoder(self.item_encoder(items_BL), sequences.lengths_B),
                self.feature_stream(feature_BLD, sequences.lengths_B),
            ],
            dim=-1,
        )
        states_BLD = self.norm(self.out(states_BLE))
        return dropout(states_BLD, self.settings.dropout, self.training)

    def item_features(self, items_K: Tensor, features: ItemFeatures) -> Tensor:
        """Return the attention over the fields of each item: (K, D); zero without any field."""
        fields = [
            (self.projections[name](features.rows(name, items_K)), present_N[items_K])
            for name, present_N in features.present.items()
            if name in self.names
        ]
        fields += [
            attribute_means(self.attribute, column, items_K, features) for column in self.columns
        ]
        field_KFD = torch.stack([vectors for vectors, _ in fields], dim=1)
        exists_KF = torch.stack([exists for _, exists in fields], dim=1)
        score_KF = self.field_attention(field_KFD)[..., 0]
        lowest = torch.finfo(score_KF.dtype).min
        weight_KF = score_KF.masked_fill(~exists_KF, lowest).softmax(-1) * exists_KF
        mean_KD: Tensor = (weight_KF[..., None] * field_KFD).sum(1)
        return mean_KD
