"""ItemKNN (Deshpande and Karypis, TOIS 2004): similarities of items by the users that they share.

The similarity of items i and j is |U_i and U_j| / (sqrt(|U_i| |U_j|) + ``shrink``), the cosine of
their columns in the binary user-item matrix of training with a shrunk divisor. An item keeps the
similarities with its ``neighbours`` most similar items. The score of an item is the sum of the
similarities that it keeps with the items of the history.

RecBole counts repeated interactions and reads training histories only; mmrec counts an item of a
user once, and reads the history before the target, the validation item included at test.

Legend: N items, U users, R items of a block.
"""

from dataclasses import dataclass

import numpy as np
from scipy import sparse

from retrieval.seen_items import SeenItems
from retrieval.sparse_scores import SparseScores
from trainer.config import NonNegativeFloat, PositiveInt, Settings
from trainer.data.batches import ItemFeatures, TrainSet
from trainer.models.base import Catalogue
from trainer.models.sparse import SparseRecommender

_ITEMS_PER_BLOCK = 1024  # bounds the memory of the similarities before most are dropped


@dataclass(frozen=True, kw_only=True)
class ItemKNNConfig(Settings):
    """Settings of ItemKNN."""

    neighbours: PositiveInt = 100
    """Number of similarities that an item keeps."""
    shrink: NonNegativeFloat = 0.0
    """Added to the divisor, so that similarities by few users are small."""


class ItemKNN(SparseRecommender):
    """Score items by their similarity to the items of a history."""

    settings_class = ItemKNNConfig
    settings: ItemKNNConfig

    def __init__(self, settings: ItemKNNConfig, catalogue: Catalogue) -> None:
        super().__init__(settings, catalogue)
        n_items = catalogue.n_items
        self._similarity_NN = sparse.csr_array((n_items, n_items), dtype=np.float64)

    def fit_buffers(self, features: ItemFeatures, train: TrainSet) -> None:
        """Compute the similarities of the training interactions."""
        users_UN = binary_matrix(train.histories, len(self.zero_N1))
        self._similarity_NN = item_similarities(
            users_UN, self.settings.neighbours, self.settings.shrink
        )

    def correction(self, histories: SeenItems) -> SparseScores:
        """Return the summed similarities with the items of each history, each counted once."""
        scores_EN = binary_matrix(histories, len(self.zero_N1)) @ self._similarity_NN
        scores_EN.sort_indices()
        return SparseScores(
            items=scores_EN.indices.astype(np.int64),
            offsets=scores_EN.indptr.astype(np.int64),
            values=scores_EN.data,
        )


def binary_matrix(histories: SeenItems, n_items: int) -> sparse.csr_array:
    """Return the user-item matrix (U, N) of histories, 1 where a user has an item."""
    matrix_UN = sparse.csr_array(
        (np.ones(len(histories.items)), histories.items, histories.offsets),
        shape=(len(histories), n_items),
        copy=True,  # what follows sorts the items of each user in place
    )
    matrix_UN.sum_duplicates()
    matrix_UN.data[:] = 1
    return matrix_UN


def item_similarities(
    users_UN: sparse.csr_array, neighbours: int, shrink: float
) -> sparse.csr_array:
    """Return the kept similarities (N, N): column j holds those that item j keeps.

    Args:
        users_UN: Binary user-item matrix.
        neighbours: Largest number of entries of a column. Of equal similarities, those with the
            lower item are kept.
        shrink: Added to the divisor.
    """
    items_NU = users_UN.T.tocsr()
    norm_N = np.sqrt(items_NU.sum(axis=1))
    blocks = []
    for begin in range(0, items_NU.shape[0], _ITEMS_PER_BLOCK):
        common_RN = (items_NU[begin : begin + _ITEMS_PER_BLOCK] @ users_UN).tocoo()
        row, column = common_RN.row + begin, common_RN.col
        value = common_RN.data / (norm_N[row] * norm_N[column] + shrink)
        order = np.lexsort((column, -value, row))
        order = order[(row != column)[order]]
        row, column, value = row[order], column[order], value[order]
        place = np.arange(len(row)) - np.searchsorted(row, row)
        kept = place < neighbours
        blocks.append((row[kept], column[kept], value[kept]))
    row, column, value = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
    n_items = items_NU.shape[0]
    return sparse.csr_array((value, (column, row)), shape=(n_items, n_items))
