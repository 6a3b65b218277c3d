"""Whitening of frozen features: directions of equal variance, fitted on the data, not learned.

Vectors of pre-trained encoders lie in a narrow cone: a few directions hold most of their variance,
and the cosine of any two is high. WhitenRec (Zhang et al., ICDE 2024) shows what sequential
recommendation gains when they are whitened before the first layer.

Legend: K items, W width of the features.
"""

import torch
from torch import Tensor, nn

_LEAST_VARIANCE = 1e-3  # of the mean one: what hardly varies in training is not blown up


class Whitening(nn.Module):
    """``(x - mean) @ matrix``; both are buffers, the identity until fitted.

    Args:
        width: W, of the features.
    """

    mean_W: Tensor
    matrix_WW: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean_W", torch.zeros(width))
        self.register_buffer("matrix_WW", torch.eye(width))

    @torch.no_grad()
    def fit(self, x_KW: Tensor) -> None:
        """Whiten so that these have mean 0 and about covariance 1, by ZCA: (C + eps)^(-1/2).

        Of all whitenings it turns the features least. No items leave the identity; items that are
        all the same are only centred.
        """
        if not len(x_KW):
            return
        x_KW = x_KW.double()
        mean_W = x_KW.mean(0)
        centred_KW = x_KW - mean_W
        variances_W, axes_WW = torch.linalg.eigh(centred_KW.T @ centred_KW / len(x_KW))
        variances_W = variances_W.clamp_min(0)
        self.mean_W.copy_(mean_W)
        if spread := float(variances_W.mean()):
            scales_W = (variances_W + _LEAST_VARIANCE * spread).rsqrt()
            self.matrix_WW.copy_(axes_WW * scales_W @ axes_WW.T)

    def forward(self, x: Tensor) -> Tensor:
        """Whiten (..., W)."""
        return (x - self.mean_W) @ self.matrix_WW
