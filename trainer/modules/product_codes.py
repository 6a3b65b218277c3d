"""Product-quantised codes of features, and their embeddings (VQ-Rec, Hou et al., WWW 2023).

Legend: K items, N items of the catalogue, T items to fit, C codes of an item, S values of a code,
W width of the features, D width.
"""

import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

_SINKHORN_ROUNDS = 3
_SINKHORN_TEMPERATURE = 0.7
_INITIAL_SHARE = 0.9  # of the diagonal of a permutation


class CodeEmbedding(nn.Module):
    """A table of vectors for the values of each code; items without features have a value more.

    Before :meth:`fit` the codes are random.

    Args:
        n_items: Number of items N.
        width: Width W of the features; an item has at most W codes.
        dim: Width D.
        codes: Number of codes C of an item.
        bits: Bits of a code: it has S = 2^bits values.
        permute: Learn, for each code, a doubly stochastic map of the values to the rows of the
            table.
    """

    codes_NC: Tensor

    def __init__(
        self, n_items: int, width: int, dim: int, *, codes: int, bits: int, permute: bool
    ) -> None:
        super().__init__()
        self.codes, self.bits, self.size = min(codes, width), bits, 2**bits
        self.table = nn.Embedding(self.codes * (self.size + 1), dim)
        if permute:
            others = max(1, self.size - 1)
            odds = _INITIAL_SHARE / (1 - _INITIAL_SHARE) * others
            start_SS = _SINKHORN_TEMPERATURE * math.log(odds) * torch.eye(self.size)
            self.permutation_CSS = nn.Parameter(start_SS.repeat(self.codes, 1, 1))
        generator = torch.Generator().manual_seed(0)
        codes_NC = torch.randint(
            self.size, (n_items, self.codes), generator=generator, device="cpu", dtype=torch.int32
        )
        self.register_buffer("codes_NC", codes_NC)

    @torch.no_grad()
    def fit(self, x_NW: Tensor, present_N: Tensor, fitted_N: Tensor) -> None:
        """Fit the quantiser, and compute the codes of all items.

        Args:
            x_NW: Features of the catalogue.
            present_N: (N,) bool, true where an item has features.
            fitted_N: (N,) bool, true for the items that the quantiser is fitted on.
        """
        fitted = fit_codes(x_NW[fitted_N & present_N], x_NW, count=self.codes, bits=self.bits)
        fitted[~present_N] = self.size
        self.codes_NC.copy_(fitted)

    def vectors(self) -> Tensor:
        """Return the vector of each value of each code: (C, S + 1, D)."""
        table_CSD = self.table.weight.view(self.codes, self.size + 1, -1)
        if not hasattr(self, "permutation_CSS"):
            return table_CSD
        map_CSS = sinkhorn(self.permutation_CSS / _SINKHORN_TEMPERATURE, _SINKHORN_ROUNDS)
        return torch.cat([map_CSS @ table_CSD[:, : self.size], table_CSD[:, self.size :]], dim=1)

    def forward(self, codes_KC: Tensor) -> Tensor:
        """Return the sum of the vectors of the codes: (K, D)."""
        # The backward pass of `unbind` is one stack; an index would make a table for each code.
        tables = self.vectors().unbind(0)
        total_KD = functional.embedding(codes_KC[:, 0], tables[0])
        for codes_K, table_SD in zip(codes_KC.unbind(1)[1:], tables[1:], strict=True):
            total_KD = total_KD + functional.embedding(codes_K, table_SD)
        return total_KD


def sinkhorn(logits_CSS: Tensor, rounds: int) -> Tensor:
    """Return nearly doubly stochastic matrices: exp(logits), scaled by rows and columns in turn."""
    for _ in range(rounds):
        logits_CSS = logits_CSS - logits_CSS.logsumexp(2, keepdim=True)
        logits_CSS = logits_CSS - logits_CSS.logsumexp(1, keepdim=True)
    return logits_CSS.exp()


def fit_codes(x_TW: Tensor, x_NW: Tensor, *, count: int, bits: int) -> Tensor:
    """Fit an optimised product quantiser (Ge et al., CVPR 2013) by FAISS, and code vectors with it.

    A rotation is fitted, the rotated vector is cut into ``count`` parts, and a code is the index of
    the nearest of 2^bits centroids of its part. If there are fewer vectors to fit than centroids,
    the codes have fewer bits. Elements that ``count`` does not divide are projected away.

    Args:
        x_TW: Vectors to fit.
        x_NW: Vectors to code.
        count: Number of codes, at most W.
        bits: Bits of a code.

    Returns:
        (N, count) int32 codes.
    """
    bits = min(bits, int(math.log2(max(1, len(x_TW)))))
    if not bits:
        return torch.zeros(len(x_NW), count, dtype=torch.int32, device=x_NW.device)
    import faiss

    # FAISS has a separate OpenMP runtime: set the number of threads that torch uses.
    faiss.omp_set_num_threads(torch.get_num_threads())
    width = x_TW.shape[1]
    coded_width = width // count * count
    train = np.ascontiguousarray(x_TW.cpu().numpy(), np.float32)
    rotation = faiss.OPQMatrix(width, count, coded_width)
    # The fit of the rotation leaves its quantiser in a state of its own: the final one is another.
    draft, quantiser = (faiss.ProductQuantizer(coded_width, count, bits) for _ in range(2))
    for either in (draft, quantiser):
        either.cp.min_points_per_centroid = 1  # no warning about few vectors
    rotation.pq = draft
    rotation.train(train)
    quantiser.train(rotation.apply(train))
    centroids = faiss.vector_to_array(quantiser.centroids).reshape(count, 2**bits, -1)
    rotated = rotation.apply(np.ascontiguousarray(x_NW.cpu().numpy(), np.float32))
    parts = torch.from_numpy(rotated).view(len(x_NW), count, -1)
    codes = [
        torch.cdist(parts[:, code], torch.from_numpy(centroids[code])).argmin(1)
        for code in range(count)
    ]
    return torch.stack(codes, dim=1).to(torch.int32).to(x_NW.device)
