"""What training reads: flat sequences and feature matrices on one device, gathered, never looped.

Legend: I interactions, J distinct training pairs of user and item, U users, N items, W windows of
an epoch, B batch, L longest sequence of the batch, D_m width of modality m.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from features.dataset import Dataset, EvalSplit, Ints
from trainer.data.token_features import TokenFeatures
from trainer.data.windows import WindowSampling, cut_batches, cut_windows


@dataclass(frozen=True, kw_only=True, slots=True)
class ItemFeatures:
    """The catalogue as the item tower sees it; no modality at all for a model of ids."""

    n_items: int
    vectors: Mapping[str, Tensor]
    """Modality -> (N, D_m) float32; the row of an absent item is zero."""
    present: Mapping[str, Tensor]
    """Modality -> (N,) bool; its keys are all modalities, in the order in which models stack them.
    """
    tokens: Mapping[str, TokenFeatures] = field(default_factory=dict)
    """Modality -> its token table, in place of vectors; of these only some models can learn."""

    @property
    def widths(self) -> dict[str, int]:
        """Modality -> D_m, of a vector or of a token."""
        vectors = {name: vectors.shape[1] for name, vectors in self.vectors.items()}
        widths = vectors | {name: tokens.width for name, tokens in self.tokens.items()}
        return {name: widths[name] for name in self.present}

    def coverage(self) -> tuple[dict[str, int], int]:
        """How many items have each modality, and how many have none at all."""
        counts = {name: int(there_N.sum()) for name, there_N in self.present.items()}
        if not counts:
            return counts, self.n_items
        any_N = torch.stack(list(self.present.values())).any(0)
        return counts, self.n_items - int(any_N.sum())


@dataclass(frozen=True, kw_only=True, slots=True)
class Sequences:
    """A batch of sequences, oldest item first, padded on the right."""

    items_BL: Tensor
    """(B, L) int64; what stands beyond a sequence's length means nothing."""
    lengths_B: Tensor
    """(B,) int64, at least 1."""

    @property
    def mask_BL(self) -> Tensor:
        """(B, L) bool: true where there is an item."""
        columns_L = torch.arange(self.items_BL.shape[1], device=self.items_BL.device)
        return columns_L < self.lengths_B[:, None]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSet:
    """The training interactions as a set: all that a loss may know beyond its batch."""

    counts_N: Tensor
    """(N,) int64, training interactions of each item."""
    keys_J: Tensor
    """(J,) int64, ascending: user * N + item of each pair that occurs in training."""

    def seen(self, users: Tensor, items: Tensor) -> Tensor:
        """Whether each user has each item in training; both int64, broadcast against each other."""
        keys = users * len(self.counts_N) + items
        at = torch.searchsorted(self.keys_J, keys).clamp_max(len(self.keys_J) - 1)
        return self.keys_J[at] == keys


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """What one call of a recommender's ``loss`` sees."""

    users_B: Tensor
    """(B,) int64, whose sequences these are; a user may stand in several rows."""
    sequences: Sequences
    features: ItemFeatures
    train: TrainSet
    generator: torch.Generator
    """On the CPU; a function of seed, epoch, step and process, so that a resumed run draws the
    same, and two processes draw different things."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """Which rows of each batch a process takes: every ``ranks``-th, from ``rank`` on."""

    rank: int = 0
    ranks: int = 1


class TrainingData:
    """Sequences and features of one dataset on one device."""

    def __init__(self, dataset: Dataset, features: ItemFeatures, device: torch.device) -> None:
        self.dataset = dataset
        self.features = features
        self.device = device
        self.train = TrainSet(
            counts_N=torch.from_numpy(dataset.train_counts).to(device),
            keys_J=torch.from_numpy(_train_keys(dataset)).to(device),
        )
        self._flat_I = torch.from_numpy(dataset.items).to(device)

    def epoch(
        self,
        sampling: WindowSampling,
        *,
        batch_size: int,
        seed: int,
        epoch: int,
        skip: int = 0,
        share: Share = Share(),
    ) -> tuple[int, Iterator[Batch]]:
        """The batches of one epoch, a function of (seed, epoch) alone.

        Args:
            sampling: How to cut the histories; only training interactions are ever cut.
            batch_size: Windows to a batch.
            seed: The run's seed.
            epoch: Number of the epoch, from 0.
            skip: Batches at the beginning that a resumed run has had already.
            share: Which rows of each batch; every process draws the same batches.

        Returns:
            The number of batches, the skipped ones included, and the batches after these.
        """
        rng = np.random.default_rng([seed, epoch])
        starts, lengths = cut_windows(
            self.dataset.offsets[:-1], self.dataset.train_ends(), sampling, rng
        )
        batches = cut_batches(lengths, batch_size, rng, least=share.ranks)

        def generate() -> Iterator[Batch]:
            for step in range(skip, len(batches)):
                chosen = batches[step][share.rank :: share.ranks]
                users = np.searchsorted(self.dataset.offsets, starts[chosen], side="right") - 1
                yield Batch(
                    users_B=torch.from_numpy(users).to(self.device, non_blocking=True),
                    sequences=self.gather(starts[chosen], lengths[chosen]),
                    features=self.features,
                    train=self.train,
                    generator=torch.Generator().manual_seed(
                        seed_of(seed, epoch, step, *([share.rank] if share.rank else []))
                    ),
                )

        return len(batches), generate()

    def gather(self, starts: Ints, lengths: Ints) -> Sequences:
        """Gather the sequences at flat positions ``starts`` with ``lengths`` into one batch."""
        starts_B = torch.from_numpy(starts).to(self.device, non_blocking=True)
        lengths_B = torch.from_numpy(lengths).to(self.device, non_blocking=True)
        columns_L = torch.arange(int(lengths.max()), device=self.device)
        # Beyond a sequence's end stand the next user's items: repeat its own last item instead.
        index_BL = starts_B[:, None] + torch.minimum(columns_L, lengths_B[:, None] - 1)
        return Sequences(items_BL=self._flat_I[index_BL].long(), lengths_B=lengths_B)

    def histories(
        self, held: EvalSplit, *, length: int, batch_size: int
    ) -> Iterator[tuple[npt.NDArray[np.int64], Sequences]]:
        """The inputs of evaluated users: their last ``length`` items before the target.

        Yields:
            Which rows of ``held`` (B,), and their sequences; rows of similar length together.
        """
        lengths = np.minimum(held.targets - held.starts, length)
        order = np.argsort(lengths, kind="stable")
        for begin in range(0, len(order), batch_size):
            rows = order[begin : begin + batch_size]
            yield rows, self.gather(held.targets[rows] - lengths[rows], lengths[rows])


def _train_keys(dataset: Dataset) -> Ints:
    lengths = dataset.train_ends() - dataset.offsets[:-1]
    users = np.repeat(np.arange(len(lengths)), lengths)
    first = np.repeat(dataset.offsets[:-1] - (np.cumsum(lengths) - lengths), lengths)
    items = dataset.items[first + np.arange(len(users))]
    return np.unique(users * len(dataset.train_counts) + items)


def seed_of(*parts: int) -> int:
    """One seed made of several numbers, all of which count."""
    state = np.random.SeedSequence(parts).generate_state(1, np.uint64)[0]
    return int(state >> np.uint64(1))
