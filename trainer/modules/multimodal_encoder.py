"""One transformer for items and sequences, with one token for each modality of an item.

An item is one token for each of its modalities, and a sequence is the tokens of its items. The
vector of a slot is the element-wise maximum over the outputs of its tokens. An item is encoded as a
sequence of length 1.

Legend: B batch, L sequence length, N items of the catalogue, K items to encode, C tokens of an item
(modalities), D width, W width of features, T = L * C tokens of a sequence, M selected slots.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.config import Choice, PositiveInt, Probability, Temperature
from trainer.data.batches import ItemFeatures, Sequences, TrainSet
from trainer.kernels.elementwise import dropout
from trainer.losses.base import SCORES, LossSettings
from trainer.modules.sequence_encoders import SequenceSettings, take_slots
from trainer.modules.tokens import all_exist
from trainer.modules.training_mode import dropout_disabled
from trainer.modules.transformer import initialise, positions_from_end
from trainer.modules.whitening import Centring, Whitening, fit_maps


@dataclass(frozen=True, kw_only=True)
class MultimodalSettings(SequenceSettings, LossSettings):
    """Settings of the encoder. Sizes and dropout are those of the MMSRec paper."""

    dim: PositiveInt = 512
    """Width of tokens, of the transformer and of the vectors."""
    heads: PositiveInt = 8
    hidden: PositiveInt = 1024
    length: PositiveInt = 19
    """Largest number of items of a history that are read; the paper's 20 slots include the
    predicted item."""
    dropout: Probability = 0.5
    """Dropout probability inside the transformer (0.2 for dense data such as ML-1M)."""
    embed_dropout: Probability = 0.2
    """Dropout probability on the embedded tokens."""
    attention_dropout: bool = True
    """Apply ``dropout`` to the attention weights, too (the paper). Attention is faster without."""
    item_dropout: bool = True
    """Apply dropout to the items that the loss scores, too (the paper). If false, only histories
    have dropout. A pre-training does not read this setting."""
    score: Annotated[str, Choice("score", SCORES)] = "cosine"
    temperature: Temperature = 0.05
    """Divisor of the scores in the loss."""
    missing: Annotated[str, Choice("missing", ("drop", "mask"))] = "drop"
    """``drop``: a missing modality has no token; ``mask``: it has the mask token (the paper)."""
    ids: bool = False
    """Add a learned vector of each item to its tokens and to its vector. An item without training
    interactions has no learned vector and is encoded from its features alone."""
    whiten: bool = False
    """Whiten the features of each modality. The whitening is fitted on the items that have training
    interactions, without the held-out items of a pre-training. It keeps at most one direction for
    every 10 of them."""
    centre: bool = False
    """Centre the features of each modality, and scale them to a mean square of 1. Both are fitted
    on the same items as the whitening, which also centres. A dropped feature is then the mean, not
    0."""
    feature_dropout: Probability = 0.0
    """Dropout probability on the features themselves, before the first layer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ItemEmbeddings:
    """The inputs of the transformer that depend on an item alone."""

    modalities: Sequence[Tensor]
    """For each modality its projected features (K, D)."""
    identity_KD: Tensor | None
    """(K, D) learned vectors; ``None`` without ``ids``."""


