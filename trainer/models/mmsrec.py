"""MMSRec (Song et al., arXiv:2304.13277): one encoder as item tower and as sequence tower.

An item is one token per modality; a history is the tokens of its items. Both go through the same
bidirectional transformer; an item's vector is the element-wise maximum over its modalities. The
next item is predicted as the hidden last item of a Cloze task, by cosine over the whole catalogue.

Where code and paper differ: a missing modality has no token (the paper puts the mask token there,
``missing="mask"``), and an item without any has a token that stands for that; positions count from
the end of the sequence, so that they do not depend on the batch's longest sequence, as the released
code's do; each epoch draws windows with random ends instead of one sample for each prefix.

Four options are not the paper's, and off by default: ``objective=next`` trains as SASRec does, each
item of a history predicting the one after it, no token looking at a later item; ``ids`` adds a
learned vector to an item's tokens and to its own vector; ``whiten`` decorrelates frozen features,
as WhitenRec does (Zhang et al., ICDE 2024); ``candidates`` lets a step's softmax run over a part of
the catalogue.

Legend: B batch, L sequence length, N items, K of them, C tokens of an item, D width,
M predicted positions, T = L*C.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from features.errors import UserError
from trainer.data.batches import Batch, ItemFeatures, Sequences, TrainSet
from trainer.data.windows import WindowSampling
from trainer.kernels.activation_checkpoint import checkpoint_elementwise
from trainer.kernels.dispatch import use_kernels
from trainer.kernels.elementwise import dropout
from trainer.losses.softmax import draw_candidates, full_softmax, part_softmax
from trainer.mmsrec_config import CORRUPTIONS, MMSRecConfig
from trainer.models.base import Catalogue, Recommender
from trainer.modules.transformer import Transformer, initialise, positions_from_end
from trainer.modules.whitening import Whitening

_ITEMS_AT_ONCE = 4096  # without gradients
# With gradients. A piece's numbers between two products stay in the cache; fewer than the second
# are not worth taking apart, for all that would be saved is some hundred megabytes.
_NUMBERS_AT_ONCE = 2**19
_NUMBERS_IN_ALL = 2**22
_SHARED = ("norm.", "transformer.")


class MMSRec(Recommender):
    """The dual tower over whichever modalities have features: vision, text, or both.

    Raises:
        UserError: There are no features at all.
    """

    # One encoder serves as both towers, so each part takes it.
    transfer_groups: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "items": ("whitening.", "inputs.", "id.", "outputs.", "modality.", *_SHARED),
        "users": ("position.", "instead.", *_SHARED),
        "text": (
            *("whitening.text.", "inputs.text.", "outputs.text."),
            *("modality.", "position.", "instead.", *_SHARED),
        ),
        "image": (  # pictures or clips: what is seen
            *("whitening.image.", "inputs.image.", "outputs.image."),
            *("whitening.video.", "inputs.video.", "outputs.video."),
            *("modality.", "position.", "instead.", *_SHARED),
        ),
    }
    item_tables = ("id.",)
    fitted_buffers = ("known_N",)
    modality_tables = ("modality.weight",)
    reverse_positions = ("position.weight",)
    known_N: Tensor

    def __init__(self, config: MMSRecConfig, catalogue: Catalogue) -> None:
        super().__init__()
        if not catalogue.widths:
            raise UserError(
                "mmsrec needs features; run mmrec extract for this dataset, or train sasrec"
            )
        self.config = config
        dim, names = config.dim, list(catalogue.widths)
        self.inputs = nn.ModuleDict({name: _Head(catalogue.widths[name], dim) for name in names})
        if config.whiten:
            self.whitening = nn.ModuleDict({n: Whitening(catalogue.widths[n]) for n in names})
        if config.ids:
            self.id = nn.Embedding(catalogue.n_items, dim)
            self.register_buffer("known_N", torch.ones(catalogue.n_items, dtype=torch.bool))
        self.outputs = nn.ModuleDict({name: _Head(dim, dim) for name in names})
        self.instead = nn.Embedding(2, dim)  # of a hidden item, of one that has no modality
        self.position = nn.Embedding(config.length, dim)
        self.modality = nn.Embedding(len(names), dim)
        self.norm = nn.LayerNorm(dim)
        self.transformer = Transformer(
            layers=config.layers,
            dim=dim,
            heads=config.heads,
            hidden=config.hidden,
            dropout=config.dropout,
            attention_dropout=config.dropout,
            causal=False,
        )
        initialise(self)

    def fit_buffers(self, features: ItemFeatures, train: TrainSet) -> None:
        """Which items have an identity, and the whitening of each modality."""
        known_N = train.counts_N > 0
        if self.config.ids:
            self.known_N.copy_(known_N)
        if self.config.whiten:
            for name, whitening in self.whitening.items():
                assert isinstance(whitening, Whitening)
                there_N = features.present[name] & known_N
                whitening.fit(features.vectors[name][there_N])

    @property
    def window_sampling(self) -> WindowSampling:
        """With ``objective=next`` each interaction is a target; else random ends always are."""
        length = self.config.length
        if self._causal:
            return WindowSampling(length=length, stride=length - 1, every_target=True)
        stride = self.config.stride or max(1, length // 2)
        return WindowSampling(length=length, stride=stride, every_target=False)

    @property
    def history(self) -> int:
        """One less than ``length``: the last slot is the predicted item's."""
        return self.config.length - 1

    @property
    def _causal(self) -> bool:
        return self.config.objective == "next"

    def encode_items(self, features: ItemFeatures) -> Tensor:
        """Encode each item as a sequence of its own: (N, D), each of length 1."""
        item_N = torch.arange(features.n_items, device=self.mask.device)
        if torch.is_grad_enabled():
            return self._encode_each(item_N, features)
        pieces = item_N.split(_ITEMS_AT_ONCE)
        return torch.cat([self._encode_alone(item_B, features) for item_B in pieces])

    def encode_sequences(
        self, item_vectors_ND: Tensor, sequences: Sequences, features: ItemFeatures
    ) -> Tensor:
        """The state of a mask token put behind each history: (B, D), each of length 1.

        With ``objective=next`` it is the state of the history's last item.
        """
        if not self._causal:
            items_BL = functional.pad(sequences.items_BL, (0, 1))
            sequences = Sequences(items_BL=items_BL, lengths_B=sequences.lengths_B + 1)
        last_BL = _last(sequences)
        first = self._first(sequences.items_BL, features)
        tokens = self._tokens(sequences, first, features, None if self._causal else last_BL)
        return functional.normalize(self._encode(tokens, last_BL), dim=-1)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Item prediction: cosine / temperature, softmax over the catalogue or candidates.

        When masked, of the predicted positions the last is always the mask token; of the others 80%
        are the mask token, 10% a random item, 10% stay as they are (section 3.3 of the paper), or
        as ``corruption`` says.
        """
        draw = batch.generator
        query_MD, target_M = self._next(batch) if self._causal else self._masked(batch)
        scale = 1 / self.config.temperature
        if not self.config.candidates:
            item_ND = self.encode_items(batch.features)
            return {"loss": full_softmax(query_MD, item_ND, target_M, scale)}
        part = draw_candidates(target_M, batch.features.n_items, self.config.candidates, draw)
        item_KD = self._encode_each(part.items_K, batch.features)
        return {"loss": part_softmax(query_MD, item_KD, part, scale)}

    def _masked(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The states of the chosen slots (M, D), each of length 1, and their items (M,)."""
        sequences = batch.sequences
        items_BL, last_BL = sequences.items_BL, _last(sequences)
        draw = batch.generator
        chosen_BL = torch.rand(items_BL.shape, generator=draw).to(items_BL.device)
        chosen_BL = ((chosen_BL < self.config.mask_ratio) & sequences.mask_BL) | last_BL
        fate_BL = torch.rand(items_BL.shape, generator=draw).to(items_BL.device)
        masked, swapped, left_out = CORRUPTIONS[self.config.corruption]
        items = max(1, batch.features.n_items - left_out)
        random_BL = torch.randint(items, items_BL.shape, generator=draw)
        hidden_BL = chosen_BL & ((fate_BL < masked) | last_BL)
        swapped_BL = chosen_BL & ~hidden_BL & (fate_BL < swapped)
        shown_BL = torch.where(swapped_BL, random_BL.to(items_BL.device), items_BL)
        shown = Sequences(items_BL=shown_BL, lengths_B=sequences.lengths_B)
        query_MD, order_B = self._queries(shown, hidden_BL, chosen_BL, batch.features)
        return query_MD, items_BL[order_B][chosen_BL[order_B]]

    def _next(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The states of all slots but the last (M, D), each of length 1, and what follows (M,)."""
        items_BL = batch.sequences.items_BL
        shown = Sequences(items_BL=items_BL[:, :-1], lengths_B=batch.sequences.lengths_B - 1)
        valid_BL = shown.mask_BL
        hidden_BL = torch.zeros_like(valid_BL)
        query_MD, order_B = self._queries(shown, hidden_BL, valid_BL, batch.features)
        return query_MD, items_BL[order_B, 1:][valid_BL[order_B]]

    @property
    def mask(self) -> Tensor:
        """(D,) the mask token."""
        return self.instead.weight[0]

    @property
    def temperature(self) -> float:
        """Divides cosines, in both stages."""
        return self.config.temperature

    @property
    def unaligned(self) -> tuple[str, ...]:
        """Parameters that encoding items by some of their modalities never reads."""
        mask = ("instead.weight",) if self.config.missing == "drop" else ()
        return *mask, *(("id.weight",) if self.config.ids else ())

    def encode_views(
        self, items_K: Tensor, views: Sequence[tuple[Sequence[str], Tensor]], features: ItemFeatures
    ) -> list[Tensor]:
        """Encode items, each as a sequence of its own, from some of their modalities.

        What depends on an item alone is computed once for all views; views with the same number of
        tokens go through the transformer together.

        Args:
            items_K: (K,) int64.
            views: Of each, the modalities it may look at, and (M,) which of the K items it encodes:
                each must have one of these modalities.
            features: Of the whole catalogue.

        Returns:
            For each view (M, D), of length 1.
        """
        names = list(self.inputs)
        here = self.position.weight[0]
        embedded, hidden = {}, self.norm(self.mask + here + self.modality.weight[: len(names)])
        for c, name in enumerate(names):
            x_KD = self._of_modality(name, items_K, features)
            embedded[name] = self.norm(x_KD + here + self.modality.weight[c])
        as_mask = self.config.missing == "mask"
        found: dict[int, Tensor] = {}
        for count in sorted({len(names) if as_mask else len(view) for view, _ in views}):
            of_count = [
                number
                for number, (view, _) in enumerate(views)
                if (len(names) if as_mask else len(view)) == count
            ]
            tokens, exists, heads = [], [], []
            for number in of_count:
                view, rows_M = views[number]
                taken = names if as_mask else [name for name in names if name in view]
                there_MC = torch.stack(
                    [features.present[n][items_K[rows_M]] & (n in view) for n in taken], dim=1
                )
                x_MCD = torch.stack([embedded[name][rows_M] for name in taken], dim=1)
                if as_mask:
                    x_MCD = torch.where(there_MC[..., None], x_MCD, hidden)
                    there_MC = torch.ones_like(there_MC)
                tokens.append(x_MCD)
                exists.append(there_MC)
                heads.append(taken)
            x_MCD, exists_MC = torch.cat(tokens), torch.cat(exists)
            x_MCD = dropout(x_MCD, self.config.embed_dropout, self.training)
            keys_MC = None if bool(exists_MC.all()) else exists_MC
            states = self.transformer(x_MCD, keys_MC).split([len(part) for part in tokens])
            for number, state, there, taken in zip(of_count, states, exists, heads, strict=True):
                found[number] = functional.normalize(self._pool(state, there, taken), dim=-1)
        return [found[number] for number in range(len(views))]

    def _piece(self, tokens: int) -> int:
        """How many of so many tokens are trained on at once, 0: all, and nothing is recomputed.

        Pieces pay on a CPU, where they are many, unless ``torch.compile`` has the blocks.
        """
        dim = self.config.dim
        whole = tokens * dim <= _NUMBERS_IN_ALL
        if whole or not use_kernels(self.mask) or self.transformer.compiled:
            return 0
        return max(1, _NUMBERS_AT_ONCE // dim)

    def _queries(
        self, shown: Sequences, hidden_BL: Tensor, chosen_BL: Tensor, features: ItemFeatures
    ) -> tuple[Tensor, Tensor]:
        """Predict the chosen slots: (M, D), row by row in the order (B,) that comes with them."""
        place_BL, of_item = self._first(shown.items_BL, features)
        lengths_B = shown.lengths_B

        def run(row_B: Tensor, *of_item: Tensor) -> Tensor:
            items_BL, first_BL, covered_BL, at_BL = (
                held_BL[row_B, : int(lengths_B[row_B].max())]
                for held_BL in (shown.items_BL, place_BL, hidden_BL, chosen_BL)
            )
            part = Sequences(items_BL=items_BL, lengths_B=lengths_B[row_B])
            tokens = self._tokens(part, (first_BL, of_item), features, covered_BL)
            return functional.normalize(self._encode(tokens, at_BL), dim=-1)

        width = len(self.outputs) * shown.items_BL.shape[1]  # tokens of a row
        piece = self._piece(len(lengths_B) * width)
        if not piece:
            order_B = torch.arange(len(lengths_B), device=lengths_B.device)
            return run(order_B, *of_item), order_B
        order_B = lengths_B.argsort(stable=True)
        size = max(1, piece // width)
        parts = [checkpoint_elementwise(run, row_B, *of_item) for row_B in order_B.split(size)]
        return torch.cat(parts), order_B

    def _encode_each(self, item_K: Tensor, features: ItemFeatures) -> Tensor:
        """Encode some items, each once: (K, D), with gradients."""
        piece = self._piece(len(item_K) * len(self.outputs))
        if not piece:
            return self._encode_alone(item_K, features)
        # Complete items need no mask: the others come last.
        complete_K = self._present(item_K, features).all(-1)
        order_K = complete_K.int().argsort(stable=True, descending=True)
        pieces = [
            item_B
            for part in item_K[order_K].split([int(complete_K.sum()), int((~complete_K).sum())])
            for item_B in part.split(max(1, piece // len(self.outputs)))
            if len(item_B)
        ]
        # Looked up together: a table's gradient is as large as the table, whatever the piece.
        of_ids: Sequence[Tensor] = ()
        if self.config.ids:
            of_ids = self._identity(item_K[order_K]).split([len(item_B) for item_B in pieces])

        def run(item_B: Tensor, *of_ids: Tensor) -> Tensor:
            return self._encode_alone(item_B, features, of_ids)

        found_KD = torch.cat(
            [
                checkpoint_elementwise(run, item_B, *of_ids[number : number + 1])
                for number, item_B in enumerate(pieces)
            ]
        )
        return found_KD.index_select(0, order_K.argsort())

    def _encode_alone(
        self, item_B: Tensor, features: ItemFeatures, of_ids: Sequence[Tensor] = ()
    ) -> Tensor:
        one_B = torch.ones_like(item_B)
        alone = Sequences(items_BL=item_B[:, None], lengths_B=one_B)
        rows_B1 = torch.arange(len(item_B), device=item_B.device)[:, None]
        of_item = self._of_items(item_B, features, of_ids)
        tokens = self._tokens(alone, (rows_B1, of_item), features)
        vector_BD = functional.normalize(self._encode(tokens, one_B.bool()[:, None]), dim=-1)
        if self.config.ids:
            vector_BD = functional.normalize(vector_BD + of_item[-1], dim=-1)
        return vector_BD

    def _of_items(
        self, item_K: Tensor, features: ItemFeatures, of_ids: Sequence[Tensor] = ()
    ) -> list[Tensor]:
        """What is a function of the item alone, each (K, D): first layers, with ``ids`` identities.

        ``of_ids`` are the identities, where they are known already.
        """
        found = [self._of_modality(name, item_K, features) for name in self.inputs]
        if self.config.ids:
            found += of_ids or [self._identity(item_K)]
        return found

    def _identity(self, item_K: Tensor) -> Tensor:
        """Learned vectors (K, D); zero for items without training interactions."""
        found_KD: Tensor = self.id(item_K) * self.known_N[item_K, None]
        return found_KD

    def _of_modality(self, name: str, item_K: Tensor, features: ItemFeatures) -> Tensor:
        x_KW = features.vectors[name][item_K]
        if self.config.whiten:
            x_KW = self.whitening[name](x_KW)
        first_KD: Tensor = self.inputs[name](x_KW)
        return first_KD

    def _present(self, items: Tensor, features: ItemFeatures) -> Tensor:
        """Which tokens the items have: bool, of one more dimension C."""
        return torch.stack([features.present[name][items] for name in self.inputs], -1)

    def _first(self, items_BL: Tensor, features: ItemFeatures) -> tuple[Tensor, list[Tensor]]:
        """:meth:`_of_items`, once for each item of a batch, and which is each slot's: (B, L)."""
        unique_K, inverse_BL = items_BL.unique(return_inverse=True)
        return inverse_BL, self._of_items(unique_K, features)

    def _tokens(
        self,
        sequences: Sequences,
        first: tuple[Tensor, Sequence[Tensor]],
        features: ItemFeatures,
        hidden_BL: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Embed a batch: tokens (B, L, C, D), and (B, L, C) bool, which of them exist.

        ``hidden_BL`` slots hold the mask token in every modality. An item that has no modality at
        all has another token there: were it the mask, its vector would be close to every query.
        """
        items_BL, valid_BL = sequences.items_BL, sequences.mask_BL
        if hidden_BL is None:
            hidden_BL = torch.zeros_like(valid_BL)
        present_BLC = self._present(items_BL, features)
        nothing_BL = ~present_BLC.any(-1)
        instead_BL = torch.zeros_like(items_BL)
        if self.config.missing == "drop":
            instead_BL = (nothing_BL & ~hidden_BL).long()
        as_mask_BLC = (hidden_BL | nothing_BL)[..., None].expand_as(present_BLC)
        if self.config.missing == "mask":
            as_mask_BLC = as_mask_BLC | ~present_BLC
        # Not `x_KD[place_BL]`: the order in which its backward pass adds is left to the threads.
        place_BL, of_item = first
        of_slot = [functional.embedding(place_BL, x_KD) for x_KD in of_item]
        tokens_BLCD = torch.stack(of_slot[: len(self.inputs)], 2)
        # Always where the next item is predicted: else a step might leave a parameter without one.
        if self._causal or bool(as_mask_BLC.any()):
            instead_BLD = self.instead(instead_BL)
            tokens_BLCD = torch.where(as_mask_BLC[..., None], instead_BLD[:, :, None], tokens_BLCD)
        positions_BL = positions_from_end(sequences.lengths_B, items_BL.shape[1])
        tokens_BLCD = tokens_BLCD + self.position(positions_BL)[:, :, None] + self.modality.weight
        if self.config.ids:
            # Numbers of a token are about 1; beside them an identity weighs what it weighs beside
            # a vector of length 1.
            id_BLD = math.sqrt(self.config.dim) * of_slot[-1].masked_fill(hidden_BL[..., None], 0)
            tokens_BLCD = tokens_BLCD + id_BLD[:, :, None]
        tokens_BLCD = dropout(self.norm(tokens_BLCD), self.config.embed_dropout, self.training)
        return tokens_BLCD, (present_BLC | as_mask_BLC) & valid_BL[..., None]

    def _encode(self, tokens: tuple[Tensor, Tensor], at_BL: Tensor) -> Tensor:
        """Run the encoder; give the vectors at the slots ``at_BL``, row by row: (M, D)."""
        tokens_BLCD, exists_BLC = tokens
        B, L, C, D = tokens_BLCD.shape
        keys = None if bool(exists_BLC.all()) else exists_BLC.view(B, L * C)
        if self._causal and L > 1:
            item_T = torch.arange(L, device=tokens_BLCD.device).repeat_interleave(C)
            before_TT = item_T <= item_T[:, None]
            keys = before_TT[None] if keys is None else before_TT & keys[:, None]
        at_BT = at_BL[..., None].expand(B, L, C).reshape(B, L * C)
        hidden_XD = self.transformer(tokens_BLCD.view(B, L * C, D), keys, at_BT)
        return self._pool(hidden_XD.view(-1, C, D), exists_BLC[at_BL], list(self.outputs))

    def _pool(self, hidden_MCD: Tensor, exists_MC: Tensor, names: list[str]) -> Tensor:
        """Each modality's own head, then the largest over those that exist: (M, D)."""
        found = [self.outputs[name](hidden_MCD[:, c]) for c, name in enumerate(names)]
        lowest = torch.finfo(found[0].dtype).min
        if not bool(exists_MC.all()):
            found = [x.masked_fill(~exists_MC[:, c, None], lowest) for c, x in enumerate(found)]
        largest_MD: Tensor = functools.reduce(torch.maximum, found)
        return largest_MD


def _last(sequences: Sequences) -> Tensor:
    """(B, L) bool: the last item of each sequence."""
    columns_L = torch.arange(sequences.items_BL.shape[1], device=sequences.items_BL.device)
    return columns_L == sequences.lengths_B[:, None] - 1


class _Head(nn.Sequential):
    """A linear layer and a LayerNorm."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__(nn.Linear(width, dim), nn.LayerNorm(dim))

    def forward(self, x: Tensor) -> Tensor:
        layer, norm = self
        assert isinstance(layer, nn.Linear)
        normed: Tensor = norm(layer(x))
        return normed
