"""Evaluate retrieval across modalities: from an item's text to its image or video, and back.

Each item of a pool is encoded twice: from its text, and from its image and video. The text encoding
of an item is a query: it ranks the visual encodings of the pool, and the target is the visual
encoding of the same item. The other direction is evaluated in the same way. Ranks are exact, and
ties count against the model.

Items with the same image and video, such as the captions of one image, have one visual encoding:
each of their texts is a query that has it as its target. In the other direction, the target is the
best ranked of their texts (Recall@k of Flickr8k, Hodosh et al., JAIR 2013).

Legend: N items, K items of the pool, G different visual encodings, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from features.dataset import Ints
from features.errors import UserError
from retrieval.metrics import PerUser, hit_rate, reciprocal_rank
from retrieval.ranking import rank
from retrieval.seen_items import SeenItems
from retrieval.significance import bootstrap
from trainer.data.batches import ItemFeatures
from trainer.modules.training_mode import dropout_disabled

CUTOFFS = (1, 5, 10)
"""The k of Recall@k."""
TO_VISION, TO_TEXT = "text-to-vision", "vision-to-text"
_ITEMS_PER_BLOCK = 4096  # items that are encoded together


@dataclass(frozen=True, kw_only=True, slots=True)
class Sides:
    """The modalities of the text side and of the vision side."""

    vision: tuple[str, ...]
    text: tuple[str, ...]

    @classmethod
    def of(cls, features: ItemFeatures) -> "Sides":
        """Return the modalities of each side that have features; joint vectors are on neither side.

        Raises:
            UserError: One side is empty.
        """
        vision = tuple(name for name in features.present if name in ("image", "video"))
        text = tuple(name for name in features.present if name == "text")
        if not (vision and text):
            known = ", ".join(features.present) or "none"
            raise UserError(
                f"text and vision are aligned, and there are features of: {known};"
                " run mmrec extract for the other, or name both by --features"
            )
        return cls(vision=vision, text=text)

    def present(self, features: ItemFeatures) -> tuple[Tensor, Tensor]:
        """Return (N,) bool, true for items with vision, and (N,) bool, true for items with text."""
        sides = (self.vision, self.text)
        has_vision_N, has_text_N = (
            torch.stack([features.present[name] for name in side]).any(0) for side in sides
        )
        return has_vision_N, has_text_N


@torch.no_grad()
def encode_sides(model: Any, features: ItemFeatures, pool_K: Tensor) -> tuple[Tensor, Tensor]:
    """Encode the items of the pool from their vision and from their text: (K, D) float32 each.

    The model is in evaluation mode meanwhile, and its mode is restored.

    Args:
        model: A recommender with ``encode_views``.
        features: Features of the whole catalogue.
        pool_K: (K,) int64 items that have vision and text.

    Raises:
        UserError: A vector is not finite.
    """
    sides = Sides.of(features)
    encoded = []
    with dropout_disabled(model):
        for items in pool_K.split(_ITEMS_PER_BLOCK):
            all_rows = torch.arange(len(items), device=items.device)
            views = [(sides.vision, all_rows), (sides.text, all_rows)]
            encoded.append(model.encode_views(items, views, features))
    vision_KD, text_KD = (torch.cat(parts).float() for parts in zip(*encoded, strict=True))
    if not (vision_KD.isfinite().all() and text_KD.isfinite().all()):
        raise UserError(
            "the vectors are not finite: the training diverged; train again with a lower lr"
        )
    return vision_KD, text_KD


def both_ways(vision_KD: Tensor, text_KD: Tensor, image_K: Tensor | None = None) -> dict[str, Ints]:
    """Return for each direction the rank of each query's target, from 1: (K,) and (G,).

    Args:
        vision_KD: (K, D) encodings of images and videos.
        text_KD: (K, D) encodings of texts.
        image_K: (K,) int64; items with equal numbers have the same image and video. By default, all
            items have different ones, and G = K.

    Examples:
        The first two items are captions of one image:

        >>> vision = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> text = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
        >>> ranks = both_ways(vision, text, torch.tensor([0, 0, 1]))
        >>> ranks["text-to-vision"].tolist(), ranks["vision-to-text"].tolist()
        ([2, 1, 1], [1, 2])
    """
    if image_K is None:
        image_K = torch.arange(len(text_KD))
    return {
        TO_VISION: rank_vision(vision_KD, text_KD, image_K),
        TO_TEXT: rank_text(vision_KD, text_KD, image_K),
    }


def rank_vision(vision_KD: Tensor, text_KD: Tensor, image_K: Tensor) -> Ints:
    """Return the rank of each text's image among the different images: (K,).

    Arguments are those of :func:`both_ways`.
    """
    _, first_G, image_of_K = _different(image_K)
    return rank(text_KD, vision_KD[torch.from_numpy(first_G)], image_of_K).kept


def rank_text(vision_KD: Tensor, text_KD: Tensor, image_K: Tensor) -> Ints:
    """Return for each different image the rank of its best text among the texts of others: (G,).

    Arguments are those of :func:`both_ways`.
    """
    items_K = np.arange(len(text_KD))
    _, _, image_of_K = _different(image_K)
    by_image_K = np.argsort(image_of_K, kind="stable")
    texts_G = np.bincount(image_of_K)
    bounds = np.append(0, texts_G.cumsum())
    # The other texts of an image do not compete with one of them.
    own = SeenItems(items=by_image_K, offsets=bounds).take(image_of_K)
    is_other = own.items != items_K.repeat(np.diff(own.offsets))
    others = SeenItems(
        items=own.items[is_other], offsets=np.append(0, (texts_G[image_of_K] - 1).cumsum())
    )
    of_text_K = rank(vision_KD, text_KD, items_K, others).filtered
    return np.minimum.reduceat(of_text_K[by_image_K], bounds[:-1])


def _different(image_K: Tensor) -> tuple[Ints, Ints, Ints]:
    """Return the G different numbers, the first item of each, and the place of each item's."""
    return np.unique(image_K.cpu().numpy(), return_index=True, return_inverse=True)


