"""The contract of a recommender: two towers, a loss, and how it reads histories.

The loop and the evaluation know nothing else of it.

Legend: B batch, L sequence length, N items, D width of the shared space.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from trainer.data.batches import Batch, ItemFeatures, Sequences, TrainSet
from trainer.data.windows import WindowSampling


@dataclass(frozen=True, kw_only=True, slots=True)
class Catalogue:
    """What a recommender is built for: it may size its tables by this, and see nothing else."""

    n_items: int
    widths: dict[str, int]
    """Modality -> width of its features, in the order given; empty without features."""
    backbones: Mapping[str, nn.Module] = field(default_factory=dict)
    """Modality -> upper blocks of its backbone, which the recommender trains with its own weights;
    see :mod:`trainer.finetune.upper_blocks`."""


class Recommender(nn.Module, ABC):
    """An item tower and a sequence tower that meet in one space; a score is an inner product."""

    transfer_groups: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """What ``--transfer`` takes, as prefixes of parameter names; ``full`` takes everything."""
    item_tables: ClassVar[tuple[str, ...]] = ()
    """Prefixes of tables with a row for each item: they mean nothing in another catalogue."""
    fitted_buffers: ClassVar[tuple[str, ...]] = ()
    """What :meth:`fit_buffers` finds in the training interactions, and no other run may say."""
    modality_tables: ClassVar[tuple[str, ...]] = ()
    """Parameters with a row for each modality, in the order of ``Catalogue.widths``."""
    reverse_positions: ClassVar[tuple[str, ...]] = ()
    """Tables of positions whose row 0 is the newest slot: of any length, they mean the same."""

    def fit_buffers(self, features: ItemFeatures, train: TrainSet) -> None:
        """Set what is computed from the training data, not learned: nothing by default.

        Called once, before any weights are loaded; what it sets are buffers, so that a checkpoint
        brings its own.

        Args:
            features: Of the whole catalogue.
            train: The training interactions; the only ones that may be looked at.
        """

    @property
    @abstractmethod
    def window_sampling(self) -> WindowSampling:
        """How the training histories are to be cut."""

    @property
    @abstractmethod
    def history(self) -> int:
        """Most items of a history that the sequence tower reads."""

    @abstractmethod
    def encode_items(self, features: ItemFeatures) -> Tensor:
        """Encode the whole catalogue: (N, D)."""

    @abstractmethod
    def encode_sequences(
        self, item_vectors_ND: Tensor, sequences: Sequences, features: ItemFeatures
    ) -> Tensor:
        """Encode histories into the query for the next item: (B, D).

        Args:
            item_vectors_ND: What ``encode_items`` gave.
            sequences: Histories of at most ``history`` items.
            features: For towers that read an item's modalities one by one.
        """

    @abstractmethod
    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Named scalars of one batch; ``loss`` is the one that is minimised."""

    def parameter_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """The groups that AdamW gets: ``params``, and their own ``lr`` and ``weight_decay``.

        Args:
            lr: Learning rate of the configuration, which the schedule scales.
            weight_decay: Weight decay of the configuration.
        """
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return [{"params": trained, "lr": lr, "weight_decay": weight_decay}]
