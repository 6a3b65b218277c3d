"""DuoRec (Qiu et al., WSDM 2022): SASRec with a contrastive loss between views of a history.

Two views of a row are encoded: its history with other dropout masks, and another training history
that has the same next item (section 4.2 of the paper). The InfoNCE of the two views is added to the
next-item loss with the weight ``contrast``, with inner products and the views of all other rows as
negatives (Eq. 9 to 12). A row whose target is the target of no other row has its own history as the
second view.

The paper has one row for each prefix of a history: ``rows=prefixes``. With ``rows=windows`` the
views are those of the last target of each window. The next-item loss is then a mean over all
targets of the windows, so the InfoNCE is multiplied by the number of windows divided by the number
of targets: at a target with views, the two losses have the weights of the paper. Without this
factor the contrast rules the last position, which is the one that recommends.

Legend: B batch, L sequence length, D width.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from features.dataset import Ints
from retrieval.seen_items import SeenItems
from trainer.config import NonNegativeFloat, Probability
from trainer.data.batches import Batch, Sequences, TrainSet
from trainer.distributed import (
    gather_ids,
    gather_rows,
    global_mean_rows,
    rank_offset,
    scale_to_global_mean,
)
from trainer.losses.base import ItemVectors
from trainer.losses.in_batch import Columns, in_batch
from trainer.models.base import Catalogue
from trainer.models.sasrec import SASRec, SASRecConfig
from trainer.modules.sequence_encoders import last_state


@dataclass(frozen=True, kw_only=True)
class DuoRecConfig(SASRecConfig):
    """Settings of DuoRec."""

    dropout: Probability = 0.5
    contrast: NonNegativeFloat = 0.1
    """Weight of the contrastive loss."""


class DuoRec(SASRec):
    """SASRec, and a contrast between histories that lead to the same item."""

    settings_class = DuoRecConfig
    settings: DuoRecConfig
    variants: ClassVar = {}
    presets: ClassVar = {
        "published": {
            "rows": "prefixes",
            "batch_size": 256,
            "lr": 1e-3,
            "final_norm": False,
            "norm_eps": 1e-12,
            "inner_dropout": False,
            "epochs": 50,
            "schedule": "constant",
            "weight_decay": 0.0,
            "clip": 0.0,
            "monitor": "MRR",
        }
    }

    def __init__(self, settings: DuoRecConfig, catalogue: Catalogue) -> None:
        super().__init__(settings, catalogue)
        self._same_target = SameTarget(SeenItems.empty(), catalogue.n_items)

    def same_target(self, train: TrainSet) -> "SameTarget":
        """Return the training histories by the item that follows them, sorted once."""
        if self._same_target.histories is not train.histories:
            self._same_target = SameTarget(train.histories, len(train.counts_N))
        return self._same_target

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return the next-item loss, the contrastive loss, and their weighted sum as ``loss``."""
        next_item = super().loss(batch)["loss"]
        items = ItemVectors(vectors_KD=self.item_encoder.weight)
        windows = batch.sequences.on_host
        inputs = Sequences(
            items_BL=windows.items_BL, lengths_B=(windows.lengths_B - 1).clamp_min(1)
        ).to(batch.device)
        other = self.same_target(batch.train).draw(batch, self.settings.length)
        views_BD = [self._encode(items, view) for view in (inputs, other)]
        contrast = info_nce(*views_BD)
        return {
            "loss": next_item + self.settings.contrast * self._share_of_rows(batch) * contrast,
            "next": next_item.detach(),
            "contrast": contrast.detach(),
        }

    def _share_of_rows(self, batch: Batch) -> float:
        """Return the number of rows divided by that of targets: 1 with ``rows=prefixes``."""
        if self.settings.rows == "prefixes":
            return 1.0
        lengths_B = batch.sequences.on_host.lengths_B
        rows = global_mean_rows(len(lengths_B))
        targets = global_mean_rows(int((lengths_B - 1).sum()))
        return rows / max(1.0, targets)

    def _encode(self, items: ItemVectors, sequences: Sequences) -> Tensor:
        inside = Sequences(
            items_BL=torch.where(sequences.mask_BL, sequences.items_BL, sequences.items_BL[:, :1])[
                :, : self.settings.length
            ],
            lengths_B=sequences.lengths_B,
        )
        return last_state(self.states(items, inside), inside)


