"""The base class of recommenders: two encoders, a loss, and windows to train on.

The training loop and the evaluation use a model only through this class.

Legend: B batch, L sequence length, N items of the catalogue, C items of a block, D width of the
shared space.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np
from torch import Tensor, nn

from features.dataset import Ints
from retrieval.seen_items import SeenItems
from retrieval.sparse_scores import SparseScores
from trainer.config import TrainConfig
from trainer.data.batches import Batch, ItemFeatures, Sequences, TrainSet
from trainer.data.windows import WindowSampling
from trainer.losses.base import Loss


@dataclass(frozen=True, kw_only=True, slots=True)
class Catalogue:
    """The items and users that a recommender is built for. They determine its parameter shapes."""

    n_items: int
    """Number of items N."""
    n_users: int
    """Number of users of the dataset. Their indices are those of ``Sequences.users_B``."""
    widths: dict[str, int]
    """Modality to width of its features, in the order of the feature tables; empty without
    features."""
    n_attributes: int = 0
    """Number of attributes of the items; 0 for a model that reads none."""
    time_unit: str | None = None
    """Unit of the times of the interactions, see :attr:`features.dataset.Dataset.time_unit`;
    ``None`` if there are no times or the model reads none."""
    backbones: Mapping[str, nn.Module] = field(default_factory=dict)
    """Modality to the upper blocks of its backbone, which are trained with the recommender; see
    :mod:`trainer.finetune.upper_blocks`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pretraining:
    """The pre-training of a recommender by ``mmrec pretrain``."""

    task: str
    """Name in :data:`trainer.tasks.registry.TASKS`."""
    settings: Mapping[str, Any]
    """Settings of the loop and of the recommender whose defaults differ in pre-training."""
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Presets of ``mmrec pretrain``, see :attr:`Recommender.presets`."""


class Prior(Protocol):
    """Scores that are added to those of a trained model."""

    def scores(self, histories: SeenItems, users_E: Ints) -> SparseScores:
        """Return additive scores (E, N), in units of the inner product.

        Args:
            histories: The whole histories of E users, oldest item first.
            users_E: (E,) the users; -1 for a user who is not in the dataset.
        """
        ...


class Recommender(nn.Module, ABC):
    """An item encoder and a sequence encoder into one vector space.

    The score of an item is the inner product of its vector and the vector of the sequence, plus a
    sparse correction if :meth:`correction` returns one. A model whose score is not an inner product
    sets ``has_vectors = False`` and implements :meth:`score`.

    Args:
        settings: An instance of ``settings_class``.
        catalogue: The items and users that the model is built for.
    """

    settings_class: ClassVar[type[Any]]
    """Dataclass of the model's settings."""
    needs_features: ClassVar[bool] = False
    """True if the model reads feature tables."""
    reads_times: ClassVar[bool] = False
    """True if the model reads the times of the interactions."""
    reads_tokens: ClassVar[bool] = False
    """True if the model can read tables of tokens as well as pooled vectors."""
    unread: ClassVar[tuple[str, ...]] = ()
    """Settings of ``settings_class`` that the model does not read. They cannot be given."""
    train_defaults: ClassVar[Mapping[str, Any]] = {}
    """Settings of the loop whose defaults differ for this model."""
    pretraining: ClassVar[Pretraining | None] = None
    """The pre-training of the model; ``None`` without one."""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Name of a preset (``--preset``) to settings of the loop and of the recommender. ``published``
    is the paper, and where the paper is silent the released code. ``released`` is the released
    code, also where it contradicts the paper."""
    variants: ClassVar[Mapping[str, str]] = {}
    """Ablation or other useful form, to the options that select it."""
    has_vectors: ClassVar[bool] = True
    """True if a score is the inner product of the vectors of the two encoders."""
    is_sparse: ClassVar[bool] = False
    """True if all vectors are zero, so that the sparse correction is the score."""
    transfer_groups: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Name of a transfer (``--transfer``) to prefixes of the parameters that it copies; ``full``
    copies everything."""
    of_given_weights: ClassVar[tuple[str, ...]] = ()
    """Settings that keep or map the weights of another run when they are true. A run with one of
    them has initial weights (``--init``)."""
    item_tables: ClassVar[tuple[str, ...]] = ()
    """Prefixes of tables with a row for each item. They are not copied to another catalogue."""
    masks_item_tables: ClassVar[bool] = False
    """True if the model ranks an item that training did not have by its features alone, although it
    has ``item_tables``."""
    user_tables: ClassVar[tuple[str, ...]] = ()
    """Prefixes of tables with a row for each user. They are not copied to other interactions."""
    fitted_buffers: ClassVar[tuple[str, ...]] = ()
    """Buffers fitted on the training interactions. They are never copied from another run."""
    modality_tables: ClassVar[tuple[str, ...]] = ()
    """Parameters with a row for each modality, in the order of ``Catalogue.widths``."""
    reverse_positions: ClassVar[tuple[str, ...]] = ()
    """Tables of positions whose row 0 is the newest slot. They are copied to a model of another
    length row by row."""

    prior: Prior | None = None
    """Scores that were chosen after the training; ``None`` without ``prior=transitions``."""
    takes_chunks: ClassVar[bool] = False
    """True if a step encodes items and sequences in :attr:`chunks`."""

    def __init__(self, settings: Any, catalogue: Catalogue) -> None:
        super().__init__()
        self.settings = settings
        self.chunks = 1
        """Number of chunks in which a step encodes items and sequences, and which its backward pass
        recomputes. The training loop doubles it if a step runs out of memory."""

    def adapted(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the weights of another run in the form that this model stores them.

        Args:
            tensors: Name of a parameter or buffer to its values, of those that are to be copied.

        Raises:
            UserError: The weights cannot be used in this model.
        """
        return tensors

    def fit_buffers(self, features: ItemFeatures, train: TrainSet) -> None:
        """Compute the buffers that depend on the training data; by default there are none.

        The method is called once, when a run is created: a checkpoint contains buffers. A model
        with parameters that names no ``fitted_buffers``, and a model without parameters, are fitted
        each time that a run is opened.

        Args:
            features: Features of the whole catalogue.
            train: The training interactions. No other interactions may be used.
        """

    def extend_buffers(self, features: ItemFeatures, learned: int) -> None:
        """Complete the buffers with a row for each item, for items that training did not have.

        By default the new rows are zero.

        Args:
            features: Features of all items; those of the training come first.
            learned: Number of items of the training.
        """

    @property
    @abstractmethod
    def window_sampling(self) -> WindowSampling:
        """Lengths and ends of the windows of the training histories."""

    @property
    @abstractmethod
    def history(self) -> int:
        """Largest number of items of a history that the sequence encoder reads: the newest ones."""

    @abstractmethod
    def encode_items(self, features: ItemFeatures) -> Tensor:
        """Encode the whole catalogue: (N, D).

        Args:
            features: Features of the whole catalogue.
        """

    @abstractmethod
    def encode_sequences(
        self, item_vectors_ND: Tensor, sequences: Sequences, features: ItemFeatures
    ) -> Tensor:
        """Encode each history into a query for the next item: (B, D).

        Args:
            item_vectors_ND: The result of :meth:`encode_items`.
            sequences: Histories of at most ``history`` items. ``sequences.users_B`` names the
                users; -1 is a user who is not in the dataset.
            features: Features of the whole catalogue.
        """

    @abstractmethod
    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return scalars of one batch by name. ``loss`` is minimised; the others are reported."""

    @property
    def history_bias(self) -> Tensor | None:
        """Return the scalar that the loss adds to the scaled scores of the items of a history."""
        losses = [child for child in self.children() if isinstance(child, Loss)]
        return losses[0].history_bias if losses else None

    def start_history_bias(self, train: TrainSet) -> None:
        """Set the history bias by the training targets that repeat an item of their history."""
        interactions, lengths = len(train.histories.items), np.diff(train.histories.offsets)
        targets = interactions - int(np.count_nonzero(lengths))
        for child in self.children():
            if isinstance(child, Loss):
                child.start_history_bias(interactions - len(train.keys_J), targets)

    def correction(self, histories: SeenItems) -> SparseScores | None:
        """Return scores to add to the inner products of E users.

        By default they are ``history_bias`` for each item of a history. Ranking, search,
        recommendation and the stored predictions add these scores exactly.

        Args:
            histories: The whole histories of E users, oldest item first.

        Returns:
            Additive scores (E, N), in units of the inner product; ``None`` adds nothing.
        """
        if self.history_bias is None:
            return None
        return SparseScores.of_seen(histories, self.history_bias.item() / self.settings.scale)

    def added_scores(self, histories: SeenItems, users_E: Ints) -> SparseScores | None:
        """Return the sum of the correction and of the prior; ``None`` if there is neither.

        The arguments are those of :meth:`Prior.scores`.
        """
        correction = self.correction(histories)
        if self.prior is None:
            return correction
        prior = self.prior.scores(histories, users_E)
        return prior if correction is None else correction + prior

    def score(self, item_vectors_ND: Tensor, sequences: Sequences, first: int, last: int) -> Tensor:
        """Score a block of items for each history: (B, C).

        Only called, and then required, if ``has_vectors`` is False. ``encode_items`` of such a
        model returns the tensors of the items that this method reads.

        Args:
            item_vectors_ND: The result of :meth:`encode_items`.
            sequences: Histories of at most ``history`` items.
            first: First item of the block.
            last: One past the last item of the block.

        Raises:
            NotImplementedError: The scores of the model are inner products.
        """
        raise NotImplementedError(f"{type(self).__name__} ranks by inner products")

    @property
    def learns_by_gradients(self) -> bool:
        """True if the model has parameters; other models are fitted when a run is opened."""
        return any(True for _ in self.parameters())

    @property
    def encodes_new_items(self) -> bool:
        """True if items that training did not have are encoded from their features."""
        has_tables = any(name.startswith(self.item_tables) for name, _ in self.named_parameters())
        return self.needs_features and (self.masks_item_tables or not has_tables)

    @property
    def remarks(self) -> tuple[str, ...]:
        """Sentences that ``mmrec train`` prints, such as a part that the data do not allow."""
        return ()

    def row_tables(self) -> list[nn.Embedding]:
        """Return the tables of which a step reads and changes only some rows; by default none.

        ``item_updates=rows`` applies to these tables. A step must read them by calling the module.
        """
        return []

    def compiled_parts(self) -> list[nn.Module]:
        """Return the modules that ``compile=true`` compiles: those with a true ``can_compile``."""
        return [module for module in self.modules() if getattr(module, "can_compile", False)]

    def parameter_groups(self, config: TrainConfig) -> list[dict[str, Any]]:
        """Return the parameter groups of AdamW, each with its ``lr`` and ``weight_decay``.

        The optimizer moves the parameters of each module that is a
        :class:`trainer.optimizer.HasParameterGroup`, such as the upper blocks of a backbone, to a
        separate group.
        """
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return [{"params": trained, "lr": config.lr, "weight_decay": config.weight_decay}]
