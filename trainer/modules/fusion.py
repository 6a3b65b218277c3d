"""Fusions: combine the tokens of an item's modalities into one vector.

The fusions are those of MMSR (Li et al., "An Empirical Study of Training ID-Agnostic Multi-modal
Sequential Recommenders", section 3.3): coarse fusions of one vector for each modality, optionally
followed by a three-layer DNN, and two attention fusions over tokens.

All fusions take the same input: for each modality the tokens, and a mask of the tokens that exist.
A pooled vector is a modality of one token. The coarse fusions average the tokens first.
A learned token replaces a modality that an item lacks, so that a fusion can tell which modalities
exist. (The released code requires all modalities.)

Legend: K items, T tokens of a modality, S tokens of all modalities, D width, M modalities, H heads,
E width of a head.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.config import Choice, NetworkSettings, NormEpsilon, PositiveInt, check_multiple
from trainer.kernels.elementwise import dropout
from trainer.modules.tokens import Tokens, all_exist, masked_mean
from trainer.modules.transformer import BlockConfig, TransformerBlock

_SHARED = "shared"


@dataclass(frozen=True, kw_only=True)
class FusionSettings(NetworkSettings):
    """Settings of a fusion. Where code and paper differ, the sound form is the default."""

    fusion_layers: PositiveInt = 1
    """Blocks of the attention fusions (the paper tries 1, 2 and 4)."""
    fusion_heads: PositiveInt = 4
    """Attention heads of the attention fusions."""
    pool: Annotated[str, Choice("pool", ("mean", "cls"))] = "mean"
    """Vector of an item in an attention fusion: the ``mean`` of the states of its tokens (the
    released code), or the state of a learned ``cls`` token (PMMRec, Eq. 3)."""
    token_types: bool = True
    """With an attention fusion, add a learned vector of the modality to each token. As published:
    true with ``co-attention``; false with ``merge-attention``, where the released code computes the
    vector but does not use it."""
    shared_norm: bool = False
    """With a coarse fusion, use one LayerNorm for all modalities. As published: true."""
    dnn: bool = False
    """Apply a DNN of three layers after the fusion."""
    dnn_relu: bool = False
    """Apply a ReLU after the last layer of the DNN. As published: true, which makes all elements of
    the vectors non-negative."""
    fusion_norm_eps: NormEpsilon = 1e-5
    """Epsilon of the LayerNorms of the fusion. As published: 1e-12 with an attention fusion, 1e-6
    with a coarse fusion."""
    centre: bool = True
    """Centre the pooled vectors of each modality, and scale them to a mean square of 1, so that no
    modality has larger inputs than another. Both are fitted on the items that have training
    interactions. Tables of tokens are read as they are. As published: false."""

    def check(self) -> None:
        """Raise a UserError unless ``dim`` is a multiple of ``fusion_heads``."""
        super().check()
        check_multiple(self, "dim", "fusion_heads")


class Fusion(nn.Module, ABC):
    """Base class of fusions: combine the tokens of an item's modalities into one vector.

    Args:
        settings: Settings of the fusion.
        names: The modalities, in the order in which their tokens are given.
    """

    reads_tokens: ClassVar[bool] = False
    """True if the fusion reads single tokens; false if it gets the mean of each modality."""
    takes_any_number: ClassVar[bool] = True
    """False if the fusion takes exactly two modalities."""

    def __init__(self, settings: FusionSettings, names: Sequence[str]) -> None:
        super().__init__()
        self.settings = settings
        self.names = tuple(names)

    @abstractmethod
    def forward(self, modalities: Sequence[Tokens]) -> Tensor:
        """Return the vectors of K items: (K, D).

        Args:
            modalities: For each modality (K, T, D) tokens, and (K, T) bool, true where a token
                exists; at least one token for each item.
        """


class Pooled(Fusion):
    """Mean of the tokens, for items with a single modality."""

    def forward(self, modalities: Sequence[Tokens]) -> Tensor:
        """Return the mean of the tokens: (K, D)."""
        (tokens,) = modalities
        return masked_mean(*tokens)


class _Coarse(Fusion):
    """Base class of the coarse fusions: a mean over tokens and a LayerNorm for each modality."""

    def __init__(self, settings: FusionSettings, names: Sequence[str]) -> None:
        super().__init__(settings, names)
        norm_names = [_SHARED] if settings.shared_norm else self.names
        self.norms = nn.ModuleDict({name: _norm(settings) for name in norm_names})

    def _vectors(self, modalities: Sequence[Tokens]) -> list[Tensor]:
        vectors = []
        for name, tokens in zip(self.names, modalities, strict=True):
            norm = self.norms[_SHARED if _SHARED in self.norms else name]
            vectors.append(norm(masked_mean(*tokens)))
        return vectors


class Sum(_Coarse):
    """Sum of the mapped modalities: sum_m W_m LN(x_m)."""

    def __init__(self, settings: FusionSettings, names: Sequence[str]) -> None:
        super().__init__(settings, names)
        self.maps = nn.ModuleDict({name: nn.Linear(settings.dim, settings.dim) for name in names})

    def forward(self, modalities: Sequence[Tokens]) -> Tensor:
        """Return the fused vectors: (K, D)."""
        vectors = self._vectors(modalities)
        mapped = [self.maps[name](x_KD) for name, x_KD in zip(self.names, vectors, strict=True)]
        return torch.stack(mapped).sum(0)


class Concat(_Coarse):
    """Map of the concatenated modalities: W [LN(x_1); LN(x_2); ...]."""

    def __init__(self, settings: FusionSettings, names: Sequence[str]) -> None:
        super().__init__(settings, names)
        self.map = nn.Linear(len(names) * settings.dim, settings.dim)

    def forward(self, modalities: Sequence[Tokens]) -> Tensor:
        """Return the fused vectors: (K, D)."""
        fused: Tensor = self.map(torch.cat(self._vectors(modalities), dim=-1))
        return fused


class _Conditioned(_Coarse):
    """Base class of fusions in which one of two modalities conditions the other.

    The conditioning modality is the text, or the first modality if there is no text.
    """

    takes_any_number = False

    def __init__(self, settings: FusionSettings, names: Sequence[str]) -> None:
        super().__init__(settings, names)
        self.condition_index = list(names).index("text") if "text" in names else 0

    def _pair(self, modalities: Sequence[Tokens]) -> tuple[Tensor, Tensor]:
        vectors = self._vectors(modalities)
        return vectors[self.condition_index], vectors[1 - self.condition_index]


class Gate(_Conditioned):
    """Gated selection, in which t gates v: W' (sigmoid(W_t LN(t)) * W_v LN(v))."""

    def __init__(self, settings: FusionSettings, names: Sequence[str]) -> None:
        super().__init__(settings, names)
        self.gate = nn.Linear(settings.dim, settings.dim)
        self.value = nn.Linear(settings.dim, settings.dim)
        self.map = nn.Linear(settings.dim, settings.dim)

    def forward(self, modalities: Sequence[Tokens]) -> Tensor:
        """Return the fused vectors: (K, D)."""
        condition_KD, other_KD = self._pair(modalities)
        fused: Tensor = self.map(self.gate(condition_KD).sigmoid() * self.value(other_KD))
        return fused


