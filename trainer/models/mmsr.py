"""MMSR: any item encoder, any fusion, any sequence tower, and the same three from item ids.

Li et al., "An Empirical Study of Training ID-Agnostic Multi-modal Sequential Recommenders": an
item's modalities are fused into one vector (``trainer.modules.fusion``), a causal encoder reads the
vectors of a history (``trainer.modules.sequence_encoders``), a score is an inner product. ``IDSR``
is the paper's counterpart, a learned vector for each item in place of its modalities.

Where it goes beyond the paper: besides the binary cross-entropy with one sampled negative, the
in-batch softmax and the softmax over the catalogue. The item tower reads backbones' pooled vectors
or token tables; the blocks above a ``layer-K`` table can be trained, see
:mod:`trainer.finetune.upper_blocks`.
Every item of a batch is encoded once.

Legend: B batch, L sequence length, N items, K distinct items, T tokens, D width, M predicted
positions.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from features.errors import UserError, unknown
from trainer.checks import check_heads, check_positive, check_probability, check_temperature
from trainer.data.batches import Batch, ItemFeatures, Sequences
from trainer.data.negative_sampling import sample_unseen
from trainer.data.windows import WindowSampling
from trainer.distributed import gather_ids, gather_rows, rank_offset, scale_to_global_mean
from trainer.finetune.upper_blocks import item_tokens
from trainer.losses.bce import sampled_bce
from trainer.losses.in_batch import (
    Columns,
    ExcludedLabels,
    in_batch,
    log_popularity,
    own_items,
)
from trainer.losses.softmax import full_softmax
from trainer.models.base import Catalogue, Recommender
from trainer.modules.fusion import FUSIONS, FusionConfig
from trainer.modules.item_encoder import ItemTower
from trainer.modules.sequence_encoders import TOWERS, TowerConfig, last_state

LOSSES = ("bce", "in-batch", "softmax")
SCORES = ("scaled", "dot", "cosine")
_TOKENS_AT_ONCE = 2**15  # without gradients; with them all activations are kept anyway


@dataclass(frozen=True, kw_only=True, slots=True)
class IDSRConfig:
    """Hyper-parameters of a sequence tower over one vector an item."""

    dim: int = 256
    """Width of item vectors and states (the paper: 768)."""
    tower: str = "sasrec"
    """``sasrec``, ``gru`` or ``nextitnet``."""
    layers: int = 2
    """Blocks of the sequence tower (the paper: 2, 4 and 2 for the three)."""
    heads: int = 2
    """Attention heads of the sequence tower."""
    hidden: int = 1024
    """Width of the feed-forward networks, in the fusion too."""
    length: int = 20
    """Most items of a history that are read."""
    dropout: float = 0.1
    """Probability, in both towers."""
    loss: str = "in-batch"
    """``bce``: one sampled negative for each position (the paper); ``in-batch``: softmax over the
    items of the batch, without those of the user; ``softmax``: over the catalogue."""
    debias: bool = True
    """In-batch: subtract the log popularity from scores, since popular items are drawn oftener."""
    score: str = "scaled"
    """What the loss takes for a score: ``scaled``, the inner product over the root of ``dim``, so
    that training begins alike at any width; ``dot``, the inner product (the paper); ``cosine``."""
    temperature: float = 1.0
    """Divides the scores in the loss; a cosine needs one of about 0.07."""

    def __post_init__(self) -> None:
        check_positive(self, "dim", "layers", "heads", "hidden", "length")
        check_temperature(self, "temperature")
        check_probability(self, "dropout")
        check_heads(self.dim, self.heads)
        if self.tower not in TOWERS:
            raise unknown("tower", self.tower, list(TOWERS))
        if self.loss not in LOSSES:
            raise unknown("loss", self.loss, list(LOSSES))
        if self.score not in SCORES:
            raise unknown("score", self.score, list(SCORES))

    @property
    def scale(self) -> float:
        """Factor on inner products in the loss."""
        root = math.sqrt(self.dim) if self.score == "scaled" else 1.0
        return 1 / (self.temperature * root)


@dataclass(frozen=True, kw_only=True, slots=True)
class MMSRConfig(IDSRConfig):
    """Hyper-parameters of MMSR; options say where the released code or the paper differ."""

    fusion: str = "merge-attention"
    """``sum``, ``concat``, ``gate``, ``film``, ``co-attention`` or ``merge-attention``; without a
    meaning where there is one modality."""
    dnn: bool = False
    """Whether a three-layer DNN stands behind the fusion."""
    fusion_layers: int = 1
    """Blocks of the attention fusions (the paper tries 1, 2 and 4)."""
    fusion_heads: int = 4
    """Attention heads of the attention fusions."""
    pool: str = "mean"
    """Attention fusions: ``mean`` of the tokens (the released code), or a learned ``cls`` token."""
    token_types: bool = True
    """Attention fusions: tokens say of which modality they are; as published: false."""
    shared_norm: bool = False
    """Coarse fusions: one LayerNorm for all modalities; as published: true."""
    dnn_relu: bool = False
    """The DNN ends in a ReLU; as published: true."""

    def __post_init__(self) -> None:
        IDSRConfig.__post_init__(self)  # `super()` does not know a class with slots
        check_positive(self, "fusion_layers", "fusion_heads")
        if self.fusion not in FUSIONS:
            raise unknown("fusion", self.fusion, list(FUSIONS))
        if self.pool not in ("mean", "cls"):
            raise unknown("pool", self.pool, ["mean", "cls"])
        if self.dim % self.fusion_heads:
            raise UserError(
                f"dim={self.dim} is not a multiple of fusion_heads={self.fusion_heads};"
                " change one of them"
            )


class IDSR(Recommender):
    """A learned vector for each item, and a causal sequence tower over them."""

    transfer_groups: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "items": ("item_tower.",),
        "users": ("sequence_tower.",),
    }
    item_tables: ClassVar[tuple[str, ...]] = ("item_tower.",)
    reverse_positions = ("sequence_tower.position.weight",)

    def __init__(self, config: IDSRConfig, catalogue: Catalogue) -> None:
        super().__init__()
        self.config = config
        self.item_tower = self._item_tower(catalogue)
        self.sequence_tower = TOWERS[config.tower](
            TowerConfig(
                dim=config.dim,
                layers=config.layers,
                heads=config.heads,
                hidden=config.hidden,
                length=config.length,
                dropout=config.dropout,
            )
        )
        _initialise(self)
        self.backbones = nn.ModuleDict(dict(catalogue.backbones))  # trained already

    def _item_tower(self, catalogue: Catalogue) -> nn.Module:
        return nn.Embedding(catalogue.n_items, self.config.dim)

    def _encode_some(self, items_K: Tensor, features: ItemFeatures) -> Tensor:
        vectors_KD: Tensor = self.item_tower(items_K)
        return vectors_KD

    @property
    def window_sampling(self) -> WindowSampling:
        """Windows over the whole history: every interaction is a target, the newest up to twice."""
        return WindowSampling(
            length=self.config.length + 1, stride=self.config.length, every_target=True
        )

    @property
    def history(self) -> int:
        """Most items of a history that are read."""
        return self.config.length

    def encode_items(self, features: ItemFeatures) -> Tensor:
        """Encode the whole catalogue: (N, D), with ``score=cosine`` each of length 1."""
        longest = max([1, *(tokens.longest for tokens in features.tokens.values())])
        device = next(self.parameters()).device
        items_N = torch.arange(features.n_items, device=device)
        size = max(1, _TOKENS_AT_ONCE // longest)
        return torch.cat([self._items(items_K, features) for items_K in items_N.split(size)])

    def encode_sequences(
        self, item_vectors_ND: Tensor, sequences: Sequences, features: ItemFeatures
    ) -> Tensor:
        """The state at each history's last item: (B, D)."""
        return last_state(self._states(item_vectors_ND, sequences), sequences)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """The configured loss of the next item at every position of every window."""
        windows = batch.sequences
        # What stands beyond a sequence's end becomes one of the batch's items: it is not encoded.
        items_BL = torch.where(windows.mask_BL, windows.items_BL, windows.items_BL[0, 0])
        inputs = Sequences(
            items_BL=items_BL[:, :-1], lengths_B=(windows.lengths_B - 1).clamp_min(1)
        )
        targets_BL, predicted_BL = items_BL[:, 1:], windows.mask_BL[:, 1:]
        scale = self.config.scale
        if self.config.loss == "softmax":
            item_ND = self.encode_items(batch.features)
            query_MD = self._states(item_ND, inputs)[predicted_BL]
            return {"loss": full_softmax(query_MD, item_ND, targets_BL[predicted_BL], scale)}
        row_M = predicted_BL.nonzero()[:, 0]
        if self.config.loss == "bce":
            drawn_M, exists_M = sample_unseen(batch.train, batch.users_B[row_M], batch.generator)
        else:
            drawn_M, exists_M = items_BL.new_zeros(0), predicted_BL.new_zeros(0)
        items_K, place = torch.cat([items_BL.flatten(), drawn_M]).unique(return_inverse=True)
        item_KD = self._items(items_K, batch.features)
        place_BL = place[: items_BL.numel()].view_as(items_BL)
        inputs = Sequences(items_BL=place_BL[:, :-1], lengths_B=inputs.lengths_B)
        query_MD = self._states(item_KD, inputs)[predicted_BL]
        target_M = place_BL[:, 1:][predicted_BL]
        if self.config.loss == "bce":
            negative_M = place[items_BL.numel() :]
            positive_MD, negative_MD = (
                functional.embedding(at_M, item_KD) for at_M in (target_M, negative_M)
            )
            return {"loss": sampled_bce(query_MD, positive_MD, negative_MD, exists_M, scale)}
        # Columns are the items of all processes' batches.
        counts_K = torch.bincount(place_BL[windows.mask_BL], minlength=len(items_K))
        items_C = gather_ids(items_K)
        popularity_N = log_popularity(batch.train.counts_N) if self.config.debias else None
        loss = in_batch(
            query_MD,
            gather_rows(item_KD),
            rank_offset(len(items_K), items_K.device) + target_M,
            scale=scale,
            columns=Columns(
                label_C=items_C,
                correction_C=None if popularity_N is None else popularity_N[items_C],
                count_C=gather_ids(counts_K),
            ),
            excluded=ExcludedLabels(own_UJ=own_items(batch), owner_M=row_M),
        )
        return {"loss": scale_to_global_mean(loss, query_MD)}

    def _items(self, items_K: Tensor, features: ItemFeatures) -> Tensor:
        return self._vectors(self._encode_some(items_K, features))

    def _states(self, item_KD: Tensor, sequences: Sequences) -> Tensor:
        # Not `item_KD[...]`: the order in which its backward pass adds is left to the threads.
        x_BLD = functional.embedding(sequences.items_BL, item_KD)
        return self._vectors(self.sequence_tower(x_BLD, sequences.lengths_B))

    def _vectors(self, x: Tensor) -> Tensor:
        return functional.normalize(x, dim=-1) if self.config.score == "cosine" else x


