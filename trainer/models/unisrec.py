"""UniSRec (Hou et al., KDD 2022): texts of items through a mixture-of-experts adaptor, and SASRec.

An item's text vector goes through the adaptor (:mod:`trainer.modules.adaptor`); SASRec reads the
vectors of a history; a score is a cosine divided by 0.07. Without ``ids`` an item is its features
alone (inductive). With ``ids=true`` a learned vector is added (transductive); it is zero for items
without training interactions. With several modalities, each has an adaptor, and the item vector is
the sum of their outputs. A learned vector replaces a modality that an item lacks.

Pre-training (``mmrec pretrain``, Eq. 6 to 9 of the paper) adds two contrasts within the batch: of a
history with its next item, and, with the weight ``sequence_weight``, of a history with a copy that
lacks some items.

Differences from the paper and the released code (RUCAIBox/UniSRec, 05aa5cb):

- The paper replaces words of texts in a tenth of the copies. This needs a second feature table, so
  copies differ by dropped items alone.
- Columns with the same next item as the row are no negatives. In the released code their score is
  set to 0, so each adds exp(0) = 1 to the denominator.
- ``rows=windows`` predicts the item after each item; the released code has one row for each prefix.

Legend: B batch, L sequence length, K items, M predicted positions, D width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from trainer.config import NonNegativeFloat, PositiveInt, Probability
from trainer.data.batches import Batch, ItemFeatures, Sequences, TrainSet
from trainer.distributed import gather_ids, gather_rows, rank_offset, scale_to_global_mean
from trainer.losses.base import Targets
from trainer.losses.in_batch import Columns, in_batch
from trainer.models.base import Catalogue
from trainer.models.text_transfer import (
    TargetColumns,
    TextTransferRecommender,
    TextTransferSettings,
)
from trainer.modules.adaptor import MixtureAdaptor
from trainer.modules.fusion import learned
from trainer.modules.sequence_encoders import last_state, take_slots
from trainer.modules.transformer import initialise


@dataclass(frozen=True, kw_only=True)
class UniSRecConfig(TextTransferSettings):
    """Settings of UniSRec. The defaults are the published settings."""

    experts: PositiveInt = 8
    """Number of experts of the adaptor."""
    adaptor_dropout: Probability = 0.2
    """Dropout probability of the features."""
    ids: bool = False
    """Add a learned vector for each item (the transductive form of the paper)."""
    sequence_weight: NonNegativeFloat = 1e-3
    """With ``objective=contrast``: weight of the contrast of a history with its copy."""
    drop: Probability = 0.2
    """With ``objective=contrast``: share of the items that a copy lacks; the oldest one stays."""


class UniSRec(TextTransferRecommender):
    """A mixture-of-experts adaptor of features, and SASRec.

    Raises:
        UserError: There are no features.
    """

    settings_class = UniSRecConfig
    settings: UniSRecConfig
    variants: ClassVar = {
        "transductive": "--set ids=true",
        "fine-tuning of a pre-trained run": "--init RUN --set freeze=true",
    }
    item_tables = ("id.",)
    masks_item_tables = True  # by known_N
    fitted_buffers = ("known_N",)
    modality_tables = ("item_encoder.absent",)
    known_N: Tensor

    def __init__(self, settings: UniSRecConfig, catalogue: Catalogue) -> None:
        super().__init__(settings, catalogue)
        self.item_encoder = _Adaptors(settings, catalogue.widths)
        if settings.ids:
            self.id = nn.Embedding(catalogue.n_items, settings.dim)
            self.register_buffer("known_N", torch.ones(catalogue.n_items, dtype=torch.bool))
        initialise(self)

    def fit_buffers(self, features: ItemFeatures, train: TrainSet) -> None:
        """Store the items that have a learned vector: those with training interactions."""
        if self.settings.ids:
            self.known_N.copy_(train.counts_N > 0)

    def row_tables(self) -> list[nn.Embedding]:
        """Return the table of learned vectors if a step reads a part of it."""
        reads_all = self.settings.objective == "next" and self.next_item_loss.needs_catalogue
        return [] if reads_all or not self.settings.ids else [self.id]

    def encode_some(self, items_K: Tensor, features: ItemFeatures) -> Tensor:
        """Encode the given items: (K, D)."""
        vectors_KD: Tensor = self.item_encoder(items_K, features)
        if self.settings.ids:
            vectors_KD = vectors_KD + self.embed_identity(items_K)
        return vectors_KD

    def embed_identity(self, items_K: Tensor) -> Tensor:
        """Return the learned vectors (K, D); zero for items without training interactions."""
        identity_KD: Tensor = self.id(items_K) * self.known_N[items_K, None]
        return identity_KD

    def contrast(self, batch: Batch) -> dict[str, Tensor]:
        """Return the two contrasts of the pre-training, and their weighted sum as ``loss``."""
        settings = self.settings
        inputs, targets, slot_M = self.targets(batch)
        items = self.distinct_items(batch)
        states_BLD = self.states(items, inputs)
        columns = TargetColumns.of(self.normalised(items), targets)
        query_MD = settings.normalise(take_slots(states_BLD, slot_M))
        next_item = contrast_next_items(query_MD, columns, targets, settings.scale)
        copies = drop_items(inputs, settings.drop, batch.generator)
        history_BD, copy_BD = (
            settings.normalise(state_BD)
            for state_BD in (
                last_state(states_BLD, inputs),
                last_state(self.states(items, copies), copies),
            )
        )
        windows = batch.sequences
        last_B = windows.items_BL.gather(1, windows.lengths_B[:, None] - 1)[:, 0]
        sequence = contrast_sequences(history_BD, copy_BD, last_B, settings.scale)
        return {
            "loss": next_item + settings.sequence_weight * sequence,
            "next": next_item.detach(),
            "sequence": sequence.detach(),
        }


class _Adaptors(nn.Module):
    """An adaptor for each modality; the item vector is the sum of their outputs."""

    def __init__(self, settings: UniSRecConfig, widths: Mapping[str, int]) -> None:
        super().__init__()
        self.adaptors = nn.ModuleDict(
            {
                name: MixtureAdaptor(
                    width,
                    settings.dim,
                    experts=settings.experts,
                    probability=settings.adaptor_dropout,
                )
                for name, width in widths.items()
            }
        )
        self.absent = learned(len(widths), settings.dim)

    def forward(self, items_K: Tensor, features: ItemFeatures) -> Tensor:
        """Return the item vectors: (K, D)."""
        adapted = [
            torch.where(
                features.present[name][items_K, None],
                adaptor(features.rows(name, items_K)),
                self.absent[number],
            )
            for number, (name, adaptor) in enumerate(self.adaptors.items())
        ]
        return torch.stack(adapted).sum(0)


def contrast_next_items(
    query_MD: Tensor, columns: TargetColumns, targets: Targets, scale: float
) -> Tensor:
    """Return the contrast of histories with their next items (Eq. 6).

    -log(e^s_mm / (e^s_mm + sum over the positions j of the batch with another target of e^s_mj)),
    where s_mj = scale q_m . v_j and v_j is the target of position j.

    Args:
        query_MD: Normalised states.
        columns: The distinct targets of the batch.
        targets: The predicted positions.
        scale: 1 / temperature.
    """
    begin = rank_offset(len(columns.ids_C))
    loss = in_batch(
        query_MD,
        gather_rows(columns.items.vectors_KD),
        begin + columns.items.rows(targets.item_M),
        scale=scale,
        columns=Columns(label_C=gather_ids(columns.ids_C), count_C=gather_ids(columns.counts_C)),
    )
    return scale_to_global_mean(loss, query_MD)


def contrast_sequences(
    first_BD: Tensor, second_BD: Tensor, label_B: Tensor, scale: float
) -> Tensor:
    """Return the contrast of histories with their copies (Eq. 8).

    Copies of rows that have the same label are no negatives.

    Args:
        first_BD: Normalised vectors of the histories.
        second_BD: Normalised vectors of the copies.
        label_B: (B,) int64, the item after each history.
        scale: 1 / temperature.
    """
    begin = rank_offset(len(first_BD))
    loss = in_batch(
        first_BD,
        gather_rows(second_BD),
        torch.arange(begin, begin + len(first_BD), device=first_BD.device),
        scale=scale,
        columns=Columns(label_C=gather_ids(label_B)),
    )
    return scale_to_global_mean(loss, first_BD)


def drop_items(sequences: Sequences, share: float, generator: torch.Generator) -> Sequences:
    """Return sequences without some of their items; the oldest item of each stays.

    Args:
        sequences: The sequences.
        share: Probability that an item is dropped.
        generator: Generator on the CPU.
    """
    rows = sequences.on_host
    kept_BL = torch.rand(rows.items_BL.shape, generator=generator) >= share
    kept_BL[:, 0] = True
    kept_BL &= rows.mask_BL
    order_BL = (~kept_BL).to(torch.uint8).argsort(dim=1, stable=True)
    copies = Sequences(
        items_BL=rows.items_BL.gather(1, order_BL),
        lengths_B=kept_BL.sum(1),
        users_B=rows.users_B,
    )
    return copies.to(sequences.items_BL.device)