class FiLM(_Conditioned):
    """FiLM (Perez et al., AAAI 2018): W' (g * LN(v) + b) with (g, b) = W LN(t)."""

    def __init__(self, settings: FusionSettings, names: Sequence[str]) -> None:
        super().__init__(settings, names)
        self.condition = nn.Linear(settings.dim, 2 * settings.dim)
        self.map = nn.Linear(settings.dim, settings.dim)

    def forward(self, modalities: Sequence[Tokens]) -> Tensor:
        """Return the fused vectors: (K, D)."""
        condition_KD, other_KD = self._pair(modalities)
        scale_KD, shift_KD = self.condition(condition_KD).chunk(2, dim=-1)
        fused: Tensor = self.map(scale_KD * other_KD + shift_KD)
        return fused


class MergeAttention(Fusion):
    """Transformer blocks over the concatenated tokens of all modalities, then pooling.

    Source: PMMRec (Li et al., arXiv:2312.09602, Eq. 3) and MMSR. The blocks are those of BERT:
    post-LN with GELU.
    """

    reads_tokens = True

    def __init__(self, settings: FusionSettings, names: Sequence[str]) -> None:
        super().__init__(settings, names)
        self.types = _types(settings, names)
        self.cls = learned(settings.dim) if settings.pool == "cls" else None
        self.blocks = nn.ModuleList(_block(settings) for _ in range(settings.fusion_layers))

    def forward(self, modalities: Sequence[Tokens]) -> Tensor:
        """Return the fused vectors: (K, D)."""
        typed = _typed(modalities, self.types)
        x_KSD, mask_KS = (torch.cat([tokens[i] for tokens in typed], dim=1) for i in range(2))
        x_KSD, mask_KS = _with_cls(x_KSD, mask_KS, self.cls)
        keys_KS = None if all_exist(mask_KS) else mask_KS
        for block in self.blocks:
            x_KSD = block(x_KSD, keys_KS)
        return masked_mean(x_KSD, mask_KS) if self.cls is None else x_KSD[:, 0]