class SameTarget:
    """Training histories by the item that follows them.

    Args:
        histories: Training interactions of each user, oldest first.
        n_items: Number of items N.
    """

    def __init__(self, histories: SeenItems, n_items: int) -> None:
        self.histories = histories
        lengths = np.diff(histories.offsets)
        self._starts_I = np.repeat(histories.offsets[:-1], lengths)
        positions = np.flatnonzero(np.arange(len(histories.items)) > self._starts_I)
        items = histories.items[positions]
        self._by_item = positions[np.argsort(items, kind="stable")]
        self._offsets = np.concatenate([[0], np.cumsum(np.bincount(items, minlength=n_items))])

    def draw(self, batch: Batch, length: int) -> Sequences:
        """Draw, for each row, the history before another occurrence of the row's last item.

        Args:
            batch: Rows whose last item is the target.
            length: Largest number of items of a history.

        Returns:
            (B, L) histories without the target. A row whose target has no other occurrence gets its
            own history.
        """
        windows = batch.sequences.on_host
        rows_B = torch.arange(len(windows.lengths_B))
        lengths_B = (windows.lengths_B - 1).clamp_min(1)
        if batch.ends_B is None:
            return Sequences(items_BL=windows.items_BL, lengths_B=lengths_B).to(batch.device)
        targets = windows.items_BL[rows_B, windows.lengths_B - 1].numpy()
        ends = self._other(targets, batch.ends_B - 1, batch.generator)
        starts = np.maximum(self._starts_I[ends], ends - length)
        columns = np.arange(int((ends - starts).max()))
        index_BL = starts[:, None] + np.minimum(columns, (ends - starts)[:, None] - 1)
        return Sequences(
            items_BL=torch.from_numpy(self.histories.items[index_BL]),
            lengths_B=torch.from_numpy(ends - starts),
        ).to(batch.device)

    def _other(self, targets: Ints, own: Ints, generator: torch.Generator) -> Ints:
        """Return the position of another occurrence of each target, or its own position."""
        first, last = self._offsets[targets], self._offsets[targets + 1]
        counts = last - first
        uniform = torch.rand(len(targets), dtype=torch.float64, generator=generator).numpy()
        # One of the counts - 1 other occurrences: the own one is skipped.
        drawn = (uniform * np.maximum(counts - 1, 1)).astype(np.int64)
        own_rank = _rank_of(own, self._by_item, first, last)
        drawn = np.where(counts > 1, drawn + (drawn >= own_rank), own_rank)
        positions: Ints = self._by_item[first + drawn]
        return positions


def _rank_of(positions: Ints, sorted_parts: Ints, first: Ints, last: Ints) -> Ints:
    """Return the index of each position in its part of an array, whose parts are ascending."""
    ranks = [
        np.searchsorted(sorted_parts[begin:end], position)
        for position, begin, end in zip(positions, first, last, strict=True)
    ]
    return np.array(ranks, np.int64)


def info_nce(first_BD: Tensor, second_BD: Tensor) -> Tensor:
    """Return the InfoNCE of two views of each row, with both views of all other rows as negatives.

    Each of the 2 B vectors is a query: -log(e^s_p / (e^s_p + sum over the 2 B - 2 others of e^s)),
    where s are inner products and p is the other view of the row.

    Args:
        first_BD: First view of each row.
        second_BD: Second view of each row.
    """
    rows = len(first_BD)
    begin = rank_offset(rows)
    own_B = torch.arange(begin, begin + rows, device=first_BD.device)
    all_B = gather_ids(own_B)
    keys_CD = torch.cat([gather_rows(first_BD), gather_rows(second_BD)])
    loss = in_batch(
        torch.cat([first_BD, second_BD]),
        keys_CD,
        torch.cat([own_B + len(all_B), own_B]),
        columns=Columns(label_C=torch.cat([all_B, all_B])),
    )
    return scale_to_global_mean(loss, first_BD)
