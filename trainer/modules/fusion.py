"""From the tokens of an item's modalities to one vector: the fusions of MMSR.

The item encoders of MMSR (Li et al., "An Empirical Study of Training ID-Agnostic Multi-modal
Sequential Recommenders", section 3.3): coarse fusions of one vector for each modality, the same
with a three-layer DNN behind them, and two attention fusions over tokens.

Every fusion takes the same input: for each modality a matrix of tokens and which of them exist. A
pooled vector is a modality of one token; for the coarse fusions, tokens are averaged first. A
modality that an item lacks is one learned token that says so: each fusion sees what is there. (The
released code cannot do without a modality.)

Legend: K items, T tokens of a modality, S tokens of all modalities, D width, M modalities, H heads,
E width of a head.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.kernels.elementwise import dropout
from trainer.modules.tokens import Tokens, masked_mean
from trainer.modules.transformer import TransformerBlock

_SHARED = "shared"


@dataclass(frozen=True, kw_only=True, slots=True)
class FusionConfig:
    """What a fusion is built from; where code and paper differ, the sound form is the default."""

    dim: int
    """Width D of tokens and of the item's vector."""
    heads: int = 4
    """Attention heads (768 / 12 wide in the released code)."""
    hidden: int = 1024
    """Width of the feed-forward networks of the attention fusions."""
    layers: int = 1
    """Blocks of the attention fusions: the paper tries 1, 2 and 4."""
    dropout: float = 0.1
    """Probability, inside attention blocks and the DNN."""
    dnn: bool = False
    """Whether the three-layer DNN stands behind the fusion."""
    dnn_relu: bool = False
    """As published: the DNN ends in a ReLU, so that no vector has a negative element."""
    shared_norm: bool = False
    """As published: one LayerNorm for all modalities, instead of one for each (coarse fusions)."""
    pool: str = "mean"
    """Attention fusions: ``mean`` of the tokens that exist (the released code), or the state of a
    learned ``cls`` token (the paper's Eq. 3 of PMMRec)."""
    token_types: bool = True
    """Attention fusions: whether a token says of which modality it is. As published: false, the
    released merge-attention computes that and drops it."""


class Pooled(nn.Module):
    """The mean of the tokens of the only modality: there is nothing to fuse."""

    def __init__(self, config: FusionConfig, names: Sequence[str]) -> None:
        super().__init__()

    def forward(self, modalities: Sequence[Tokens]) -> Tensor:
        """(K, D)."""
        (tokens,) = modalities
        return masked_mean(*tokens)


class _Coarse(nn.Module):
    """What the coarse fusions share: a mean over tokens and a LayerNorm for each modality."""

    def __init__(self, config: FusionConfig, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)
        kept = [_SHARED] if config.shared_norm else self.names
        self.norms = nn.ModuleDict({name: nn.LayerNorm(config.dim) for name in kept})

    def _vectors(self, modalities: Sequence[Tokens]) -> list[Tensor]:
        found = []
        for name, tokens in zip(self.names, modalities, strict=True):
            norm = self.norms[_SHARED if _SHARED in self.norms else name]
            found.append(norm(masked_mean(*tokens)))
        return found


class Sum(_Coarse):
    """sum_m W_m LN(x_m)."""

    def __init__(self, config: FusionConfig, names: Sequence[str]) -> None:
        super().__init__(config, names)
        self.maps = nn.ModuleDict({name: nn.Linear(config.dim, config.dim) for name in names})

    def forward(self, modalities: Sequence[Tokens]) -> Tensor:
        """(K, D)."""
        vectors = self._vectors(modalities)
        mapped = [self.maps[name](x_KD) for name, x_KD in zip(self.names, vectors, strict=True)]
        return torch.stack(mapped).sum(0)


class Concat(_Coarse):
    """W [LN(x_1); LN(x_2); ...]."""

    def __init__(self, config: FusionConfig, names: Sequence[str]) -> None:
        super().__init__(config, names)
        self.map = nn.Linear(len(names) * config.dim, config.dim)

    def forward(self, modalities: Sequence[Tokens]) -> Tensor:
        """(K, D)."""
        fused: Tensor = self.map(torch.cat(self._vectors(modalities), dim=-1))
        return fused


