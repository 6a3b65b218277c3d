"""Whiten frozen features by a map that is fitted on the data and not learned.

A few directions hold most of the variance of the vectors of a pre-trained encoder, so the cosine of
any two vectors is high. WhitenRec (Zhang et al., ICDE 2024) shows that whitening
them before the first layer improves sequential recommendation.

The covariance of W directions is estimated from K items. With K below W, every item can be
separated from all others by directions that hold noise alone, and a whitening of all directions
makes the vectors orthogonal: similar items are no longer near each other. The map therefore keeps
the leading directions only, at most one for every 10 items, and removes the others.

Legend: K items, W width of the features.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from trainer.data.batches import ItemFeatures, TrainSet

CENTRING = "centring."
"""Prefix of the buffers of :class:`Centring` in the state of a model."""
WHITENING = "whitening."
"""Prefix of the buffers of :class:`Whitening` in the state of a model."""
_ITEMS_PER_CHUNK = 2**16  # that are converted to float64 together
_ITEMS_PER_DIRECTION = 10  # that are needed to estimate its variance
_LEAST_VARIANCE = 1e-3  # relative to the mean variance; bounds the scale of nearly constant axes
_LEAST_SCALE = 1e-4  # relative to the largest; kept directions have larger scales in float32


class Whitening(nn.Module):
    """The map ``(x - mean) @ matrix``; both are buffers, the identity before :meth:`fit`.

    Args:
        width: Width W of the features.
    """

    mean_W: Tensor
    matrix_WW: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean_W", torch.zeros(width))
        self.register_buffer("matrix_WW", torch.eye(width))

    @torch.no_grad()
    def fit(self, x_KW: Tensor) -> None:
        """Fit ZCA whitening, (C + eps)^(-1/2): mean 0 and a covariance of about 1 on ``x_KW``.

        Of all whitening maps, ZCA changes the features least. With fewer than 10 W items, the map
        also projects on the K / 10 directions of the largest variance, at least one. Without items
        the map stays the identity. If all items have equal features, they are only centred.

        Args:
            x_KW: (K, W) features of the items to fit, in any precision.
        """
        if not len(x_KW):
            return
        chunks = x_KW.split(_ITEMS_PER_CHUNK)
        mean_W = _mean(chunks)
        covariance_WW = x_KW.new_zeros((x_KW.shape[1],) * 2, dtype=torch.float64)
        for x in chunks:
            centred = x.double() - mean_W
            covariance_WW += centred.T @ centred
        variances_W, axes_WW = torch.linalg.eigh(covariance_WW / len(x_KW))
        variances_W = variances_W.clamp_min(0)
        self.mean_W.copy_(mean_W)
        if spread := float(variances_W.mean()):
            scales_W = (variances_W + _LEAST_VARIANCE * spread).rsqrt()
            scales_W[: -max(1, len(x_KW) // _ITEMS_PER_DIRECTION)] = 0  # variances ascend
            self.matrix_WW.copy_(axes_WW * scales_W @ axes_WW.T)

    @property
    def directions(self) -> int:
        """Number of directions that the map keeps, at most W."""
        scales_W = torch.linalg.eigvalsh(self.matrix_WW.double()).abs()
        return int((scales_W > _LEAST_SCALE * scales_W.max()).sum())

    def forward(self, x: Tensor) -> Tensor:
        """Whiten features of shape (..., W)."""
        return (x - self.mean_W) @ self.matrix_WW


class Centring(nn.Module):
    """The map ``(x - mean) / scale``; both are buffers, the identity before :meth:`fit`.

    Args:
        width: Width W of the features.
    """

    mean_W: Tensor
    scale: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean_W", torch.zeros(width))
        self.register_buffer("scale", torch.ones(()))

    @torch.no_grad()
    def fit(self, x_KW: Tensor) -> None:
        """Fit a mean of 0 and a mean square of 1 over all elements of ``x_KW``.

        Without items, or if all items have equal features, the scale stays 1.

        Args:
            x_KW: (K, W) features of the items to fit, in any precision.
        """
        if not len(x_KW):
            return
        chunks = x_KW.split(_ITEMS_PER_CHUNK)
        mean_W = _mean(chunks)
        squares = torch.stack([(x.double() - mean_W).square().sum() for x in chunks]).sum()
        self.mean_W.copy_(mean_W)
        if squares:
            self.scale.copy_((squares / x_KW.numel()).sqrt())

    def forward(self, x: Tensor) -> Tensor:
        """Centre and scale features of shape (..., W)."""
        return (x - self.mean_W) / self.scale


def fit_maps(
    maps: Mapping[str, Whitening | Centring], features: ItemFeatures, train: TrainSet
) -> None:
    """Fit maps of features on the items that have training interactions.

    Args:
        maps: Modality to its map; modalities with a table of tokens are left out.
        features: Features of the whole catalogue.
        train: The training interactions; if there are none, the maps are fitted on all items.
    """
    known_N = train.counts_N > 0
    fitted_N = known_N | ~known_N.any()
    for name in maps.keys() & features.vectors.keys():
        maps[name].fit(features.vectors[name][features.present[name] & fitted_N])


def _mean(chunks: Sequence[Tensor]) -> Tensor:
    """Return the float64 mean of the rows of all chunks: (W,)."""
    sums = torch.stack([x.double().sum(0) for x in chunks])
    return sums.sum(0) / sum(len(x) for x in chunks)


def input_map(tensors: Mapping[str, Tensor]) -> str:
    """Return ``whiten``, ``centre`` or an empty text: the map of the features of a saved model.

    Args:
        tensors: The state of the model.
    """
    prefixes = {"whiten": WHITENING, "centre": CENTRING}
    maps = [name for name, prefix in prefixes.items() if any(k.startswith(prefix) for k in tensors)]
    return maps[0] if maps else ""


def without_centring(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of the same function for a model that does not centre its features.

    The centring of a modality becomes a part of the linear layer ``inputs.MODALITY.0`` after it.

    Args:
        tensors: The state of a model with or without :class:`Centring`.
    """
    folded = {key: x for key, x in tensors.items() if not key.startswith(CENTRING)}
    for key, mean_W in tensors.items():
        prefix, _, last = key.rpartition(".")
        if not key.startswith(CENTRING) or last != "mean_W":
            continue
        layer = f"inputs.{prefix.removeprefix(CENTRING)}.0"
        folded[f"{layer}.weight"], folded[f"{layer}.bias"] = fold_centring(
            tensors[f"{layer}.weight"], tensors[f"{layer}.bias"], mean_W, tensors[f"{prefix}.scale"]
        )
    return folded


def fold_centring(
    weight_DW: Tensor, bias_D: Tensor, mean_W: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Return weight and bias of a linear layer that also centres and scales its inputs.

    Args:
        weight_DW: Weight of the layer after the centring.
        bias_D: Its bias.
        mean_W: Mean of the centring.
        scale: Scale of the centring, a scalar.
    """
    folded_DW = weight_DW.double() / scale.double()
    return folded_DW.float(), (bias_D.double() - folded_DW @ mean_W.double()).float()