def same_vision(features: ItemFeatures, pool_K: Tensor) -> Tensor:
    """Return (K,) int64, equal for items of the pool with the same image and video."""
    return copies(features, Sides.of(features).vision)[pool_K]


def copies(features: ItemFeatures, modalities: Sequence[str]) -> Tensor:
    """Return (N,) int64: the first item with the same vectors as an item in these modalities."""
    label_N = _hashes(features, modalities).unique(dim=0, return_inverse=True)[1]
    item_N = torch.arange(len(label_N), device=label_N.device)
    return torch.full_like(label_N, len(label_N)).scatter_reduce(0, label_N, item_N, "amin")[
        label_N
    ]


def without_vision_of(
    pairs_P: Tensor, features: ItemFeatures, pool_K: Tensor, pool_features: ItemFeatures
) -> Tensor:
    """Return the items whose image and video no item of the pool has, maybe in another catalogue.

    Args:
        pairs_P: (P,) int64 items.
        features: Features of their catalogue.
        pool_K: (K,) int64 items of the pool.
        pool_features: Features of the pool's catalogue, of the same backbones.
    """
    vision = Sides.of(features).vision
    hashes_PC = _hashes(features, vision)[pairs_P]
    pool_KC = _hashes(pool_features, vision)[pool_K]
    both = torch.cat([hashes_PC, pool_KC])
    label = both.unique(dim=0, return_inverse=True)[1]
    return pairs_P[~torch.isin(label[: len(pairs_P)], label[len(pairs_P) :])]


def _hashes(features: ItemFeatures, modalities: Sequence[str]) -> Tensor:
    """Return (N, number of modalities) int64 hashes of the vectors of each item."""
    return torch.stack([_hash_rows(features.vectors[name]) for name in modalities], dim=1)


def _hash_rows(x_ND: Tensor) -> Tensor:
    """Return (N,) int64 hashes of rows; different rows have equal hashes with low probability."""
    factors = np.random.default_rng(0).integers(-(2**62), 2**62, x_ND.shape[1])
    factor_D = torch.from_numpy(factors * 2 + 1).to(x_ND.device)
    blocks = (block.float().view(torch.int32) for block in x_ND.split(2**16))
    return torch.cat([(block.long() * factor_D).sum(1) for block in blocks])


def retrieve(model: Any, features: ItemFeatures, pool_K: Tensor) -> dict[str, Ints]:
    """Encode the pool by :func:`encode_sides`, and rank it in both directions: see `both_ways`."""
    return both_ways(*encode_sides(model, features, pool_K), same_vision(features, pool_K))


def recalls(ranks: Ints) -> dict[str, PerUser]:
    """Return Recall@1, 5, 10 and MRR of each query."""
    return {f"Recall@{k}": hit_rate(ranks, k) for k in CUTOFFS} | {"MRR": reciprocal_rank(ranks)}


def retrieval_rows(
    split: str, ranker: str, ranks_by_direction: dict[str, Ints]
) -> list[dict[str, Any]]:
    """Return rows of the metrics table, with bootstrap intervals over queries."""
    rows = []
    for direction, ranks in ranks_by_direction.items():
        values = recalls(ranks)
        matrix = np.stack(list(values.values()), axis=1)
        low, high = bootstrap(matrix)
        rows += [
            {
                "phase": "eval", "epoch": 0, "split": split, "targets": direction,
                "ranker": ranker, "seen": "none", "metric": metric,
                "value": float(matrix[:, i].mean()), "low": float(low[i]), "high": float(high[i]),
                "users": len(matrix),
            }
            for i, metric in enumerate(values)
        ]  # fmt: skip
    return rows


def raw_sides(features: ItemFeatures, pool_K: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return normalised features of vision and text, (K, D) each, if both have the same width.

    Features of CLIP can be compared in this way. Features of two unrelated backbones with the same
    width are ranked at random.
    """
    sides = Sides.of(features)
    for name in sides.vision:
        vision_ND, text_ND = features.vectors[name], features.vectors[sides.text[0]]
        if vision_ND.shape == text_ND.shape and bool(features.present[name][pool_K].all()):
            vision_KD, text_KD = vision_ND[pool_K].float(), text_ND[pool_K].float()
            return torch.nn.functional.normalize(vision_KD), torch.nn.functional.normalize(text_KD)
    return None
