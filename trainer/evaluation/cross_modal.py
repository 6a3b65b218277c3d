"""Evaluate retrieval across modalities: from an item's text to its image or video, and back.

Each item of a pool is encoded twice: from its text, and from its image and video. The text encoding
of an item is a query: it ranks the visual encodings of all items of the pool, and the target is the
visual encoding of the same item. The other direction is evaluated in the same way. Ranks are exact,
and ties count against the model.

Legend: N items, K items of the pool, D width.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from features.dataset import Ints
from features.errors import UserError
from retrieval.metrics import PerUser, hit_rate, reciprocal_rank
from retrieval.ranking import rank
from retrieval.significance import bootstrap
from trainer.data.batches import ItemFeatures

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
    was_training = model.training
    model.eval()
    encoded = []
    for items in pool_K.split(_ITEMS_PER_BLOCK):
        all_rows = torch.arange(len(items), device=items.device)
        views = [(sides.vision, all_rows), (sides.text, all_rows)]
        encoded.append(model.encode_views(items, views, features))
    model.train(was_training)
    vision_KD, text_KD = (torch.cat(parts).float() for parts in zip(*encoded, strict=True))
    if not (vision_KD.isfinite().all() and text_KD.isfinite().all()):
        raise UserError(
            "the vectors are not finite: the training diverged; train again with a lower lr"
        )
    return vision_KD, text_KD


def both_ways(vision_KD: Tensor, text_KD: Tensor) -> dict[str, Ints]:
    """Return for each direction the rank of each query's item among all items: (K,), from 1."""
    targets = np.arange(len(text_KD))
    return {
        TO_VISION: rank(text_KD, vision_KD, targets).kept,
        TO_TEXT: rank(vision_KD, text_KD, targets).kept,
    }


def retrieve(model: Any, features: ItemFeatures, pool_K: Tensor) -> dict[str, Ints]:
    """Encode the pool by :func:`encode_sides`, and rank it in both directions: see `both_ways`."""
    return both_ways(*encode_sides(model, features, pool_K))


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
            vision_KD, text_KD = vision_ND[pool_K], text_ND[pool_K]
            return torch.nn.functional.normalize(vision_KD), torch.nn.functional.normalize(text_KD)
    return None