class CoAttention(Fusion):
    """Each of two modalities attends to the other, then to itself (LXMERT's cross-modality layer).

    A layer is cross-attention with the same weights in both directions, then for each modality a
    self-attention and a feed-forward network. The pooled modalities are concatenated and mapped to
    one vector.
    """

    reads_tokens = True
    takes_any_number = False

    def __init__(self, settings: FusionSettings, names: Sequence[str]) -> None:
        super().__init__(settings, names)
        self.types = _types(settings, names)
        self.cls = nn.ParameterDict()
        if settings.pool == "cls":
            self.cls = nn.ParameterDict({name: learned(settings.dim) for name in names})
        self.cross = nn.ModuleList(_Cross(settings) for _ in range(settings.fusion_layers))
        self.own = nn.ModuleList(_block(settings) for _ in range(2 * settings.fusion_layers))
        self.map = nn.Linear(2 * settings.dim, settings.dim)

    def forward(self, modalities: Sequence[Tokens]) -> Tensor:
        """Return the fused vectors: (K, D)."""
        typed = _typed(modalities, self.types)
        if len(self.cls):
            typed = [_with_cls(*typed[i], cls) for i, cls in enumerate(self.cls.values())]
        x, masks = [x_KTD for x_KTD, _ in typed], [mask_KT for _, mask_KT in typed]
        for layer, cross in enumerate(self.cross):
            x = [cross(x[i], x[1 - i], masks[1 - i]) for i in range(2)]
            x = [self.own[2 * layer + i](x[i], masks[i]) for i in range(2)]
        pooled = [x[i][:, 0] if len(self.cls) else masked_mean(x[i], masks[i]) for i in range(2)]
        fused: Tensor = self.map(torch.cat(pooled, dim=-1))
        return fused


class _Cross(nn.Module):
    """Attention from one modality's tokens to the other's, a residual and a LayerNorm."""

    def __init__(self, settings: FusionSettings) -> None:
        super().__init__()
        self.settings = settings
        self.query = nn.Linear(settings.dim, settings.dim)
        self.key_value = nn.Linear(settings.dim, 2 * settings.dim)
        self.out = nn.Linear(settings.dim, settings.dim)
        self.norm = _norm(settings)

    def forward(self, x_KTD: Tensor, other_KSD: Tensor, mask_KS: Tensor) -> Tensor:
        K, T, D = x_KTD.shape
        heads = (self.settings.fusion_heads, D // self.settings.fusion_heads)
        query_KHTE = self.query(x_KTD).view(K, T, *heads).transpose(1, 2)
        key_KHSE, value_KHSE = (
            self.key_value(other_KSD).view(K, -1, 2, *heads).permute(2, 0, 3, 1, 4)
        )
        mixed_KHTE = functional.scaled_dot_product_attention(
            query_KHTE,
            key_KHSE,
            value_KHSE,
            attn_mask=mask_KS[:, None, None, :],
            dropout_p=self.settings.dropout if self.training else 0.0,
        )
        out_KTD = self.out(mixed_KHTE.transpose(1, 2).reshape(K, T, D))
        normed: Tensor = self.norm(x_KTD + dropout(out_KTD, self.settings.dropout, self.training))
        return normed


class DNN(nn.Module):
    """Three layers, each a dropout and a linear map, with a ReLU between two layers.

    With ``dnn_relu``, as published, a ReLU follows the last layer.
    """

    def __init__(self, settings: FusionSettings) -> None:
        super().__init__()
        self.settings = settings
        self.maps = nn.ModuleList(nn.Linear(settings.dim, settings.dim) for _ in range(3))

    def forward(self, x_KD: Tensor) -> Tensor:
        """Return the fused vectors: (K, D)."""
        for index, layer in enumerate(self.maps):
            x_KD = layer(dropout(x_KD, self.settings.dropout, self.training))
            if index < 2 or self.settings.dnn_relu:
                x_KD = x_KD.relu()
        return x_KD


def _block(settings: FusionSettings) -> TransformerBlock:
    config = BlockConfig(
        dim=settings.dim,
        heads=settings.fusion_heads,
        hidden=settings.hidden,
        dropout=settings.dropout,
        attention_dropout=settings.dropout,
        causal=False,
        inner_dropout=settings.inner_dropout,
        norm_eps=settings.fusion_norm_eps,
    )
    return TransformerBlock(config)


def _norm(settings: FusionSettings) -> nn.LayerNorm:
    return nn.LayerNorm(settings.dim, eps=settings.fusion_norm_eps)


def _types(settings: FusionSettings, names: Sequence[str]) -> nn.Parameter | None:
    return learned(len(names), settings.dim) if settings.token_types else None


def learned(*shape: int) -> nn.Parameter:
    """Return a learned vector or table of this shape, drawn from N(0, 0.02^2)."""
    return nn.Parameter(torch.randn(*shape) * 0.02)


def _typed(modalities: Sequence[Tokens], types_MD: Tensor | None) -> list[Tokens]:
    if types_MD is None:
        return list(modalities)
    return [(x_KTD + types_MD[m], mask_KT) for m, (x_KTD, mask_KT) in enumerate(modalities)]


def _with_cls(x_KTD: Tensor, mask_KT: Tensor, cls_D: Tensor | None) -> Tokens:
    if cls_D is None:
        return x_KTD, mask_KT
    return (
        torch.cat([cls_D.expand(x_KTD.shape[0], 1, -1), x_KTD], dim=1),
        functional.pad(mask_KT, (1, 0), value=True),
    )