class _Conditioned(_Coarse):
    """Two modalities, of which one conditions the other: the text where there is one."""

    def __init__(self, config: FusionConfig, names: Sequence[str]) -> None:
        super().__init__(config, names)
        _two(names)
        self.by = list(names).index("text") if "text" in names else 0

    def _pair(self, modalities: Sequence[Tokens]) -> tuple[Tensor, Tensor]:
        vectors = self._vectors(modalities)
        return vectors[self.by], vectors[1 - self.by]


class Gate(_Conditioned):
    """W' (sigmoid(W_t LN(t)) * W_v LN(v)): the text gates the picture (gated selection)."""

    def __init__(self, config: FusionConfig, names: Sequence[str]) -> None:
        super().__init__(config, names)
        self.gate = nn.Linear(config.dim, config.dim)
        self.value = nn.Linear(config.dim, config.dim)
        self.map = nn.Linear(config.dim, config.dim)

    def forward(self, modalities: Sequence[Tokens]) -> Tensor:
        """(K, D)."""
        by_KD, other_KD = self._pair(modalities)
        fused: Tensor = self.map(self.gate(by_KD).sigmoid() * self.value(other_KD))
        return fused


class FiLM(_Conditioned):
    """W' (g * LN(v) + b) with (g, b) = W LN(t) (Perez et al., AAAI 2018)."""

    def __init__(self, config: FusionConfig, names: Sequence[str]) -> None:
        super().__init__(config, names)
        self.condition = nn.Linear(config.dim, 2 * config.dim)
        self.map = nn.Linear(config.dim, config.dim)

    def forward(self, modalities: Sequence[Tokens]) -> Tensor:
        """(K, D)."""
        by_KD, other_KD = self._pair(modalities)
        scale_KD, shift_KD = self.condition(by_KD).chunk(2, dim=-1)
        fused: Tensor = self.map(scale_KD * other_KD + shift_KD)
        return fused


class MergeAttention(nn.Module):
    """All tokens of all modalities in one row through transformer blocks, then pooled.

    PMMRec (Li et al., arXiv:2312.09602, Eq. 3) and MMSR; blocks as BERT's, post-LN and GELU.
    """

    def __init__(self, config: FusionConfig, names: Sequence[str]) -> None:
        super().__init__()
        self.types = _types(config, names)
        self.cls = learned(config.dim) if config.pool == "cls" else None
        self.blocks = nn.ModuleList(_block(config) for _ in range(config.layers))

    def forward(self, modalities: Sequence[Tokens]) -> Tensor:
        """(K, D)."""
        typed = _typed(modalities, self.types)
        x_KSD, mask_KS = (torch.cat([one[i] for one in typed], dim=1) for i in range(2))
        x_KSD, mask_KS = _with_cls(x_KSD, mask_KS, self.cls)
        keys_KS = None if bool(mask_KS.all()) else mask_KS
        for block in self.blocks:
            x_KSD = block(x_KSD, keys_KS)
        return masked_mean(x_KSD, mask_KS) if self.cls is None else x_KSD[:, 0]


class CoAttention(nn.Module):
    """Each of two modalities looks at the other, then at itself (LXMERT's cross-modality layer).

    A layer is cross-attention, whose weights serve both directions, then self-attention and a
    feed-forward network of each modality's own. The pooled modalities, side by side, are mapped
    to one vector.
    """

    def __init__(self, config: FusionConfig, names: Sequence[str]) -> None:
        super().__init__()
        _two(names)
        self.types = _types(config, names)
        self.cls = nn.ParameterDict()
        if config.pool == "cls":
            self.cls = nn.ParameterDict({name: learned(config.dim) for name in names})
        self.cross = nn.ModuleList(_Cross(config) for _ in range(config.layers))
        self.own = nn.ModuleList(_block(config) for _ in range(2 * config.layers))
        self.map = nn.Linear(2 * config.dim, config.dim)

    def forward(self, modalities: Sequence[Tokens]) -> Tensor:
        """(K, D)."""
        typed = _typed(modalities, self.types)
        if len(self.cls):
            typed = [_with_cls(*typed[i], cls) for i, cls in enumerate(self.cls.values())]
        x = [one[0] for one in typed]
        masks = [one[1] for one in typed]
        for layer, cross in enumerate(self.cross):
            x = [cross(x[i], x[1 - i], masks[1 - i]) for i in range(2)]
            x = [self.own[2 * layer + i](x[i], masks[i]) for i in range(2)]
        pooled = [x[i][:, 0] if len(self.cls) else masked_mean(x[i], masks[i]) for i in range(2)]
        fused: Tensor = self.map(torch.cat(pooled, dim=-1))
        return fused


