"""Ridge regression between the sides of items: a reference for retrieval across modalities.

The features of one side are regressed on those of the other, from text to vision and from vision to
text (Hoerl and Kennard, Technometrics 1970). The prediction from one side of an item is a query,
which ranks the features of the other side of all items by cosine.

Generalised cross-validation (Golub, Heath and Wahba, Technometrics 1979) chooses the strength of
each regression on the items that it is fitted on.

Legend: K items, P pairs of the fit, W width of a modality, X and Y widths of two sides, R rank.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional

from features.dataset import Ints
from trainer.data.batches import ItemFeatures
from trainer.evaluation.cross_modal import (
    TO_TEXT,
    TO_VISION,
    Sides,
    rank_text,
    rank_vision,
    same_vision,
)

LEAST_PAIRS = 3
"""Items that a regression and the choice of its strength need."""
_STRENGTHS = tuple(10 ** (power / 4) for power in range(-12, 25))  # times the mean of s^2
_LEAST_SQUARE = 1e-6  # of s, relative to the largest one; below is rounding to float16
_ITEMS_PER_CHUNK = 2**14  # that are in float64 together


@dataclass(frozen=True, kw_only=True, slots=True)
class ScaledSide:
    """The modalities of one side, centred, with a mean squared length of 1 each."""

    mean: Mapping[str, Tensor]
    """Modality -> (W,) float64 mean over the items of the fit that have it."""
    length: Mapping[str, float]
    """Modality -> root mean square of the lengths of the centred vectors of these items."""

    @classmethod
    def fit(cls, names: Sequence[str], pairs_P: Tensor, features: ItemFeatures) -> Self:
        """Compute means and lengths on the items ``pairs_P``."""
        mean, length = {}, {}
        for name in names:
            having = pairs_P[features.present[name][pairs_P]].split(_ITEMS_PER_CHUNK)
            vectors, count = features.vectors[name], max(1, sum(map(len, having)))
            mean[name] = sum(
                (vectors[part].double().sum(0) for part in having),
                start=vectors.new_zeros(vectors.shape[1], dtype=torch.float64),
            ) / count  # fmt: skip
            square = sum(float((vectors[p].double() - mean[name]).square().sum()) for p in having)
            length[name] = (square / count) ** 0.5 or 1.0
        return cls(mean=mean, length=length)

    def rows(self, items_K: Tensor, features: ItemFeatures) -> Tensor:
        """Return the vectors of all modalities side by side: (K, X) float64; absent ones are 0."""
        scaled = []
        for name, mean_W in self.mean.items():
            x_KW = (features.vectors[name][items_K].double() - mean_W) / self.length[name]
            scaled.append(x_KW * features.present[name][items_K, None])
        return torch.cat(scaled, dim=1)


def fit_ridge(
    xx_XX: Tensor, xy_XY: Tensor, yy: float, pairs: int, strength: float | None = None
) -> tuple[Tensor, float]:
    """Return the weights (X, Y) of the ridge regression of Y on X, and its strength lambda.

    The weights minimise |Y - X W|^2 + lambda |W|^2. With X = U S V' of P rows and
    h_r = s_r^2 / (s_r^2 + lambda), the strength minimises |Y - X W|^2 / (P - 1 - sum_r h_r)^2; the
    1 is the intercept of centred data. Candidates are 10^-3 to 10^6 times the mean of s_r^2, four
    a decade.

    Args:
        xx_XX: X'X of centred inputs, float64.
        xy_XY: X'Y with centred outputs, float64.
        yy: Sum of the squares of Y.
        pairs: Number of rows P, at least 3.
        strength: The strength; ``None``: choose it.
    """
    squares_R, axes_XR = torch.linalg.eigh(xx_XX)
    is_kept_R = squares_R > _LEAST_SQUARE * squares_R.max().clamp_min(_LEAST_SQUARE)
    squares_R, axes_XR = squares_R[is_kept_R], axes_XR[:, is_kept_R]
    if not len(squares_R):  # all inputs are equal
        return torch.zeros_like(xy_XY), 0.0
    projected_RY = axes_XR.T @ xy_XY
    explained_R = projected_RY.square().sum(1) / squares_R
    # With as many axes as rows, differences of large sums would be rounding errors.
    free = max(0, pairs - 1 - len(squares_R))
    outside = max(0.0, yy - float(explained_R.sum())) if free else 0.0

    def error(candidate: float) -> float:
        left_R = candidate / (squares_R + candidate)  # 1 - h_r
        residual = outside + float((left_R.square() * explained_R).sum())
        return residual / (free + float(left_R.sum())) ** 2

    if strength is None:
        mean = float(squares_R.mean())
        strength = min((factor * mean for factor in _STRENGTHS), key=error)
    return axes_XR @ (projected_RY / (squares_R + strength)[:, None]), strength


@dataclass(frozen=True, kw_only=True, slots=True)
class RidgeRetrieval:
    """A ridge regression in each direction."""

    text: ScaledSide
    vision: ScaledSide
    weights: Mapping[str, Tensor]
    """``text-to-vision`` or ``vision-to-text`` -> (X, Y) float64 weights."""
    strengths: Mapping[str, float]
    """Direction -> lambda."""
    pairs: int
    """Number of items of the fit."""

    @classmethod
    def fit(cls, features: ItemFeatures, pairs_P: Tensor) -> Self:
        """Fit both regressions on items that have text and vision.

        Args:
            features: Features of the catalogue.
            pairs_P: (P,) int64 items, at least :data:`LEAST_PAIRS`.
        """
        sides = Sides.of(features)
        text = ScaledSide.fit(sides.text, pairs_P, features)
        vision = ScaledSide.fit(sides.vision, pairs_P, features)
        products: dict[str, Tensor] = {}
        for part in pairs_P.split(_ITEMS_PER_CHUNK):
            t_KX, v_KY = text.rows(part, features), vision.rows(part, features)
            for name, product in (
                ("tt", t_KX.T @ t_KX),
                ("tv", t_KX.T @ v_KY),
                ("vv", v_KY.T @ v_KY),
            ):
                products[name] = products[name] + product if name in products else product
        tt, tv, vv = products["tt"], products["tv"], products["vv"]
        fitted = {
            TO_VISION: fit_ridge(tt, tv, float(vv.trace()), len(pairs_P)),
            TO_TEXT: fit_ridge(vv, tv.T, float(tt.trace()), len(pairs_P)),
        }
        return cls(
            text=text,
            vision=vision,
            weights={direction: weights for direction, (weights, _) in fitted.items()},
            strengths={direction: strength for direction, (_, strength) in fitted.items()},
            pairs=len(pairs_P),
        )

    def retrieve(self, features: ItemFeatures, pool_K: Tensor) -> dict[str, Ints]:
        """Rank a pool in both directions, see :func:`trainer.evaluation.cross_modal.both_ways`.

        Args:
            features: Features of a catalogue, from the same backbones as those of the fit.
            pool_K: (K,) int64 items that have vision and text.
        """
        image_K = same_vision(features, pool_K)
        text_KX, vision_KY = self.text.rows(pool_K, features), self.vision.rows(pool_K, features)
        return {
            TO_VISION: rank_vision(
                _units(vision_KY), _units(text_KX @ self.weights[TO_VISION]), image_K
            ),
            TO_TEXT: rank_text(_units(vision_KY @ self.weights[TO_TEXT]), _units(text_KX), image_K),
        }


def _units(x_KD: Tensor) -> Tensor:
    return functional.normalize(x_KD, dim=-1).float()
