"""The two encoders of a recommender as graphs of plain tensors, for ONNX.

An item graph maps the features of K items, or their numbers, to two tables: the vectors that are
scored, and the inputs that a sequence graph reads. A sequence graph maps the inputs of the items of
B histories to queries. So a sequence graph does not depend on the catalogue.

The inputs are what the sequence encoder of the recommender reads of an item: its vector before
normalisation, or with MMSRec its projected features, its learned vector and its modalities.

Legend: K items, B histories, L sequence length, D width, W width of the inputs, C modalities.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from features.errors import UserError
from trainer.data.batches import ItemFeatures, Sequences
from trainer.models.base import Recommender
from trainer.models.causal import CausalRecommender
from trainer.models.item_features import FeatureRecommender
from trainer.models.item_ids import ItemIdRecommender
from trainer.models.mmsrec import MMSRec
from trainer.models.unisrec import UniSRec
from trainer.modules.multimodal_encoder import ItemEmbeddings
from trainer.modules.sequence_encoders import last_state

NUMBER = "item"
"""Input of an item graph: (K,) int64 numbers of learned items; -1 is an item without a number."""
PRESENT = "_present"
"""Ending of the input of an item graph that tells which items have a modality."""


class ItemGraph(nn.Module, ABC):
    """Base class of item graphs.

    Args:
        model: The recommender, in evaluation mode.
        modalities: The modalities whose features the graph reads.
        reads_numbers: Whether the graph reads the numbers of learned items.
    """

    inputs_are_vectors = False
    """True if a sequence graph reads the vectors, so that the item graph returns no inputs."""

    def __init__(self, modalities: Sequence[str], *, reads_numbers: bool) -> None:
        super().__init__()
        self.modalities = tuple(modalities)
        self.reads_numbers = reads_numbers

    @property
    def names(self) -> list[str]:
        """Names of the tensors that :meth:`forward` takes, in their order."""
        features = [name + end for name in self.modalities for end in ("", PRESENT)]
        return [*([NUMBER] if self.reads_numbers else []), *features]

    def tensors(self, features: ItemFeatures, item_K: Tensor) -> list[Tensor]:
        """Return the tensors that :meth:`forward` takes for some items of a catalogue.

        Args:
            features: Features of the whole catalogue.
            item_K: (K,) int64 items.
        """
        numbers = [item_K] if self.reads_numbers else []
        tables = [t for name in self.modalities for t in (features.vectors, features.present)]
        names = [name for name in self.modalities for _ in range(2)]
        return numbers + [table[name][item_K] for table, name in zip(tables, names, strict=True)]

    def forward(self, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        """Return the vectors (K, D), and the inputs (K, W) unless these are the vectors.

        Args:
            tensors: In the order of ``names``: (K,) int64 numbers, and for each modality (K, D_m)
                float32 features, zero for an item without the modality, and (K,) bool.
        """
        named = dict(zip(self.names, tensors, strict=True))
        features = ItemFeatures(
            n_items=tensors[0].shape[0],
            vectors={name: named[name] for name in self.modalities},
            present={name: named[name + PRESENT] for name in self.modalities},
        )
        vectors_KD, inputs_KW = self.encode(features, named.get(NUMBER))
        return (vectors_KD,) if self.inputs_are_vectors else (vectors_KD, inputs_KW)

    @abstractmethod
    def encode(self, features: ItemFeatures, number_K: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the vectors (K, D) and the inputs (K, W) of K items.

        Args:
            features: Features of the K items alone.
            number_K: (K,) int64 numbers; ``None`` if the graph reads none.
        """


class SequenceGraph(nn.Module, ABC):
    """Base class of sequence graphs."""

    @abstractmethod
    def forward(self, inputs_BLW: Tensor, lengths_B: Tensor) -> Tensor:
        """Return the queries of B histories: (B, D).

        Args:
            inputs_BLW: Inputs of the items, oldest first; zero after the last item.
            lengths_B: (B,) int64, the number of items of each history, at least 1.
        """


def make_graphs(model: Recommender, name: str) -> tuple[ItemGraph, SequenceGraph]:
    """Return the graphs of a recommender, which is set to evaluation mode.

    Args:
        model: The recommender.
        name: Name of the model, for messages.

    Raises:
        UserError: The model has no graphs.
    """
    kind = type(model)
    model.eval()
    reason = "its encoders have a form of their own"
    if kind.correction is not Recommender.correction:
        reason = "a part of its score is no inner product of vectors but counted from histories"
    elif model.prior is not None:
        reason = "its prior depends on the history, and an index does not add it"
    elif not model.has_vectors:
        reason = "its score is no inner product of vectors, which an index needs"
    elif isinstance(model, MMSRec) and kind.encode_sequences is MMSRec.encode_sequences:
        return MultimodalItems(model), MultimodalSequences(model)
    elif isinstance(model, CausalRecommender) and _is_plain(type(model)):
        return CausalItems(model), CausalSequences(model)
    raise UserError(f"{name} cannot be exported: {reason}; serve the run with mmrec recommend")


def _is_plain(kind: type[CausalRecommender]) -> bool:
    """Return whether a model reads vectors of items that are encoded one by one."""
    bases = (CausalRecommender, FeatureRecommender, ItemIdRecommender)
    return (
        kind.encode_sequences in [base.encode_sequences for base in bases]
        and kind.states in [base.states for base in bases]
        and kind.extend_buffers is Recommender.extend_buffers
        and (not (kind.needs_features and kind.item_tables) or issubclass(kind, UniSRec))
    )