class _Cross(nn.Module):
    """Attention from one modality's tokens to the other's, a residual and a LayerNorm."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        self.config = config
        self.query = nn.Linear(config.dim, config.dim)
        self.key_value = nn.Linear(config.dim, 2 * config.dim)
        self.out = nn.Linear(config.dim, config.dim)
        self.norm = nn.LayerNorm(config.dim)

    def forward(self, x_KTD: Tensor, other_KSD: Tensor, mask_KS: Tensor) -> Tensor:
        K, T, D = x_KTD.shape
        heads = (self.config.heads, D // self.config.heads)
        query_KHTE = self.query(x_KTD).view(K, T, *heads).transpose(1, 2)
        key_KHSE, value_KHSE = (
            self.key_value(other_KSD).view(K, -1, 2, *heads).permute(2, 0, 3, 1, 4)
        )
        mixed_KHTE = functional.scaled_dot_product_attention(
            query_KHTE,
            key_KHSE,
            value_KHSE,
            attn_mask=mask_KS[:, None, None, :],
            dropout_p=self.config.dropout if self.training else 0.0,
        )
        out_KTD = self.out(mixed_KHTE.transpose(1, 2).reshape(K, T, D))
        normed: Tensor = self.norm(x_KTD + dropout(out_KTD, self.config.dropout, self.training))
        return normed


class DNN(nn.Module):
    """Three layers, each a dropout and a linear map, with ReLUs between them.

    As published (``dnn_relu``) one more ReLU stands at the end.
    """

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        self.config = config
        self.maps = nn.ModuleList(nn.Linear(config.dim, config.dim) for _ in range(3))

    def forward(self, x_KD: Tensor) -> Tensor:
        """(K, D)."""
        for index, layer in enumerate(self.maps):
            x_KD = layer(dropout(x_KD, self.config.dropout, self.training))
            if index < 2 or self.config.dnn_relu:
                x_KD = x_KD.relu()
        return x_KD


FUSIONS: dict[str, type[nn.Module]] = {
    "sum": Sum,
    "concat": Concat,
    "gate": Gate,
    "film": FiLM,
    "co-attention": CoAttention,
    "merge-attention": MergeAttention,
}
ANY_NUMBER = ("sum", "concat", "merge-attention")
"""Those that fuse more than two modalities."""


def _two(names: Sequence[str]) -> None:
    assert len(names) == 2, names


def _block(config: FusionConfig) -> TransformerBlock:
    return TransformerBlock(
        dim=config.dim,
        heads=config.heads,
        hidden=config.hidden,
        dropout=config.dropout,
        attention_dropout=config.dropout,
        causal=False,
    )


def _types(config: FusionConfig, names: Sequence[str]) -> nn.Parameter | None:
    return learned(len(names), config.dim) if config.token_types else None


def learned(*shape: int) -> nn.Parameter:
    """Return a learned vector or table of this shape, drawn from N(0, 0.02)."""
    return nn.Parameter(torch.randn(*shape) * 0.02)


def _typed(modalities: Sequence[Tokens], types_MD: Tensor | None) -> list[Tokens]:
    if types_MD is None:
        return list(modalities)
    return [(x_KTD + types_MD[m], mask_KT) for m, (x_KTD, mask_KT) in enumerate(modalities)]


def _with_cls(x_KTD: Tensor, mask_KT: Tensor, cls_D: Tensor | None) -> Tokens:
    if cls_D is None:
        return x_KTD, mask_KT
    return (
        torch.cat([cls_D.expand(len(x_KTD), 1, -1), x_KTD], dim=1),
        functional.pad(mask_KT, (1, 0), value=True),
    )
