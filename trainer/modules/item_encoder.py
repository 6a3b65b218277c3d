"""The item encoder: project and fuse the features of an item's modalities into one vector.

Legend: N items of the catalogue, K items, T tokens of a modality, D width, D_m width of modality m.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from features.errors import UserError
from trainer.data.batches import ItemFeatures, TrainSet
from trainer.modules.fusion import DNN, FusionSettings, Pooled, learned
from trainer.modules.registry import FUSIONS
from trainer.modules.tokens import Tokens, averaged, fill, first_token, masked_mean
from trainer.modules.whitening import Centring, fit_maps, fold_centring


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedItems:
    """Result of :class:`ItemEncoder` for K items."""

    fused_KD: Tensor
    """(K, D) vectors of the items."""
    modalities: Sequence[Tokens]
    """The projected tokens of each modality, (K, T, D), and (K, T) bool, true where a token exists.
    An item without the modality has one learned token."""
    has_modality: Sequence[Tensor]
    """For each modality (K,) bool, true for the items that have it."""
    modality_pool: str = "mean"
    """Vector of a modality: the ``mean`` of its tokens, or its first token (``cls``)."""

    @classmethod
    def concatenate(cls, parts: Sequence["EncodedItems"]) -> "EncodedItems":
        """Return the items of several results as one result."""
        modalities = []
        for tokens in zip(*(part.modalities for part in parts), strict=True):
            longest = max(x_KTD.shape[1] for x_KTD, _ in tokens)
            padded = [
                (
                    functional.pad(x_KTD, (0, 0, 0, longest - x_KTD.shape[1])),
                    functional.pad(mask_KT, (0, longest - mask_KT.shape[1])),
                )
                for x_KTD, mask_KT in tokens
            ]
            x, mask = (torch.cat(tensors) for tensors in zip(*padded, strict=True))
            modalities.append((x, mask))
        return cls(
            fused_KD=torch.cat([part.fused_KD for part in parts]),
            modalities=modalities,
            has_modality=[
                torch.cat(has) for has in zip(*(part.has_modality for part in parts), strict=True)
            ],
            modality_pool=parts[0].modality_pool,
        )

    def modality_vectors(self) -> list[tuple[Tensor, Tensor]]:
        """Return the vector of each modality (K, D), with its ``has_modality`` (K,)."""
        is_first = self.modality_pool == "cls"
        vectors = [x[:, 0] if is_first else masked_mean(x, mask) for x, mask in self.modalities]
        return list(zip(vectors, self.has_modality, strict=True))


class ItemEncoder(nn.Module):
    """Project each modality, fuse the modalities, and apply a DNN if there is one.

    If the run has a single modality, the vector is the projected vector of the modality.

    Args:
        fusion: Name in :data:`trainer.modules.registry.FUSIONS`.
        settings: Settings of the fusion.
        widths: Modality to width of its features; at least one.
        modality_pool: Vector of a modality, and of an item of a run with a single modality: the
            ``mean`` of its tokens, or its first token (``cls``).

    Raises:
        UserError: The fusion takes two modalities, and the run has more.
    """

    def __init__(
        self,
        fusion: str,
        settings: FusionSettings,
        widths: Mapping[str, int],
        *,
        modality_pool: str = "mean",
    ) -> None:
        super().__init__()
        self.modality_pool = modality_pool
        names = list(widths)
        self.is_single = len(names) == 1
        inputs: dict[str, nn.Module] = {
            name: nn.Linear(width, settings.dim) for name, width in widths.items()
        }
        self.is_centred = settings.centre
        if settings.centre:
            inputs = {name: nn.Sequential(Centring(widths[name]), inputs[name]) for name in names}
        self.inputs = nn.ModuleDict(inputs)
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

    def fit(self, features: ItemFeatures, train: TrainSet) -> None:
        """Fit the centring of the pooled vectors, if there is one, on the items of the training.

        Args:
            features: Features of the whole catalogue.
            train: The training interactions.
        """
        parts = [(k, m) for k, x in self.inputs.items() for m in x.children()]
        fit_maps({name: m for name, m in parts if isinstance(m, Centring)}, features, train)

    def adapted(self, tensors: Mapping[str, Tensor], prefix: str) -> Mapping[str, Tensor]:
        """Return the weights of another run, for inputs that are centred as in this encoder.

        The centring of the other run becomes a part of its linear layers if this encoder has none.

        Args:
            tensors: Name of a parameter or buffer of the other run to its values.
            prefix: Prefix of the names of this encoder, such as ``item_encoder.``.

        Raises:
            UserError: This encoder centres its inputs, and the other run does not.
        """
        start, end = f"{prefix}inputs.", ".0.mean_W"
        layers = [key.removesuffix(end) for key in tensors if key.endswith(end)]
        if self.is_centred:
            if not layers and any(key.startswith(start) for key in tensors):
                raise UserError(
                    "the run to start from has centre=false and this model centre=true, so its"
                    " first layers read other features; set centre=false, or give --transfer users"
                )
            return tensors
        adapted = {
            k: x
            for k, x in tensors.items()
            if not k.startswith(tuple(f"{layer}." for layer in layers))
        }
        for layer in layers:
            names = ("1.weight", "1.bias", "0.mean_W", "0.scale")
            folded = fold_centring(*(tensors[f"{layer}.{name}"] for name in names))
            adapted[f"{layer}.weight"], adapted[f"{layer}.bias"] = folded
        return adapted

    def forward(self, features: Mapping[str, Tokens]) -> EncodedItems:
        """Encode K items.

        Args:
            features: Modality to (K, T, D_m) tokens and (K, T) bool, true where a token exists.
                T can differ between modalities.
        """
        modalities, has_modality = [], []
        for index, (name, project) in enumerate(self.inputs.items()):
            tokens = features[name]
            if not self.fusion.reads_tokens:
                is_first = self.is_single and self.modality_pool == "cls"
                tokens = first_token(*tokens) if is_first else averaged(*tokens)
            x_KTD, mask_KT = tokens
            modalities.append(fill(project(x_KTD), mask_KT, self.absent[index]))
            has_modality.append(mask_KT.any(1))
        fused_KD: Tensor = self.fusion(modalities)
        if self.dnn is not None:
            fused_KD = self.dnn(fused_KD)
        return EncodedItems(
            fused_KD=fused_KD,
            modalities=modalities,
            has_modality=has_modality,
            modality_pool=self.modality_pool,
        )
