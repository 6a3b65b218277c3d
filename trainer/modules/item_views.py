"""Encode views of items, from some of their modalities, for the pre-training of MMSRec.

Legend: K items, M items of a view, C tokens of an item, D width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from trainer.data.batches import ItemFeatures
from trainer.kernels.elementwise import dropout
from trainer.modules.multimodal_encoder import MultimodalEncoder
from trainer.modules.tokens import all_exist

View = tuple[Sequence[str], Tensor]
"""The modalities that a view encodes, and (M,) int64, the indices of its items in ``item_K``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _ViewTokens:
    names: Sequence[str]
    """The modality of each token."""
    x_MCD: Tensor
    exists_MC: Tensor


def encode_views(
    encoder: MultimodalEncoder, item_K: Tensor, views: Sequence[View], features: ItemFeatures
) -> list[Tensor]:
    """Encode items, each as a sequence of length 1, from some of their modalities.

    The projected features of an item are computed once for all views. Views with the same number of
    tokens pass through the transformer together.

    Args:
        encoder: The encoder.
        item_K: (K,) int64 item ids.
        views: The views. Each item of a view must have at least one of the view's modalities.
        features: Features of the whole catalogue.

    Returns:
        For each view (M, D) vectors of length 1.
    """
    position_D, modality_CD = encoder.position.weight[0], encoder.modality.weight
    masked_CD = encoder.norm(encoder.mask_token_D + position_D + modality_CD)
    embedded = {
        name: encoder.norm(
            encoder.embed_modality(name, item_K, features) + position_D + modality_CD[c]
        )
        for c, name in enumerate(encoder.names)
    }
    tokens = []
    for names, row_M in views:
        present = {name: features.present[name][item_K[row_M]] for name in names}
        tokens.append(_view_tokens(encoder, embedded, masked_CD, row_M, present))
    vectors: dict[int, Tensor] = {}
    for count in sorted({len(view.names) for view in tokens}):
        group = [number for number, view in enumerate(tokens) if len(view.names) == count]
        x_MCD = torch.cat([tokens[number].x_MCD for number in group])
        exists_MC = torch.cat([tokens[number].exists_MC for number in group])
        x_MCD = dropout(x_MCD, encoder.settings.embed_dropout, encoder.training)
        states_MCD = encoder.transformer(x_MCD, None if all_exist(exists_MC) else exists_MC)
        sizes = [len(tokens[number].x_MCD) for number in group]
        for number, state_MCD in zip(group, states_MCD.split(sizes), strict=True):
            view = tokens[number]
            pooled_MD = encoder.pool(state_MCD, view.exists_MC, view.names)
            vectors[number] = functional.normalize(pooled_MD, dim=-1)
    return [vectors[number] for number in range(len(views))]


def _view_tokens(
    encoder: MultimodalEncoder,
    embedded: Mapping[str, Tensor],
    masked_CD: Tensor,
    row_M: Tensor,
    present: Mapping[str, Tensor],
) -> _ViewTokens:
    """Stack the tokens of a view.

    Args:
        encoder: The encoder. With ``missing=mask``, the mask token replaces each missing token.
        embedded: Each modality of the encoder to its embedded tokens (K, D).
        masked_CD: The embedded mask token in each modality.
        row_M: Index of each item of the view in ``embedded``.
        present: Each modality of the view to (M,) bool, true for the items that have it.
    """
    as_mask = encoder.settings.missing == "mask"
    names = [name for name in embedded if as_mask or name in present]
    absent_M = torch.zeros_like(row_M, dtype=torch.bool)
    exists_MC = torch.stack([present.get(name, absent_M) for name in names], dim=1)
    x_MCD = torch.stack([embedded[name][row_M] for name in names], dim=1)
    if as_mask:
        x_MCD = torch.where(exists_MC[..., None], x_MCD, masked_CD)
        exists_MC = torch.ones_like(exists_MC)
    return _ViewTokens(names=names, x_MCD=x_MCD, exists_MC=exists_MC)
