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
    rotation_WX: Tensor
    centroids_CSV: Tensor

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
        part_width = width // self.codes
        self.register_buffer("rotation_WX", torch.zeros(width, self.codes * part_width))
        self.register_buffer("centroids_CSV", torch.zeros(self.codes, self.size, part_width))

    @torch.no_grad()
    def fit(self, x_NW: Tensor, present_N: Tensor, fitted_N: Tensor) -> None:
        """Fit the quantiser, and compute the codes of all items.

        Args:
            x_NW: Features of the catalogue.
            present_N: (N,) bool, true where an item has features.
            fitted_N: (N,) bool, true for the items that the quantiser is fitted on.
        """
        rotation_WX, centroids_CSV = fit_quantiser(
            x_NW[fitted_N & present_N], count=self.codes, bits=self.bits
        )
        self.rotation_WX.copy_(rotation_WX)
        self.centroids_CSV.copy_(centroids_CSV)
        self.code(x_NW, present_N, first=0)

    @torch.no_grad()
    def code(self, x_NW: Tensor, present_N: Tensor, *, first: int) -> None:
        """Compute the codes of the items from ``first`` on with the fitted quantiser.

        Args:
            x_NW: Features of the catalogue.
            present_N: (N,) bool, true where an item has features.
            first: Number of the first item.
        """
        coded = code_vectors(x_NW[first:], self.rotation_WX, self.centroids_CSV)
        coded[~present_N[first:]] = self.size
        self.codes_NC[first:] = coded

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


def fit_quantiser(x_TW: Tensor, *, count: int, bits: int) -> tuple[Tensor, Tensor]:
    """Fit an optimised product quantiser (Ge et al., CVPR 2013) by FAISS.

    A rotation is fitted, the rotated vector is cut into ``count`` parts, and each part gets 2^bits
    centroids. If there are fewer vectors than centroids, there are fewer centroids. Elements that
    ``count`` does not divide are projected away.

    Args:
        x_TW: Vectors to fit.
        count: Number of parts, at most W.
        bits: Bits of a code.

    Returns:
        The rotation (W, count * V), and the centroids (count, 2^bits, V); centroids that are not
        used are infinite.
    """
    width = x_TW.shape[1]
    part_width = width // count
    centroids_CSV = torch.full((count, 2**bits, part_width), torch.inf)
    bits = min(bits, int(math.log2(max(1, len(x_TW)))))
    if not bits:
        centroids_CSV[:, 0] = 0
        return torch.eye(width, count * part_width), centroids_CSV
    import faiss

    # FAISS has a separate OpenMP runtime: set the number of threads that torch uses.
    faiss.omp_set_num_threads(torch.get_num_threads())
    train = np.ascontiguousarray(x_TW.cpu().numpy(), np.float32)
    rotation = faiss.OPQMatrix(width, count, count * part_width)
    # The fit of the rotation leaves its quantiser in a state of its own: the final one is another.
    draft, quantiser = (faiss.ProductQuantizer(count * part_width, count, bits) for _ in range(2))
    for either in (draft, quantiser):
        either.cp.min_points_per_centroid = 1  # no warning about few vectors
    rotation.pq = draft
    rotation.train(train)
    quantiser.train(rotation.apply(train))
    centroids = faiss.vector_to_array(quantiser.centroids).reshape(count, 2**bits, part_width)
    centroids_CSV[:, : 2**bits] = torch.from_numpy(centroids)
    # A column of the result of `apply` is the image of a unit vector.
    return torch.from_numpy(rotation.apply(np.eye(width, dtype=np.float32))), centroids_CSV


def code_vectors(x_NW: Tensor, rotation_WX: Tensor, centroids_CSV: Tensor) -> Tensor:
    """Return the index of the nearest centroid of each part of vectors: (N, C) int32."""
    parts_NCV = (x_NW.to(rotation_WX.dtype) @ rotation_WX).view(
        len(x_NW), *centroids_CSV.shape[::2]
    )
    codes = [
        torch.cdist(part_NV, centroids_SV[centroids_SV.isfinite().all(1)]).argmin(1)
        for part_NV, centroids_SV in zip(parts_NCV.unbind(1), centroids_CSV, strict=True)
    ]
    return torch.stack(codes, dim=1).to(torch.int32)
