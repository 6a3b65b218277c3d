"""PMMRec (Li et al., arXiv:2312.09602): items by their modalities alone, made to be transferred.

An item's tokens of all modalities go through a merge-attention block, and their mean is the item;
where a run has one modality, that is the mean of its projected tokens and there is nothing to fuse.
A causal transformer reads the items of a history. Fine-tuning predicts the next item among those of
the batch (DAP); pre-training adds the alignment of modalities (NICL) and two objectives on
disturbed sequences (NID, RCL), see :mod:`trainer.losses.pmmrec`.

Where code and paper differ, or the paper's form cannot be trained, the sound form is the default:
``pool``, ``token_types``, ``debias``, ``align_temperature``, ``align_literal``, ``nid_relu`` and
``rcl_*`` say what was published. A modality that an item lacks is a learned token that says so.

Legend: B batch, L sequence length, N items, K distinct items, T tokens, D width, M positions.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from features.errors import UserError, unknown
from trainer.checks import check_heads, check_positive, check_probability, check_temperature
from trainer.data.batches import Batch, ItemFeatures, Sequences
from trainer.data.windows import WindowSampling
from trainer.distributed import gather_ids, gather_rows, rank_offset
from trainer.finetune.upper_blocks import item_tokens
from trainer.losses.in_batch import log_popularity, own_items
from trainer.losses.pmmrec import ALIGNMENTS, Positions, align, corrupt, dap, nid, pool, rcl, total
from trainer.models.base import Catalogue, Recommender
from trainer.modules.fusion import FusionConfig, MergeAttention
from trainer.modules.sequence_encoders import SASRecTower, TowerConfig, last_state
from trainer.modules.tokens import Tokens, averaged, fill, masked_mean
from trainer.modules.transformer import initialise

_TOKENS_AT_ONCE = 2**15  # without gradients; with them all activations are kept anyway


@dataclass(frozen=True, kw_only=True, slots=True)
class PMMRecConfig:
    """Hyper-parameters of PMMRec; options say where paper and released code differ."""

    dim: int = 256
    """Width of tokens, item vectors and states (the paper: 768)."""
    layers: int = 2
    """Blocks of the user encoder."""
    heads: int = 2
    """Attention heads of the user encoder."""
    hidden: int = 1024
    """Width of the feed-forward networks."""
    length: int = 20
    """Most items of a history that are read."""
    dropout: float = 0.1
    """Probability, in both towers."""
    fusion_layers: int = 1
    """Merge-attention blocks."""
    fusion_heads: int = 4
    """Attention heads of the merge-attention."""
    pool: str = "mean"
    """An item is the ``mean`` of its tokens' states (the released code), or the state of a learned
    ``cls`` token (the paper), which at the start hardly depends on the item and is slow to learn.
    """
    token_types: bool = True
    """Tokens say of which modality they are; the released code computes that and drops it."""
    dap: bool = True
    """Learn the next item among those of the batch."""
    debias: bool = True
    """DAP: subtract the log popularity from scores (the released code; not in the paper)."""
    cosine: bool = False
    """Whether a score is the cosine; else the inner product (the paper)."""
    temperature: float = 1.0
    """Divides the scores in DAP."""
    align: str = "none"
    """Contrast of modalities: ``none``, ``vcl``, ``icl``, ``ncl`` or ``nicl``."""
    align_temperature: float = 0.1
    """Divides its cosines (the equations: 1)."""
    align_literal: bool = False
    """Eq. 8 to the letter: the next item's positives are not in the denominator."""
    nid: bool = False
    """Tell which items of a disturbed sequence are shuffled or replaced."""
    nid_relu: bool = False
    """Clip the logits at 0 before the softmax, as near to Eq. 10 as can be trained."""
    rcl: bool = False
    """Contrast a sequence with its disturbed self."""
    rcl_pool: str = "mean"
    """A sequence is the ``mean`` of its states, or the ``last`` one."""
    rcl_cosine: bool = True
    """Whether sequences are compared by cosine; as published: false, by the inner product."""
    rcl_temperature: float = 0.1
    """Divides these (as published: 1)."""
    shuffle: float = 0.15
    """Share of a sequence's items that a disturbance moves."""
    replace: float = 0.05
    """Share that it replaces by other items of the batch."""

    def __post_init__(self) -> None:
        check_positive(
            self, "dim", "layers", "heads", "hidden", "length", "fusion_layers", "fusion_heads",
        )  # fmt: skip
        check_temperature(self, "temperature", "align_temperature", "rcl_temperature")
        check_probability(self, "dropout", "shuffle", "replace")
        check_heads(self.dim, self.heads)
        if self.dim % self.fusion_heads:
            raise UserError(
                f"dim={self.dim} is not a multiple of fusion_heads={self.fusion_heads};"
                " change one of them"
            )
        for name, known in (
            ("pool", ["cls", "mean"]), ("align", ["none", *ALIGNMENTS]),
            ("rcl_pool", ["mean", "last"]),
        ):  # fmt: skip
            if getattr(self, name) not in known:
                raise unknown(name, getattr(self, name), known)
        if not (self.dap or self.align != "none" or self.nid or self.rcl):
            raise UserError("nothing to learn: dap, nid and rcl are false and align is none")