def _initialise(module: nn.Module) -> None:
    """Draw linear and embedding weights as Glorot and Bengio do (the released code); biases 0.

    Smaller ones, such as BERT's of 0.02, starve the DNN of three layers at small widths.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.xavier_normal_(part.weight)
        if isinstance(part, nn.Linear):
            nn.init.zeros_(part.bias)


class MMSR(IDSR):
    """Items by whichever modalities have features: text, pictures, both, a joint vector.

    Raises:
        UserError: There are no features, or the fusion cannot fuse as many modalities.
    """

    config: MMSRConfig
    transfer_groups: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **IDSR.transfer_groups,
        "items": ("item_tower.", "backbones."),
        **{
            name: (
                f"item_tower.inputs.{name}.",
                f"backbones.{name}.",
                "item_tower.absent",
                "item_tower.fusion.",
                "item_tower.dnn.",
                "sequence_tower.",
            )
            for name in ("text", "image")
        },
    }
    item_tables: ClassVar[tuple[str, ...]] = ()
    modality_tables = ("item_tower.absent", "item_tower.fusion.types")

    def _item_tower(self, catalogue: Catalogue) -> nn.Module:
        if not catalogue.widths:
            raise UserError(
                "mmsr needs features; run mmrec extract for this dataset, or train idsr"
            )
        config = self.config
        fusion = FusionConfig(
            dim=config.dim,
            heads=config.fusion_heads,
            hidden=config.hidden,
            layers=config.fusion_layers,
            dropout=config.dropout,
            dnn=config.dnn,
            dnn_relu=config.dnn_relu,
            shared_norm=config.shared_norm,
            pool=config.pool,
            token_types=config.token_types,
        )
        return ItemTower(config.fusion, fusion, catalogue.widths)

    def _encode_some(self, items_K: Tensor, features: ItemFeatures) -> Tensor:
        vectors_KD: Tensor = self.item_tower(item_tokens(items_K, features, self.backbones))
        return vectors_KD
