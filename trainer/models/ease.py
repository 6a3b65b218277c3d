"""EASE (Steck, WWW 2019): a linear model of items by items, in closed form.

With the binary user-item matrix X of training, P = (X^T X + ``penalty`` I)^-1 and the weights are
B_ij = -P_ij / P_jj, with a diagonal of 0 (Eq. 8 of the paper). The score of item j for a user is
the sum of B_ij over the items i of the history.

RecBole counts repeated interactions and reads training histories only; mmrec counts an item of a
user once, and reads the history before the target, the validation item included at test.

Legend: N items, B batch, L sequence length, C items of a block.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from features.errors import OutOfMemoryError
from features.memory import available_memory
from trainer.config import PositiveFloat, PositiveInt, Settings
from trainer.data.batches import Batch, ItemFeatures, Sequences, TrainSet
from trainer.data.windows import WindowSampling
from trainer.models.base import Catalogue, Recommender
from trainer.models.itemknn import binary_matrix

_MATRICES = 3  # of N x N float32 in memory at once: the Gram matrix, its factor and the inverse


@dataclass(frozen=True, kw_only=True)
class EASEConfig(Settings):
    """Settings of EASE."""

    penalty: PositiveFloat = 250.0
    """Ridge penalty (lambda in the paper)."""
    length: PositiveInt = 5000
    """Largest number of items of a history that are read."""


class EASE(Recommender):
    """A linear model of items by items.

    Raises:
        OutOfMemoryError: The item x item matrices do not fit into memory.
    """

    settings_class = EASEConfig
    settings: EASEConfig
    has_vectors = False
    weights_NN: Tensor

    def __init__(self, settings: EASEConfig, catalogue: Catalogue) -> None:
        super().__init__(settings, catalogue)
        n_items = catalogue.n_items
        needed, available = _MATRICES * 4 * n_items**2, available_memory()
        if needed > available:
            raise OutOfMemoryError(
                f"ease needs {needed / 2**30:,.1f} GiB for matrices of {n_items:,} x {n_items:,}"
                f" items, and {available / 2**30:,.1f} GiB are available; train itemknn"
            )
        self.register_buffer("weights_NN", torch.zeros(n_items, n_items), persistent=False)

    def fit_buffers(self, features: ItemFeatures, train: TrainSet) -> None:
        """Compute the weights from the training interactions."""
        users_UN = binary_matrix(train.histories, len(self.weights_NN))
        gram_NN = torch.from_numpy((users_UN.T @ users_UN).toarray()).to(self.weights_NN)
        gram_NN.diagonal().add_(self.settings.penalty)
        precision_NN = torch.cholesky_inverse(torch.linalg.cholesky(gram_NN))
        self.weights_NN.copy_(precision_NN / -precision_NN.diagonal())
        self.weights_NN.fill_diagonal_(0)

    @property
    def window_sampling(self) -> WindowSampling:
        """Windows of a history and its next item, which are not used."""
        length = self.settings.length
        return WindowSampling(length=length + 1, stride=length, every_target=True)

    @property
    def history(self) -> int:
        """Largest number of items of a history that are read."""
        return self.settings.length

    def encode_items(self, features: ItemFeatures) -> Tensor:
        """Return the weights: (N, N), a row for each item of the history."""
        return self.weights_NN

    def encode_sequences(
        self, item_vectors_ND: Tensor, sequences: Sequences, features: ItemFeatures
    ) -> Tensor:
        """Return the items of each history as zeros and ones: (B, N)."""
        rows_B1 = torch.arange(len(sequences.lengths_B), device=item_vectors_ND.device)[:, None]
        has_item_BN = item_vectors_ND.new_zeros(len(rows_B1), len(item_vectors_ND))
        row_M = rows_B1.expand_as(sequences.items_BL)[sequences.mask_BL]
        has_item_BN[row_M, sequences.items_BL[sequences.mask_BL]] = 1
        return has_item_BN

    def score(self, item_vectors_ND: Tensor, sequences: Sequences, first: int, last: int) -> Tensor:
        """Return the scores of a block of items: (B, C)."""
        features = ItemFeatures(n_items=len(item_vectors_ND), vectors={}, present={})
        has_item_BN = self.encode_sequences(item_vectors_ND, sequences, features)
        return has_item_BN @ item_vectors_ND[:, first:last]

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return a loss of 0: there is nothing to learn by gradients."""
        return {"loss": self.weights_NN.new_zeros(())}