class MultimodalEncoder(nn.Module):
    """Encode items and slots of sequences into one space.

    Args:
        settings: Sizes and options.
        n_items: Number of items N; the size of the table of learned vectors.
        widths: Modality to width W of its features; at least one modality.
        causal: If true, a token attends only to tokens of the same item and of earlier items.
    """

    known_N: Tensor

    def __init__(
        self,
        settings: MultimodalSettings,
        n_items: int,
        widths: Mapping[str, int],
        *,
        causal: bool,
    ) -> None:
        nn.Module.__init__(self)  # not super(): a subclass can also be a Recommender
        self.settings = settings
        self.chunks = 1
        """See :attr:`trainer.models.base.Recommender.chunks`."""
        self.causal = causal
        self.names = tuple(widths)
        dim = settings.dim
        eps = settings.norm_eps
        self.inputs = nn.ModuleDict({name: _Head(widths[name], dim, eps) for name in self.names})
        if settings.whiten:
            self.whitening = nn.ModuleDict({name: Whitening(widths[name]) for name in self.names})
        elif settings.centre:
            self.centring = nn.ModuleDict({name: Centring(widths[name]) for name in self.names})
        if settings.ids:
            self.id = nn.Embedding(n_items, dim)
            self.register_buffer("known_N", torch.ones(n_items, dtype=torch.bool))
        self.outputs = nn.ModuleDict({name: _Head(dim, dim, eps) for name in self.names})
        self.instead = nn.Embedding(2, dim)  # the mask token; the token of an item without features
        self.position = nn.Embedding(settings.length + 1, dim)
        self.modality = nn.Embedding(len(self.names), dim)
        self.norm = nn.LayerNorm(dim, eps=eps)
        # Not causal: `encode_slots` makes the causal mask, which is between items.
        self.transformer = settings.transformer(
            attention_dropout=settings.dropout if settings.attention_dropout else 0.0, causal=False
        )
        initialise(self)

    @property
    def mask_token_D(self) -> Tensor:
        """(D,) mask token, which replaces each token of a hidden item."""
        return self.instead.weight[0]

    @property
    def remarks(self) -> tuple[str, ...]:
        """A sentence about the directions that the whitening keeps; none without ``whiten``."""
        if not self.settings.whiten:
            return ()
        kept = [
            f"{part.directions:,} of {len(part.mean_W):,} directions of {name}"
            for name, part in self.whitening.items()
            if isinstance(part, Whitening)
        ]
        return (f"whiten=true keeps {', '.join(kept)}: at most one for every 10 items",)

    def fit_buffers(self, features: ItemFeatures, train: TrainSet) -> None:
        """Fit the whitening or the centring, and store the items that have a learned vector.

        Args:
            features: Features of the whole catalogue.
            train: The training interactions.
        """
        if self.settings.ids:
            self.known_N.copy_(train.counts_N > 0)
        maps = self._fitted_maps().items()
        fit_maps({k: x for k, x in maps if isinstance(x, Whitening | Centring)}, features, train)

    def _fitted_maps(self) -> nn.ModuleDict:
        if self.settings.whiten:
            return self.whitening
        return self.centring if self.settings.centre else nn.ModuleDict()

    def embed_modality(self, name: str, item_K: Tensor, features: ItemFeatures) -> Tensor:
        """Return the projected features of one modality: (K, D)."""
        x_KW = features.rows(name, item_K)
        if name in (maps := self._fitted_maps()):
            x_KW = maps[name](x_KW)
        x_KW = dropout(x_KW, self.settings.feature_dropout, self.training)
        projected_KD: Tensor = self.inputs[name](x_KW)
        return projected_KD

    def embed_identity(self, item_K: Tensor) -> Tensor:
        """Return the learned vectors (K, D); zero for items without training interactions."""
        identity_KD: Tensor = self.id(item_K) * self.known_N[item_K, None]
        return identity_KD

    def embed_items(
        self, item_K: Tensor, features: ItemFeatures, identity_KD: Tensor | None = None
    ) -> ItemEmbeddings:
        """Return the inputs of the transformer that do not depend on the slot.

        Args:
            item_K: (K,) int64.
            features: Features of the whole catalogue.
            identity_KD: (K, D) learned vectors, if they are already looked up.
        """
        modalities = [self.embed_modality(name, item_K, features) for name in self.names]
        if self.settings.ids and identity_KD is None:
            identity_KD = self.embed_identity(item_K)
        return ItemEmbeddings(modalities=modalities, identity_KD=identity_KD)

    def embed_slots(
        self,
        sequences: Sequences,
        row_BL: Tensor,
        items: ItemEmbeddings,
        features: ItemFeatures,
        hidden_BL: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Embed the tokens of sequences.

        A hidden slot has the mask token in every modality. An item without any modality has one
        special token. With the mask token, its vector would be close to every query.

        Args:
            sequences: Items of the slots.
            row_BL: (B, L) int64, the index of each slot's item in ``items``.
            items: The inputs of the distinct items.
            features: Features of the whole catalogue.
            hidden_BL: (B, L) bool, the hidden slots; ``None``: no slot is hidden.

        Returns:
            (B, L, C, D) tokens, and (B, L, C) bool, true where a token exists.
        """
        items_BL, valid_BL = sequences.items_BL, sequences.mask_BL
        if hidden_BL is None:
            hidden_BL = torch.zeros_like(valid_BL)
        present_BLC = self.present(items_BL, features)
        empty_BL = ~present_BLC.any(-1)
        special_BL = torch.zeros_like(items_BL)
        if self.settings.missing == "drop":
            special_BL = (empty_BL & ~hidden_BL).long()
        replaced_BLC = (hidden_BL | empty_BL)[..., None].expand_as(present_BLC)
        if self.settings.missing == "mask":
            replaced_BLC = replaced_BLC | ~present_BLC
        # The backward pass of `x_KD[row_BL]` adds in an order that depends on the threads.
        tokens_BLCD = torch.stack([functional.embedding(row_BL, x) for x in items.modalities], 2)
        # The causal encoder always reads `instead`, so that every step gives it a gradient.
        if self.causal or not all_exist(~replaced_BLC):
            special_BLD = self.instead(special_BL)
            tokens_BLCD = torch.where(replaced_BLC[..., None], special_BLD[:, :, None], tokens_BLCD)
        positions_BL = positions_from_end(sequences.lengths_B, items_BL.shape[1])
        tokens_BLCD = tokens_BLCD + self.position(positions_BL)[:, :, None] + self.modality.weight
        if items.identity_KD is not None:
            identity_BLD = functional.embedding(row_BL, items.identity_KD)
            identity_BLD = identity_BLD.masked_fill(hidden_BL[..., None], 0)
            # Elements of a token are about 1, and elements of a vector of length 1 are about
            # 1 / sqrt(D). With the factor, a learned vector has the same weight in both.
            tokens_BLCD = tokens_BLCD + (math.sqrt(self.settings.dim) * identity_BLD)[:, :, None]
        tokens_BLCD = dropout(self.norm(tokens_BLCD), self.settings.embed_dropout, self.training)
        return tokens_BLCD, (present_BLC | replaced_BLC) & valid_BL[..., None]

    def encode_slots(self, tokens_BLCD: Tensor, exists_BLC: Tensor, slot_M: Tensor) -> Tensor:
        """Encode tokens, and return the vectors of the selected slots.

        Args:
            tokens_BLCD: Tokens, as :meth:`embed_slots` returns them.
            exists_BLC: Bool, true where a token exists.
            slot_M: (M,) int64, the slots to return, as indices in the flattened B x L.

        Returns:
            (M, D); with ``score=cosine`` of length 1.
        """
        B, L, C, D = tokens_BLCD.shape
        mask = self.attention_mask(exists_BLC)
        token_MC = slot_M[:, None] * C + torch.arange(C, device=slot_M.device)
        states = self.transformer(tokens_BLCD.view(B, L * C, D), mask, token_MC.flatten())
        exists_MC = take_slots(exists_BLC, slot_M)
        vectors_MD = self.pool(states.view(-1, C, D), exists_MC, self.names)
        return self.settings.normalise(vectors_MD)

    def attention_mask(self, exists_BLC: Tensor) -> Tensor | None:
        """Return the tokens that a token attends to.

        Args:
            exists_BLC: Bool, true where a token exists.

        Returns:
            (B, T) or (B or 1, T, T), see :func:`trainer.kernels.attention.self_attention`; ``None``
            if each token attends to all.
        """
        B, L, C = exists_BLC.shape
        mask = None if all_exist(exists_BLC) else exists_BLC.view(B, L * C)
        if self.causal and L > 1:
            item_T = torch.arange(L, device=exists_BLC.device).repeat_interleave(C)
            before_TT = item_T <= item_T[:, None]
            mask = before_TT[None] if mask is None else before_TT & mask[:, None]
        return mask

    def pool(self, states_MCD: Tensor, exists_MC: Tensor, names: Sequence[str]) -> Tensor:
        """Return the element-wise maximum over the output heads of the tokens that exist.

        Args:
            states_MCD: Outputs of the transformer.
            exists_MC: Bool, true where a token exists; at least one in each row.
            names: The modality of each of the C tokens.

        Returns:
            (M, D), before normalisation.
        """
        heads = [self.outputs[name](states_MCD[:, c]) for c, name in enumerate(names)]
        lowest = torch.finfo(heads[0].dtype).min
        if not all_exist(exists_MC):
            heads = [x.masked_fill(~exists_MC[:, c, None], lowest) for c, x in enumerate(heads)]
        largest_MD: Tensor = functools.reduce(torch.maximum, heads)
        return largest_MD

    def encode_single_items(
        self, item_K: Tensor, features: ItemFeatures, identity_KD: Tensor | None = None
    ) -> Tensor:
        """Encode each item as a sequence of length 1: (K, D).

        Args:
            item_K: (K,) int64 item ids.
            features: Features of the whole catalogue.
            identity_KD: (K, D) learned vectors, if they are already looked up.
        """
        sequences = Sequences(items_BL=item_K[:, None], lengths_B=torch.ones_like(item_K))
        row_K1 = torch.arange(len(item_K), device=item_K.device)[:, None]
        with dropout_disabled(self, not self.settings.item_dropout):
            items = self.embed_items(item_K, features, identity_KD)
            tokens = self.embed_slots(sequences, row_K1, items, features)
            vectors_KD = self.encode_slots(*tokens, row_K1[:, 0])
        if items.identity_KD is not None:
            vectors_KD = self.settings.normalise(vectors_KD + items.identity_KD)
        return vectors_KD

    def present(self, items: Tensor, features: ItemFeatures) -> Tensor:
        """Return bool of shape (..., C), true where an item has the modality.

        Args:
            items: (...) int64 item ids.
            features: Features of the whole catalogue.
        """
        return torch.stack([features.present[name][items] for name in self.names], -1)


class _Head(nn.Sequential):
    """A linear layer and a LayerNorm."""

    def __init__(self, width: int, dim: int, norm_eps: float) -> None:
        super().__init__(nn.Linear(width, dim), nn.LayerNorm(dim, eps=norm_eps))
