"""The item encoder: from the features of an item's modalities to its vector.

Legend: K items, T tokens of a modality, D width, D_m width of modality m.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from features.errors import UserError
from trainer.modules.fusion import DNN, FusionSettings, Pooled, learned
from trainer.modules.registry import FUSIONS
from trainer.modules.tokens import Tokens, averaged, fill, masked_mean


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedItems:
    """Items as the item encoder returns them."""

    fused_KD: Tensor
    modalities: Sequence[Tokens]
    """The projected tokens of each modality: (K, T, D) and (K, T) bool. An item without a modality
    has one learned token that represents the absence."""
    has_modality: Sequence[Tensor]
    """(K,) bool of each modality."""

    def modality_vectors(self) -> list[tuple[Tensor, Tensor]]:
        """Return the mean of each modality's tokens (K, D), and which items have it (K,)."""
        means = [masked_mean(*tokens) for tokens in self.modalities]
        return list(zip(means, self.has_modality, strict=True))


class ItemEncoder(nn.Module):
    """Project each modality, fuse the modalities, and apply a DNN if there is one.

    An item of a single modality is the mean of its projected tokens: there is nothing to fuse.

    Args:
        fusion: A name in :data:`trainer.modules.registry.FUSIONS`.
        settings: Settings of the fusion.
        widths: Modality to width of its features; at least one.

    Raises:
        UserError: The fusion takes two modalities, and there are more.
    """

    def __init__(self, fusion: str, settings: FusionSettings, widths: Mapping[str, int]) -> None:
        super().__init__()
        names = list(widths)
        self.inputs = nn.ModuleDict({name: nn.Linear(widths[name], settings.dim) for name in names})
        self.absent = learned(len(names), settings.dim)
        fusion_class = FUSIONS.find(fusion) if len(names) > 1 else Pooled
        if len(names) > 2 and not fusion_class.takes_any_number:
            able = [name for name, other in FUSIONS.items() if other.takes_any_number]
            raise UserError(
                f"fusion={fusion!r} fuses two modalities, and the run has {', '.join(names)};"
                f" name two by --features, or set fusion={' or '.join(able)}"
            )
        self.fusion = fusion_class(settings, names)
        self.dnn = DNN(settings) if settings.dnn else None

    def forward(self, features: Mapping[str, Tokens]) -> EncodedItems:
        """Encode K items.

        Args:
            features: Modality to (K, T, D_m) and (K, T) bool, a T for each modality.
        """
        modalities, has_modality = [], []
        for index, (name, project) in enumerate(self.inputs.items()):
            tokens = features[name]
            x_KTD, mask_KT = tokens if self.fusion.reads_tokens else averaged(*tokens)
            modalities.append(fill(project(x_KTD), mask_KT, self.absent[index]))
            has_modality.append(mask_KT.any(1))
        fused_KD: Tensor = self.fusion(modalities)
        if self.dnn is not None:
            fused_KD = self.dnn(fused_KD)
        return EncodedItems(fused_KD=fused_KD, modalities=modalities, has_modality=has_modality)