class PMMRec(Recommender):
    """Multi-modal items and a user encoder, over whichever modalities have features.

    Raises:
        UserError: There are no features, or ``align`` wants two modalities and there is one.
    """

    transfer_groups: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "items": ("item_tower.", "backbones."),
        "users": ("user_encoder.",),
        **{
            name: (f"item_tower.{name}.", f"backbones.{name}.", "user_encoder.")
            for name in ("text", "image", "video")
        },
    }
    modality_tables = ("item_tower.absent", "item_tower.fusion.types")
    reverse_positions = ("user_encoder.position.weight",)

    def __init__(self, config: PMMRecConfig, catalogue: Catalogue) -> None:
        super().__init__()
        if not catalogue.widths:
            raise UserError(
                "pmmrec needs features; run mmrec extract for this dataset, or train sasrec"
            )
        if config.align != "none" and len(catalogue.widths) < 2:
            raise UserError(
                f"align={config.align!r} contrasts modalities, and there is only"
                f" {', '.join(catalogue.widths)}; set align=none"
            )
        self.config = config
        fusion = FusionConfig(
            dim=config.dim,
            heads=config.fusion_heads,
            hidden=config.hidden,
            layers=config.fusion_layers,
            dropout=config.dropout,
            pool=config.pool,
            token_types=config.token_types,
        )
        self.item_tower = _Items(catalogue.widths, fusion)
        self.user_encoder = SASRecTower(
            TowerConfig(
                dim=config.dim,
                layers=config.layers,
                heads=config.heads,
                hidden=config.hidden,
                length=config.length,
                dropout=config.dropout,
            )
        )
        if config.nid:
            self.nid = nn.Linear(config.dim, 3)
        initialise(self)
        if not (config.dap or config.nid or config.rcl):  # alignment alone reads neither
            for part in (self.user_encoder, self.item_tower.fusion):
                assert part is not None
                part.requires_grad_(False)
        self.backbones = nn.ModuleDict(dict(catalogue.backbones))  # trained already

    @property
    def window_sampling(self) -> WindowSampling:
        """Windows over the whole history: every interaction is a target, the newest up to twice."""
        return WindowSampling(
            length=self.config.length + 1, stride=self.config.length, every_target=True
        )

    @property
    def history(self) -> int:
        """Most items of a history that are read."""
        return self.config.length

    def encode_items(self, features: ItemFeatures) -> Tensor:
        """Encode the whole catalogue: (N, D), with ``cosine`` each of length 1."""
        longest = max([1, *(tokens.longest for tokens in features.tokens.values())])
        device = next(self.parameters()).device
        item_N = torch.arange(features.n_items, device=device)
        size = len(item_N) if torch.is_grad_enabled() else max(1, _TOKENS_AT_ONCE // longest)
        found = [self._items(item_K, features)[0] for item_K in item_N.split(size)]
        return self._scored(torch.cat(found))

    def encode_sequences(
        self, item_vectors_ND: Tensor, sequences: Sequences, features: ItemFeatures
    ) -> Tensor:
        """The state at each history's last item: (B, D)."""
        state_BLD = self._states(sequences.items_BL, sequences.lengths_B, item_vectors_ND)
        return self._scored(last_state(state_BLD, sequences))

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """The sum of the objectives that are switched on, and each of them (Eq. 12)."""
        config, windows = self.config, batch.sequences
        valid_BL = windows.mask_BL
        # What stands beyond a sequence's end becomes one of the batch's items: it is not encoded.
        items_BL = torch.where(valid_BL, windows.items_BL, windows.items_BL[0, 0])
        item_K, place_BL = items_BL.unique(return_inverse=True)
        vector_KD, modalities = self._items(item_K, batch.features)
        vector_KD = self._scored(vector_KD)
        predicts_BL = valid_BL[:, 1:]
        begin = rank_offset(len(item_K), item_K.device)
        at = Positions(
            item_C=gather_ids(item_K),
            count_C=gather_ids(torch.bincount(place_BL[valid_BL], minlength=len(item_K))),
            anchor_M=begin + place_BL[:, :-1][predicts_BL],
            next_M=begin + place_BL[:, 1:][predicts_BL],
            own_UJ=own_items(batch),
            owner_M=predicts_BL.nonzero()[:, 0],
        )
        place_BL, lengths_B = place_BL[:, :-1], (windows.lengths_B - 1).clamp_min(1)
        losses: dict[str, Tensor] = {}
        if config.dap or config.rcl:
            state_BLD = self._states(place_BL, lengths_B, vector_KD)
        if config.dap:
            popularity_N = log_popularity(batch.train.counts_N) if config.debias else None
            losses["dap"] = dap(
                self._scored(state_BLD[predicts_BL]),
                gather_rows(vector_KD),
                at,
                scale=1 / config.temperature,
                log_popularity_C=None if popularity_N is None else popularity_N[at.item_C],
            )
        if config.align != "none":
            losses[config.align] = align(
                config.align,
                [(gather_rows(x_KD), gather_ids(there_K)) for x_KD, there_K in modalities],
                at,
                scale=1 / config.align_temperature,
                literal=config.align_literal,
            )
        if config.nid or config.rcl:
            noisy_BL, fate_BL = corrupt(
                place_BL,
                lengths_B,
                batch.generator,
                shuffle=config.shuffle,
                replace=config.replace,
            )
            noisy_BLD = self._states(noisy_BL, lengths_B, vector_KD)
        if config.nid:
            logits_M3 = self.nid(noisy_BLD[predicts_BL])
            losses["nid"] = nid(logits_M3, fate_BL[predicts_BL], relu=config.nid_relu)
        if config.rcl:
            losses["rcl"] = rcl(
                self._sequence(state_BLD, lengths_B),
                self._sequence(noisy_BLD, lengths_B),
                batch.users_B,
                scale=1 / config.rcl_temperature,
            )
        return total(losses)

    def _items(
        self, item_K: Tensor, features: ItemFeatures
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        found: tuple[Tensor, list[tuple[Tensor, Tensor]]] = self.item_tower(
            item_tokens(item_K, features, self.backbones)
        )
        return found

    def _scored(self, x_KD: Tensor) -> Tensor:
        return functional.normalize(x_KD, dim=-1) if self.config.cosine else x_KD

    def _sequence(self, state_BLD: Tensor, lengths_B: Tensor) -> Tensor:
        pooled_BD = pool(state_BLD, lengths_B, self.config.rcl_pool)
        return functional.normalize(pooled_BD, dim=-1) if self.config.rcl_cosine else pooled_BD

    def _states(self, place_BL: Tensor, lengths_B: Tensor, vector_KD: Tensor) -> Tensor:
        # Not `vector_KD[...]`: the order in which its backward pass adds is left to the threads.
        x_BLD = functional.embedding(place_BL, vector_KD)
        state_BLD: Tensor = self.user_encoder(x_BLD, lengths_B)
        return state_BLD


class _Items(nn.Module):
    """The item tower: one projection for each modality, under its name, and the fusion."""

    def __init__(self, widths: Mapping[str, int], config: FusionConfig) -> None:
        super().__init__()
        self.names = list(widths)
        for name, width in widths.items():
            self.add_module(name, nn.Linear(width, config.dim))
        self.absent = nn.Parameter(torch.randn(len(widths), config.dim) * 0.02)
        self.fusion = MergeAttention(config, self.names) if len(widths) > 1 else None

    def forward(self, features: Mapping[str, Tokens]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Encode K items: (K, D), and for each modality its own (K, D) and (K,) which have it."""
        tokens, alone = [], []
        for index, name in enumerate(self.names):
            x_KTD, mask_KT = features[name] if self.fusion else averaged(*features[name])
            filled = fill(self.get_submodule(name)(x_KTD), mask_KT, self.absent[index])
            tokens.append(filled)
            alone.append((masked_mean(*filled), mask_KT.any(1)))
        if self.fusion is None:
            return alone[0][0], alone
        fused_KD: Tensor = self.fusion(tokens)
        return fused_KD, alone
