"""The mixture-of-experts adaptor of UniSRec (Hou et al., KDD 2022, section 3.1) and TedRec.

Legend: K items, G experts, P positions, W width of the features, D width.
"""

from functools import reduce

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.kernels.elementwise import dropout

_LEAST_NOISE = 0.01  # standard deviation that is added to the learned one


class MixtureAdaptor(nn.Module):
    """Map features to vectors by experts that learn to whiten, weighted by a noisy gate.

    The output is sum_k g_k (dropout(x) - b_k) W_k, with the gates
    g = softmax(x V + e (softplus(x S) + 0.01)) and e ~ N(0, 1) in training, 0 else. V, S and the
    offsets b_k start at zero.

    Args:
        width: Width W of the features.
        dim: Width D of the output.
        experts: Number of experts G.
        probability: Dropout probability of the features; each expert draws its own mask.
        positions: Number of positions P that have an offset of their own; 0: one offset for all.
    """

    def __init__(
        self, width: int, dim: int, *, experts: int, probability: float, positions: int = 0
    ) -> None:
        super().__init__()
        self.probability = probability
        self.experts = nn.ModuleList(nn.Linear(width, dim, bias=False) for _ in range(experts))
        self.offset_GPW = nn.Parameter(torch.zeros(experts, max(1, positions), width))
        self.gate_WG = nn.Parameter(torch.zeros(width, experts))
        self.noise_WG = nn.Parameter(torch.zeros(width, experts))

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """Return the adapted vectors: (..., D).

        Args:
            x: (..., W) features.
            positions: (...) int64, the position of each vector; ``None`` without positions.
        """
        gates = self._gates(x)
        weighted = (
            gates[..., number, None] * self._expert(number, x, positions)
            for number in range(len(self.experts))
        )
        return reduce(torch.add, weighted)

    def _expert(self, number: int, x: Tensor, positions: Tensor | None) -> Tensor:
        """Return (dropout(x) - b_k) W_k: (..., D)."""
        expert = self.experts[number]
        # It is x W - b W: the offsets are mapped once for each position.
        offset_PD = expert(self.offset_GPW[number])
        offset = offset_PD[0] if positions is None else functional.embedding(positions, offset_PD)
        mapped: Tensor = expert(dropout(x, self.probability, self.training)) - offset
        return mapped

    def _gates(self, x: Tensor) -> Tensor:
        """Return the weights of the experts: (..., G)."""
        logits = x @ self.gate_WG
        spread = functional.softplus(x @ self.noise_WG) + _LEAST_NOISE
        noise = torch.randn_like(logits) if self.training else torch.zeros_like(logits)
        return (logits + noise * spread).softmax(-1)
