"""TedRec (Xu et al., CIKM 2024): ids and texts of a history, multiplied in the frequency domain.

A mixture-of-experts adaptor (:mod:`trainer.modules.adaptor`), with offsets for each position, maps
the text vectors of a history. For the sequences I of learned item vectors and T of mapped texts,
with the discrete Fourier transform F over time, the fused sequence is
2 (C sigmoid(C a) + M sigmoid(M m)), where C = F^-1(F(I) w) and M = F^-1(F(I) F(T)). SASRec reads
it. A score is a cosine divided by 0.07.

Candidates are the learned item vectors: texts of candidates are not read, so an item without
training interactions cannot be ranked by its text.

A product of spectra is a circular convolution, in which a slot depends on later ones. As in
:mod:`trainer.models.bsarec`, the two values of ``rows`` keep the target out of its input:

- ``prefixes`` is the published form: the convolution covers the whole prefix, and only the item
  after the prefix is predicted.
- ``windows`` predicts every position, so the convolutions leave out the later slots. At the last
  slot, the fusions of both forms give the same output.

Differences from the released code (RUCAIBox/TedRec, e6b3cb9): empty slots are zero (there they hold
a random vector); positions count from the newest item; with several modalities, each has an
adaptor, and T is the sum of their outputs; a learned vector replaces a text that an item lacks.

Legend: B batch, L slots of a sequence, S slots of the transform, W width of texts, D width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from trainer.config import Choice, PositiveInt, Probability, Temperature
from trainer.data.batches import Batch, ItemFeatures, Sequences
from trainer.losses.base import SCORES
from trainer.models.base import Catalogue
from trainer.models.causal import CausalSettings
from trainer.models.item_features import check_features, without_padding
from trainer.models.item_ids import ItemIdRecommender
from trainer.models.text_transfer import RECBOLE
from trainer.modules.adaptor import MixtureAdaptor
from trainer.modules.fusion import learned
from trainer.modules.sequence_encoders import SASRecEncoder, last_state, take_slots
from trainer.modules.transformer import initialise, positions_from_end


@dataclass(frozen=True, kw_only=True)
class TedRecConfig(CausalSettings):
    """Settings of TedRec. The defaults are the published settings."""

    dim: PositiveInt = 300
    hidden: PositiveInt = 256
    length: PositiveInt = 50
    dropout: Probability = 0.5
    score: Annotated[str, Choice("score", SCORES)] = "cosine"
    temperature: Temperature = 0.07
    experts: PositiveInt = 8
    """Number of experts of the adaptor."""
    adaptor_dropout: Probability = 0.2
    """Dropout probability of the text vectors."""


class TedRec(ItemIdRecommender):
    """Ids and texts, fused in the frequency domain, and SASRec.

    Raises:
        UserError: There are no features.
    """

    settings_class = TedRecConfig
    settings: TedRecConfig
    needs_features = True
    takes_chunks = False  # both streams are encoded at once
    train_defaults: ClassVar = {"monitor": "NDCG@10"}
    presets: ClassVar = {"published": RECBOLE}
    transfer_groups: ClassVar = {
        "items": ("text_encoder.",),
        "users": ("sequence_encoder.", "fusion."),
    }
    modality_tables = ("text_encoder.absent",)

    def __init__(self, settings: TedRecConfig, catalogue: Catalogue) -> None:
        super().__init__(settings, catalogue)
        check_features("tedrec", catalogue)
        self.text_encoder = _TextEncoder(settings, catalogue.widths)
        self.fusion = SpectralFusion(
            settings.length, settings.dim, is_causal=settings.rows == "windows"
        )
        self.sequence_encoder = SASRecEncoder(settings, settings.dropout)
        initialise(self)

    def encode_sequences(
        self, item_vectors_ND: Tensor, sequences: Sequences, features: ItemFeatures
    ) -> Tensor:
        """Return the state at each history's last item: (B, D)."""
        sequences = without_padding(sequences)
        return self.settings.normalise(
            last_state(self.fused_states(sequences, features), sequences)
        )

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return the next-item loss over the predicted positions."""
        inputs, targets, slot_M = self.targets(batch)
        drawn = self.next_item_loss.draw(targets, batch)
        items = self.batch_items(batch, drawn)
        states_BLD = self.fused_states(inputs, batch.features)
        query_MD = self.settings.normalise(take_slots(states_BLD, slot_M))
        return {"loss": self.next_item_loss(query_MD, items, targets, batch, drawn)}

    def fused_states(self, sequences: Sequences, features: ItemFeatures) -> Tensor:
        """Return the state after each item: (B, L, D), before normalisation."""
        valid_BL1 = sequences.mask_BL[..., None]
        id_BLD = self.item_encoder(sequences.items_BL).masked_fill(~valid_BL1, 0)
        text_BLD = self.text_encoder(sequences, features).masked_fill(~valid_BL1, 0)
        states_BLD: Tensor = self.sequence_encoder(
            self.fusion(id_BLD, text_BLD), sequences.lengths_B
        )
        return states_BLD


class _TextEncoder(nn.Module):
    """An adaptor for each modality, with an offset for each position; their outputs are added."""

    def __init__(self, settings: TedRecConfig, widths: Mapping[str, int]) -> None:
        super().__init__()
        self.adaptors = nn.ModuleDict(
            {
                name: MixtureAdaptor(
                    width,
                    settings.dim,
                    experts=settings.experts,
                    probability=settings.adaptor_dropout,
                    positions=settings.length,
                )
                for name, width in widths.items()
            }
        )
        self.absent = learned(len(widths), settings.dim)

    def forward(self, sequences: Sequences, features: ItemFeatures) -> Tensor:
        """Return the mapped texts of the slots: (B, L, D)."""
        items_BL = sequences.items_BL
        positions_BL = positions_from_end(sequences.lengths_B, items_BL.shape[1])
        mapped = [
            torch.where(
                features.present[name][items_BL][..., None],
                adaptor(features.rows(name, items_BL), positions_BL),
                self.absent[number],
            )
            for number, (name, adaptor) in enumerate(self.adaptors.items())
        ]
        return torch.stack(mapped).sum(0)


class SpectralFusion(nn.Module):
    """Filter a sequence, multiply its spectrum with that of another, and add the gated results.

    Args:
        slots: Number of slots S of the Fourier transform.
        dim: Width D.
        is_causal: If true, the convolutions leave out later slots.
    """

    def __init__(self, slots: int, dim: int, *, is_causal: bool) -> None:
        super().__init__()
        self.slots = slots
        # Twice the slots: the convolution does not come round, so no slot reads a later one.
        self.transformed = 2 * slots if is_causal else slots
        # Real and imaginary parts of the filter.
        self.filter_2FD = nn.Parameter(0.02 * torch.randn(2, slots // 2 + 1, dim))
        self.gate_filtered = nn.Linear(dim, 1)
        self.gate_mixed = nn.Linear(dim, 1)

    def forward(self, id_BLD: Tensor, text_BLD: Tensor) -> Tensor:
        """Return the fused sequence (B, L, D) of sequences whose empty slots are zero."""
        with torch.autocast(id_BLD.device.type, enabled=False):
            if id_BLD.dtype not in (torch.float32, torch.float64):
                id_BLD, text_BLD = id_BLD.float(), text_BLD.float()
            kernel_SD = torch.fft.irfft(torch.complex(*self.filter_2FD), n=self.slots, dim=0)
            filtered_BLD = self._convolve(id_BLD, kernel_SD[None])
            # The published transform is orthonormal: the product has a factor 1 / sqrt(S).
            mixed_BLD = self._convolve(id_BLD, text_BLD) / self.slots**0.5
        filtered_BLD = filtered_BLD * self.gate_filtered(filtered_BLD).sigmoid()
        mixed_BLD = mixed_BLD * self.gate_mixed(mixed_BLD).sigmoid()
        fused_BLD: Tensor = 2 * (filtered_BLD + mixed_BLD)
        return fused_BLD

    def _convolve(self, x_BLD: Tensor, y_BLD: Tensor) -> Tensor:
        spectra = [torch.fft.rfft(t, n=self.transformed, dim=1) for t in (x_BLD, y_BLD)]
        product_BSD: Tensor = torch.fft.irfft(spectra[0] * spectra[1], n=self.transformed, dim=1)
        return product_BSD[:, : x_BLD.shape[1]]