class CausalItems(ItemGraph):
    """Item graph of a model with a causal sequence encoder over item vectors."""

    def __init__(self, model: CausalRecommender) -> None:
        has_identities = isinstance(model, UniSRec) and model.settings.ids
        modalities = _modalities(model) if model.needs_features else []
        super().__init__(modalities, reads_numbers=has_identities or not model.needs_features)
        self.model = model
        kind = type(model)
        reads_normalised = (
            kind.encode_sequences is CausalRecommender.encode_sequences
            and kind.states is CausalRecommender.states
        )
        self.inputs_are_vectors = reads_normalised or model.settings.score != "cosine"

    def encode(self, features: ItemFeatures, number_K: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the vectors (K, D), and the vectors before normalisation (K, D)."""
        model = self.model
        if number_K is None:
            x_KD = model.encode_some(_rows(features), features)
        elif isinstance(model, UniSRec):
            x_KD = model.item_encoder(_rows(features), features) + _identity(model, number_K)
        else:
            x_KD = model.encode_some(number_K, features)
        return model.settings.normalise(x_KD), x_KD


class CausalSequences(SequenceGraph):
    """Sequence graph of a model with a causal sequence encoder over item vectors."""

    def __init__(self, model: CausalRecommender) -> None:
        super().__init__()
        self.encoder = model.sequence_encoder
        self.settings = model.settings

    def forward(self, inputs_BLW: Tensor, lengths_B: Tensor) -> Tensor:
        """Return the state at the last item of each history: (B, D)."""
        states_BLD = self.encoder(inputs_BLW, lengths_B)
        sequences = Sequences(items_BL=lengths_B[:, None], lengths_B=lengths_B)
        return self.settings.normalise(last_state(states_BLD, sequences))


class MultimodalItems(ItemGraph):
    """Item graph of MMSRec.

    The inputs of an item are its projected features, its learned vector with ``ids``, and for each
    modality 1 if the item has it, else 0: W = C D + D + C, or C D + C without ``ids``.
    """

    def __init__(self, model: MMSRec) -> None:
        super().__init__(model.names, reads_numbers=model.settings.ids)
        self.model = model

    def encode(self, features: ItemFeatures, number_K: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the vectors (K, D) and the inputs (K, W)."""
        model, row_K = self.model, _rows(features)
        identity_KD = None if number_K is None else _identity(model, number_K)
        items = model.embed_items(row_K, features, identity_KD)
        sequences = Sequences(items_BL=row_K[:, None], lengths_B=torch.ones_like(row_K))
        tokens = model.embed_slots(sequences, row_K[:, None], items, features)
        vectors_KD = _encode_last(model, *tokens, sequences)
        parts = [*items.modalities, model.present(row_K, features).float()]
        if identity_KD is not None:
            vectors_KD = model.settings.normalise(vectors_KD + identity_KD)
            parts.insert(-1, identity_KD)
        return vectors_KD, torch.cat(parts, 1)


class MultimodalSequences(SequenceGraph):
    """Sequence graph of MMSRec, see :class:`MultimodalItems`. Each slot is an item of its own."""

    def __init__(self, model: MMSRec) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs_BLW: Tensor, lengths_B: Tensor) -> Tensor:
        """Return the vector of the mask token after each history, or of its last item: (B, D)."""
        model, D = self.model, self.model.settings.dim
        hidden_BL = None
        if not model.causal:
            inputs_BLW = functional.pad(inputs_BLW, (0, 0, 0, 1))
            lengths_B = lengths_B + 1
            columns_L = torch.arange(inputs_BLW.shape[1], device=lengths_B.device)
            hidden_BL = columns_L == lengths_B[:, None] - 1
        B, L, W = inputs_BLW.shape
        C = len(model.names)
        *parts, present_SC = inputs_BLW.reshape(-1, W).split([*[D] * ((W - C) // D), C], 1)
        present = {name: present_SC[:, c] > 0 for c, name in enumerate(model.names)}
        features = ItemFeatures(n_items=B * L, vectors={}, present=present)
        items = ItemEmbeddings(
            modalities=parts[:C], identity_KD=parts[C] if model.settings.ids else None
        )
        row_BL = torch.arange(B * L, device=lengths_B.device).view(B, L)
        sequences = Sequences(items_BL=row_BL, lengths_B=lengths_B)
        tokens = model.embed_slots(sequences, row_BL, items, features, hidden_BL)
        return _encode_last(model, *tokens, sequences)


def _modalities(model: CausalRecommender) -> list[str]:
    """Return the modalities that an item encoder reads."""
    encoder = model.item_encoder
    parts = encoder.adaptors if isinstance(model, UniSRec) else encoder.inputs
    assert isinstance(parts, nn.ModuleDict)
    return list(parts)


def _rows(features: ItemFeatures) -> Tensor:
    """Return the row of each item in its features: (K,)."""
    device = next(iter(features.present.values())).device
    return torch.arange(features.n_items, device=device)


def _identity(model: UniSRec | MMSRec, number_K: Tensor) -> Tensor:
    """Return the learned vectors (K, D); zero for items that have none."""
    return model.embed_identity(number_K.clamp_min(0)) * (number_K >= 0)[:, None]


def _encode_last(
    model: MMSRec, tokens_BLCD: Tensor, exists_BLC: Tensor, sequences: Sequences
) -> Tensor:
    """Return the vector of the last slot of each sequence: (B, D)."""
    B, L, C, D = tokens_BLCD.shape
    mask = model.attention_mask(exists_BLC)
    states_BTD = model.transformer(tokens_BLCD.view(B, L * C, D), mask)
    state_BCD = last_state(states_BTD.view(B, L, C * D), sequences).view(B, C, D)
    pooled_BD = model.pool(state_BCD, last_state(exists_BLC, sequences), model.names)
    return model.settings.normalise(pooled_BD)
