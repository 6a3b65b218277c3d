"""The item encoder: projections of the modalities, fusion and DNN."""

from collections.abc import Mapping

from torch import Tensor, nn

from features.errors import UserError
from trainer.modules.fusion import (
    ANY_NUMBER,
    DNN,
    FUSIONS,
    CoAttention,
    FusionConfig,
    MergeAttention,
    Pooled,
    learned,
)
from trainer.modules.tokens import Tokens, averaged, fill


class ItemTower(nn.Module):
    """One item's features of all modalities to its vector: projections, fusion, DNN.

    A model of one modality has nothing to fuse: the item is the mean of its projected tokens.

    Args:
        fusion: A name in ``FUSIONS``.
        config: Of the fusion.
        widths: Modality -> width of its features; at least one.

    Raises:
        UserError: The fusion is one of two modalities, and there are more.
    """

    def __init__(self, fusion: str, config: FusionConfig, widths: Mapping[str, int]) -> None:
        super().__init__()
        names = list(widths)
        self.inputs = nn.ModuleDict({name: nn.Linear(widths[name], config.dim) for name in names})
        self.absent = learned(len(names), config.dim)
        if len(names) > 2 and fusion not in ANY_NUMBER:
            raise UserError(
                f"fusion={fusion!r} fuses two modalities, and there are {', '.join(names)};"
                f" name two by --features, or set fusion={' or '.join(ANY_NUMBER)}"
            )
        self.fusion = (FUSIONS[fusion] if len(names) > 1 else Pooled)(config, names)
        self.reads_tokens = isinstance(self.fusion, MergeAttention | CoAttention)
        self.dnn = DNN(config) if config.dnn else None

    def forward(self, features: Mapping[str, Tokens]) -> Tensor:
        """Encode K items: (K, D).

        Args:
            features: Modality -> (K, T, D_m) and (K, T) bool, a T for each modality.
        """
        modalities = []
        for index, (name, project) in enumerate(self.inputs.items()):
            tokens = features[name]
            x_KTD, mask_KT = tokens if self.reads_tokens else averaged(*tokens)
            modalities.append(fill(project(x_KTD), mask_KT, self.absent[index]))
        fused_KD: Tensor = self.fusion(modalities)
        return fused_KD if self.dnn is None else self.dnn(fused_KD)
