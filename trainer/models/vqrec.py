"""VQ-Rec (Hou et al., WWW 2023): discrete codes of texts, their embeddings, and SASRec.

A product quantiser (:mod:`trainer.modules.product_codes`) maps an item's text vector to codes. The
item vector is the mean of the embeddings of its codes (Eq. 2 of the paper); SASRec reads the
vectors of a history; a score is a cosine divided by 0.07. The quantiser is fitted on the texts of
items with training interactions. With several modalities, each has its codes, and the mean is over
the codes of all of them.

Pre-training (``mmrec pretrain``) contrasts a history with its next item, among the next items of
the batch and one semi-synthetic item, whose codes are those of the next item with a share
``synthetic`` of them replaced by random ones.

A run with ``--init`` copies the embeddings and the encoder. Its quantiser is its own, so the values
of its codes have another meaning. ``permute=true`` learns for each code a map from values to rows
of the table, a doubly stochastic matrix that starts near the identity.

Differences from the released code (RUCAIBox/VQ-Rec, 2981845):

- The released map is the largest element of each row of a random matrix after Gumbel noise and
  Sinkhorn rounds, rounded up by ``ceil``. The gradient of ``ceil`` is zero, so the map is never
  trained, and it is a random assignment in which several values share a row. Here the matrix is
  used without noise or rounding, so that it is trained, together with the other weights.
- Columns with the same next item as the row are no negatives. In the released code each adds
  exp(0) = 1 to the denominator.
- The quantiser of the released code subtracts a common mean (``IVF1``), which does not change
  codes.
- ``rows=windows`` predicts the item after each item; the released code has one row for each prefix.

Legend: K items, N items of the catalogue, M predicted positions, C codes of an item, D width.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from features.schema import FEATURE_MODALITIES
from trainer.config import PositiveInt, Probability, Range
from trainer.data.batches import Batch, ItemFeatures, TrainSet
from trainer.data.device_copy import to_device
from trainer.distributed import gather_ids, gather_rows, global_mean_rows
from trainer.losses.base import Targets
from trainer.models.base import Catalogue
from trainer.models.text_transfer import (
    TargetColumns,
    TextTransferRecommender,
    TextTransferSettings,
)
from trainer.modules.product_codes import CodeEmbedding
from trainer.modules.sequence_encoders import take_slots
from trainer.modules.transformer import initialise


@dataclass(frozen=True, kw_only=True)
class VQRecConfig(TextTransferSettings):
    """Settings of VQ-Rec. The defaults are the published settings."""

    codes: PositiveInt = 32
    """Number of codes of an item; at most the width of the features."""
    code_bits: Annotated[
        int, Range(1, 12, "at least 1 and at most 12", includes_high=True)
    ] = 8  # fmt: skip
    """Bits of a code. Fewer are used if fewer than 2^``code_bits`` items have training
    interactions."""
    permute: bool = False
    """Learn a map from the values of each code to the rows of its table, for a run with ``--init``.
    As published: true."""
    synthetic: Probability = 0.75
    """With ``objective=contrast``: share of the codes of a semi-synthetic item that are random."""


class VQRec(TextTransferRecommender):
    """Embeddings of product-quantised features, and SASRec.

    Raises:
        UserError: There are no features.
    """

    settings_class = VQRecConfig
    settings: VQRecConfig
    variants: ClassVar = {
        "fine-tuning of a pre-trained run": "--init RUN --set permute=true --set freeze=true",
    }
    of_given_weights: ClassVar = ("freeze", "permute")
    fitted_buffers = tuple(
        f"item_encoder.{name}.{buffer}"
        for name in FEATURE_MODALITIES
        for buffer in ("codes_NC", "rotation_WX", "centroids_CSV")
    )

    def __init__(self, settings: VQRecConfig, catalogue: Catalogue) -> None:
        super().__init__(settings, catalogue)
        self.item_encoder = nn.ModuleDict(
            {
                name: CodeEmbedding(
                    catalogue.n_items,
                    width,
                    settings.dim,
                    codes=settings.codes,
                    bits=settings.code_bits,
                    permute=settings.permute,
                )
                for name, width in catalogue.widths.items()
            }
        )
        initialise(self)

    def fit_buffers(self, features: ItemFeatures, train: TrainSet) -> None:
        """Fit the quantisers on items with training interactions, and code all items."""
        for name, embedding in self._embeddings():
            embedding.fit(features.vectors[name], features.present[name], train.counts_N > 0)

    def extend_buffers(self, features: ItemFeatures, learned: int) -> None:
        """Code the new items with the quantisers of the training."""
        for name, embedding in self._embeddings():
            embedding.code(features.vectors[name], features.present[name], first=learned)

    def encode_some(self, items_K: Tensor, features: ItemFeatures) -> Tensor:
        """Return the means of the embeddings of the codes of the given items: (K, D)."""
        return self.encode_codes(self._codes(items_K))

    def encode_codes(self, codes: dict[str, Tensor]) -> Tensor:
        """Return the means of the embeddings of codes: (K, D).

        Args:
            codes: Modality to codes (K, C).
        """
        total_KD = sum(embedding(codes[name]) for name, embedding in self._embeddings())
        assert isinstance(total_KD, Tensor)
        return total_KD / sum(embedding.codes for _, embedding in self._embeddings())

    def contrast(self, batch: Batch) -> dict[str, Tensor]:
        """Return the contrast of histories with their next items (Eq. 7 of the paper)."""
        inputs, targets, slot_M = self.targets(batch)
        items = self.distinct_items(batch)
        columns = TargetColumns.of(self.normalised(items), targets)
        query_MD = self.settings.normalise(take_slots(self.states(items, inputs), slot_M))
        synthetic_MD = self.encode_codes(self._synthetic_codes(targets, batch.generator))
        loss = contrast_with_synthetic(
            query_MD, columns, targets, self.settings.normalise(synthetic_MD), self.settings.scale
        )
        return {"loss": loss}

    def _embeddings(self) -> list[tuple[str, CodeEmbedding]]:
        pairs = []
        for name, embedding in self.item_encoder.named_children():
            assert isinstance(embedding, CodeEmbedding)
            pairs.append((name, embedding))
        return pairs

    def _codes(self, items_K: Tensor) -> dict[str, Tensor]:
        return {name: embedding.codes_NC[items_K] for name, embedding in self._embeddings()}

    def _synthetic_codes(self, targets: Targets, generator: torch.Generator) -> dict[str, Tensor]:
        """Return codes of the targets, a share of them replaced by random ones: (M, C)."""
        mixed = {}
        for name, embedding in self._embeddings():
            codes_MC = embedding.codes_NC[targets.item_M]
            random_MC = torch.randint(
                embedding.size, codes_MC.shape, generator=generator, dtype=torch.int32
            )
            replaced_MC = torch.rand(codes_MC.shape, generator=generator) < self.settings.synthetic
            random_MC, replaced_MC = (
                to_device(x, codes_MC.device) for x in (random_MC, replaced_MC)
            )
            mixed[name] = torch.where(replaced_MC, random_MC, codes_MC)
        return mixed


def contrast_with_synthetic(
    query_MD: Tensor, columns: TargetColumns, targets: Targets, synthetic_MD: Tensor, scale: float
) -> Tensor:
    """Return the contrast of histories with their next items and one synthetic negative each.

    -log(e^s_mm / (e^s_mm + e^(scale q_m . z_m) + sum over the positions j of the batch with another
    target of e^s_mj)), where s_mj = scale q_m . v_j, v_j is the target of position j, and z_m is
    the synthetic item of position m.

    Args:
        query_MD: Normalised states.
        columns: The distinct targets of the batch.
        targets: The predicted positions.
        synthetic_MD: Normalised vectors of the synthetic items.
        scale: 1 / temperature.
    """
    vectors_CD, ids_C = gather_rows(columns.items.vectors_KD), gather_ids(columns.ids_C)
    negative_MC = scale * query_MD @ vectors_CD.T + gather_ids(columns.counts_C).log()
    negative_MC = negative_MC.masked_fill(ids_C == targets.item_M[:, None], -torch.inf)
    positive_M = scale * (query_MD * columns.items.gather(targets.item_M)).sum(-1)
    synthetic_M = scale * (query_MD * synthetic_MD).sum(-1)
    logits = torch.cat([positive_M[:, None], synthetic_M[:, None], negative_MC], dim=1)
    mean = global_mean_rows(len(query_MD)) or 1.0
    labels_M = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    return functional.cross_entropy(logits, labels_M, reduction="sum") / mean
