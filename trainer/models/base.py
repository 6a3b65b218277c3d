"""The contract of a recommender: two encoders, a loss, and the windows it trains on.

The loop and the evaluation use nothing else of a model.

Legend: B batch, L sequence length, N items of the catalogue, C items of a block, D width of the
shared space.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from retrieval.seen_items import SeenItems
from retrieval.sparse_scores import SparseScores
from trainer.config import TrainConfig
from trainer.data.batches import Batch, ItemFeatures, Sequences, TrainSet
from trainer.data.windows import WindowSampling


@dataclass(frozen=True, kw_only=True, slots=True)
class Catalogue:
    """The items and users that a recommender is built for: it sizes its tables by them."""

    n_items: int
    n_users: int
    """Users of the dataset. Their indices are those of ``Sequences.users_B``."""
    widths: dict[str, int]
    """Modality to width of its features, in the order given; empty without features."""
    backbones: Mapping[str, nn.Module] = field(default_factory=dict)
    """Modality to the upper blocks of its backbone, which are trained with the recommender, see
    :mod:`trainer.finetune.upper_blocks`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pretraining:
    """The pre-training of a recommender by ``mmrec pretrain``."""

    task: str
    """Name in :data:`trainer.tasks.registry.TASKS`."""
    settings: Mapping[str, Any]
    """Defaults of the loop and of the recommender that differ in pre-training."""


class Recommender(nn.Module, ABC):
    """An item encoder and a sequence encoder that share one space.

    The score of an item is the inner product of the two vectors, plus a sparse correction if
    :meth:`correction` returns one. A model whose score is no inner product sets
    ``has_vectors = False`` and implements :meth:`score`.

    Args:
        settings: An instance of ``settings_class``.
        catalogue: The items and users that the model is built for.
    """

    settings_class: ClassVar[type[Any]]
    """Dataclass of the model's settings."""
    needs_features: ClassVar[bool] = False
    """True if the model reads feature tables."""
    reads_tokens: ClassVar[bool] = False
    """True if the model can read tables of tokens, not only pooled vectors."""
    train_defaults: ClassVar[Mapping[str, Any]] = {}
    """Defaults of the loop that differ for this model."""
    pretraining: ClassVar[Pretraining | None] = None
    """``None`` if the model has no pre-training."""
    variants: ClassVar[Mapping[str, str]] = {}
    """Ablations, published forms and other useful forms, to the words that ask for them."""
    has_vectors: ClassVar[bool] = True
    """True if a score is an inner product of the vectors of both encoders."""
    transfer_groups: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Name of a transfer (``--transfer``) to prefixes of the parameters that it copies; ``full``
    copies everything."""
    item_tables: ClassVar[tuple[str, ...]] = ()
    """Prefixes of tables with a row for each item. They are not copied to another catalogue."""
    user_tables: ClassVar[tuple[str, ...]] = ()
    """Prefixes of tables with a row for each user. They are not copied to other interactions."""
    fitted_buffers: ClassVar[tuple[str, ...]] = ()
    """Buffers fitted on the training interactions. They are never copied from another run."""
    modality_tables: ClassVar[tuple[str, ...]] = ()
    """Parameters with a row for each modality, in the order of ``Catalogue.widths``."""
    reverse_positions: ClassVar[tuple[str, ...]] = ()
    """Tables of positions whose row 0 is the newest slot: they fit any length."""

    def __init__(self, settings: Any, catalogue: Catalogue) -> None:
        super().__init__()
        self.settings = settings

    def fit_buffers(self, features: ItemFeatures, train: TrainSet) -> None:
        """Set the buffers that are computed from the training data; by default none.

        Called once, before weights are loaded: a checkpoint brings its own buffers.

        Args:
            features: Features of the whole catalogue.
            train: The training interactions, the only ones that may be used.
        """

    @property
    @abstractmethod
    def window_sampling(self) -> WindowSampling:
        """Lengths and ends of the windows of the training histories."""

    @property
    @abstractmethod
    def history(self) -> int:
        """Largest number of items of a history that the sequence encoder reads."""

    @abstractmethod
    def encode_items(self, features: ItemFeatures) -> Tensor:
        """Encode the whole catalogue: (N, D)."""

    @abstractmethod
    def encode_sequences(
        self, item_vectors_ND: Tensor, sequences: Sequences, features: ItemFeatures
    ) -> Tensor:
        """Encode histories into the query for the next item: (B, D).

        Args:
            item_vectors_ND: The result of :meth:`encode_items`.
            sequences: Histories of at most ``history`` items. ``sequences.users_B`` names the
                users; -1 is a user who is not in the dataset.
            features: Features of the whole catalogue.
        """

    @abstractmethod
    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return named scalars of one batch; ``loss`` is minimised."""

    def correction(self, histories: SeenItems) -> SparseScores | None:
        """Return scores to add to the inner products of some users; by default none.

        Ranking, search, recommendation and the stored predictions add them exactly.

        Args:
            histories: The whole histories of E users, oldest item first.

        Returns:
            Additive scores (E x N), in units of the inner product.
        """
        return None

    def score(self, item_vectors_ND: Tensor, sequences: Sequences, first: int, last: int) -> Tensor:
        """Score a block of items for histories: (B, C).

        By default the inner products. A model that is no inner product overrides it and sets
        ``has_vectors = False``; ``encode_items`` then returns the tensor of each item that its
        :meth:`score` needs.

        Args:
            item_vectors_ND: The result of :meth:`encode_items`.
            sequences: Histories of at most ``history`` items.
            first: First item of the block.
            last: One past the last item of the block.
        """
        raise NotImplementedError(f"{type(self).__name__} ranks by inner products")

    def compiled_parts(self) -> list[nn.Module]:
        """Return the modules that ``compile=true`` compiles: those with ``can_compile``."""
        return [module for module in self.modules() if getattr(module, "can_compile", False)]

    def parameter_groups(self, config: TrainConfig) -> list[dict[str, Any]]:
        """Return the parameter groups of AdamW, each with its ``lr`` and ``weight_decay``.

        Modules with a :class:`trainer.optimizer.HasParameterGroup`, such as the upper blocks of a
        backbone, are groups of their own.
        """
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return [{"params": trained, "lr": config.lr, "weight_decay": config.weight_decay}]
