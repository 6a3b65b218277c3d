"""Training batches, gathered from flat interactions on the host and copied to one device.

Legend: I interactions, T training interactions, J distinct training pairs of user and item, U
users, N items, W windows of an epoch, B batch, L longest sequence of the batch, D_m width of
modality m.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from features.dataset import Dataset, EvalSplit, Ints
from features.errors import UserError
from retrieval.seen_items import SeenItems
from trainer.data.device_copy import DeviceCopy, to_device
from trainer.data.token_features import TokenFeatures
from trainer.data.windows import WindowSampling, cut_batches, cut_windows


@dataclass(frozen=True, kw_only=True)
class ItemFeatures:
    """The features of the catalogue; without modalities for a model of ids alone."""

    n_items: int
    vectors: Mapping[str, Tensor]
    """Modality -> (N, D_m) float16 or float32, as the table stores them; the row of an absent item
    is zero. :meth:`rows` reads them."""
    present: Mapping[str, Tensor]
    """Modality -> (N,) bool, true where an item has the modality. The keys are all modalities, in
    the order in which models stack them."""
    tokens: Mapping[str, TokenFeatures] = field(default_factory=dict)
    """Modality -> its token table, in place of vectors; only some models read tokens."""
    attributes: Mapping[str, Tensor] = field(default_factory=dict)
    """Column of the items -> (N, P) int64 attributes of each item, padded with -1; only some models
    read attributes."""

    @cached_property
    def present_on_host(self) -> dict[str, Tensor]:
        """``present`` on the CPU."""
        return {name: present_N.cpu() for name, present_N in self.present.items()}

    @property
    def widths(self) -> dict[str, int]:
        """Modality -> D_m, the width of a vector or of a token."""
        vectors = {name: vectors.shape[1] for name, vectors in self.vectors.items()}
        widths = vectors | {name: tokens.width for name, tokens in self.tokens.items()}
        return {name: widths[name] for name in self.present}

    def rows(self, modality: str, items: Tensor) -> Tensor:
        """Return the vectors of items: (..., D_m), float16 converted to float32.

        Args:
            modality: Name of a modality with vectors.
            items: (...) int64 item ids.
        """
        vectors = self.vectors[modality][items]
        return vectors.to(torch.promote_types(vectors.dtype, torch.float32))

    def coverage(self) -> tuple[dict[str, int], int]:
        """Return the number of items with each modality, and the number of items without any."""
        counts = {name: int(present_N.sum()) for name, present_N in self.present.items()}
        if not counts:
            return counts, self.n_items
        any_N = torch.stack(list(self.present.values())).any(0)
        return counts, self.n_items - int(any_N.sum())


@dataclass(frozen=True, kw_only=True, slots=True)
class Sequences(DeviceCopy):
    """A batch of sequences, oldest item first, padded on the right."""

    items_BL: Tensor
    """(B, L) int64; slots beyond the length of a sequence are padding of any value."""
    lengths_B: Tensor
    """(B,) int64, at least 1."""
    users_B: Tensor | None = None
    """(B,) int64, the users; -1 for a user who is not in the dataset; ``None`` if unknown."""
    times_BL: Tensor | None = None
    """(B, L) int64, the times of the items in the unit of the raw files; ``None`` if unknown. Only
    models with ``reads_times`` get times."""
    request_B: Tensor | None = None
    """(B,) int64, the time at which the next item is asked for, such as that of the held-out
    interaction; ``None`` if unknown."""

    @property
    def mask_BL(self) -> Tensor:
        """(B, L) bool, true where a slot holds an item."""
        columns_L = torch.arange(self.items_BL.shape[1], device=self.items_BL.device)
        return columns_L < self.lengths_B[:, None]


@dataclass(frozen=True, kw_only=True)
class TrainSet(DeviceCopy):
    """The set of training interactions: the only data outside of its batch that a loss may read."""

    counts_N: Tensor
    """(N,) int64, number of training interactions of each item."""
    keys_J: Tensor
    """(J,) int64, ascending: user * N + item for each pair that occurs in training."""
    histories: SeenItems = field(default_factory=SeenItems.empty)
    """The training interactions of each user, oldest item first; for models that count them."""
    hidden: int = 0
    """Number of items at the end of the catalogue that are no negatives: hidden items, see
    :attr:`features.warehouse.DatasetInfo.hidden_items`."""

    @property
    def n_items(self) -> int:
        """Number of items that a loss may read or draw: the first ones of the catalogue."""
        return len(self.counts_N) - self.hidden

    @cached_property
    def log_popularity_N(self) -> Tensor:
        """The result of :func:`log_popularity`, computed once."""
        return log_popularity(self.counts_N)

    def seen(self, users: Tensor, items: Tensor) -> Tensor:
        """Return whether each user has each item in training; int64 tensors that broadcast."""
        keys = users * len(self.counts_N) + items
        at = torch.searchsorted(self.keys_J, keys).clamp_max(len(self.keys_J) - 1)
        return self.keys_J[at] == keys


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """The input of a recommender's ``loss``."""

    users_B: Tensor
    """(B,) int64, the user of each sequence; a user can occur in several rows."""
    sequences: Sequences
    features: ItemFeatures
    train: TrainSet
    generator: torch.Generator
    """On the CPU, seeded by the run's seed, epoch, step and process: a resumed run draws the same
    numbers, and two processes draw different ones."""
    ends_B: Ints | None = None
    """(B,) position in ``train.histories.items`` one past the last item of each sequence; ``None``
    if the sequences are no windows of these histories."""

    @property
    def device(self) -> torch.device:
        """Device of the tensors."""
        return self.users_B.device

    @property
    def users_on_host(self) -> Tensor:
        """(B,) ``users_B`` on the CPU."""
        users_B = self.sequences.on_host.users_B
        return self.users_B.cpu() if users_B is None else users_B

    def distinct_items(self, drawn_X: Tensor | None = None) -> Tensor:
        """Return the distinct items of the batch and of drawn items: (K,) int64, ascending.

        Args:
            drawn_X: (X,) int64, on the CPU.
        """
        windows = self.sequences.on_host
        ids = windows.items_BL[windows.mask_BL]
        if drawn_X is not None:
            ids = torch.cat([ids, drawn_X])
        return to_device(ids.unique(), self.device)


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """The rows of each batch that belong to a process: every ``world_size``-th row."""

    process_rank: int = 0
    """The first of these rows."""
    world_size: int = 1
    """Number of processes."""


class TrainingData:
    """The sequences and features of one dataset on one device.

    Args:
        dataset: The interactions.
        features: The features of its items.
        device: Device of the tensors.
        hold_out_cold: Leave the interactions with cold items out of the training interactions.
    """

    def __init__(
        self,
        dataset: Dataset,
        features: ItemFeatures,
        device: torch.device,
        *,
        hold_out_cold: bool = False,
    ) -> None:
        self.dataset = dataset
        self.features = features
        self.device = device
        positions = dataset.train_positions(hold_out_cold=hold_out_cold)
        self.train = _train_set(dataset, positions, device)
        self._train_positions = positions
        self._positions_T = torch.from_numpy(positions)
        self._flat_I = torch.from_numpy(dataset.items)
        times = dataset.times
        self._times_I = None if times is None else torch.from_numpy(times)

    def epoch(
        self,
        sampling: WindowSampling,
        *,
        batch_size: int,
        seed: int,
        epoch: int,
        skip: int = 0,
        shard: Shard = Shard(),
    ) -> tuple[int, Iterator[Batch]]:
        """Return the batches of one epoch, a function of seed and epoch alone.

        Args:
            sampling: How to cut the training histories into windows.
            batch_size: Windows in a batch.
            seed: The run's seed.
            epoch: Number of the epoch, from 0.
            skip: Number of batches at the beginning that a resumed run has already seen.
            shard: The rows of each batch that this process gets. All processes draw equal batches.

        Returns:
            The number of batches of the epoch, and the batches after the skipped ones.
        """
        rng = np.random.default_rng([seed, epoch])
        offsets = self.train.histories.offsets
        starts, lengths = cut_windows(offsets[:-1], offsets[1:], sampling, rng)
        if len(lengths) < shard.world_size:
            raise UserError(
                f"{len(lengths)} windows of dataset {self.dataset.info.name!r} are too few for"
                f" {shard.world_size} processes; start at most {len(lengths)}"
            )
        batches = cut_batches(lengths, batch_size, rng, least=shard.world_size)

        def generate() -> Iterator[Batch]:
            for step in range(skip, len(batches)):
                chosen = batches[step][shard.process_rank :: shard.world_size]
                sequences = self._windows(starts[chosen], lengths[chosen])
                assert sequences.users_B is not None
                yield Batch(
                    users_B=sequences.users_B,
                    sequences=sequences,
                    features=self.features,
                    train=self.train,
                    generator=torch.Generator().manual_seed(
                        combine_seeds(
                            seed, epoch, step, *([shard.process_rank] if shard.process_rank else [])
                        )
                    ),
                    ends_B=starts[chosen] + lengths[chosen],
                )

        return len(batches), generate()

    def _windows(self, starts: Ints, lengths: Ints) -> Sequences:
        """Gather windows that begin at the positions ``starts`` of the training histories."""
        index_BL, lengths_B = self._slots(starts, lengths)
        ends = self._train_positions[starts + lengths - 1] + 1
        return self._sequences(self._positions_T[index_BL], lengths_B, ends)

    def gather(self, starts: Ints, lengths: Ints) -> Sequences:
        """Gather the sequences that begin at the flat positions ``starts`` into one batch."""
        index_BL, lengths_B = self._slots(starts, lengths)
        return self._sequences(index_BL, lengths_B, starts + lengths)

    def _slots(self, starts: Ints, lengths: Ints) -> tuple[Tensor, Tensor]:
        """Return the positions (B, L) of sequences, and their lengths (B,), on the CPU."""
        starts_B, lengths_B = torch.from_numpy(starts), torch.from_numpy(lengths)
        columns_L = torch.arange(int(lengths.max()))
        # Slots of padding repeat the last item: the array holds the next user's items there.
        return starts_B[:, None] + torch.minimum(columns_L, lengths_B[:, None] - 1), lengths_B

    def _sequences(self, index_BL: Tensor, lengths_B: Tensor, ends: Ints) -> Sequences:
        """Return the sequences at some flat positions. They are gathered on the host.

        Args:
            index_BL: (B, L) flat positions, on the CPU.
            lengths_B: (B,) lengths, on the CPU.
            ends: (B,) flat position one past the last item of each sequence.
        """
        users = np.searchsorted(self.dataset.offsets, ends - 1, side="right") - 1
        users_B = torch.from_numpy(users)
        items_BL = self._flat_I[index_BL].long()
        if self._times_I is None:
            sequences = Sequences(items_BL=items_BL, lengths_B=lengths_B, users_B=users_B)
            return sequences.to(self.device)
        # The last history of a user has no interaction after it: the newest time is the next best.
        ends = np.minimum(ends, self.dataset.offsets[users + 1] - 1)
        return Sequences(
            items_BL=items_BL,
            lengths_B=lengths_B,
            users_B=users_B,
            times_BL=self._times_I[index_BL],
            request_B=self._times_I[torch.from_numpy(ends)],
        ).to(self.device)

    def histories(
        self, split: EvalSplit, *, length: int, batch_size: int
    ) -> Iterator[tuple[npt.NDArray[np.int64], Sequences]]:
        """Yield the last ``length`` items before the target of each evaluated user.

        Yields:
            Rows of ``split`` (B,) and their sequences, in order of length.
        """
        lengths = np.minimum(split.targets - split.starts, length)
        order = np.argsort(lengths, kind="stable")
        for begin in range(0, len(order), batch_size):
            rows = order[begin : begin + batch_size]
            yield rows, self.history_batch(split, rows, length=length)

    def history_batch(
        self, split: EvalSplit, rows: slice | npt.NDArray[np.int64], *, length: int
    ) -> Sequences:
        """Return the last ``length`` items before the target of some evaluated users.

        Args:
            split: The evaluated users.
            rows: Which of them.
            length: Largest number of items.
        """
        targets = split.targets[rows]
        lengths = np.minimum(targets - split.starts[rows], length)
        return self.gather(targets - lengths, lengths)


def log_popularity(counts_N: Tensor) -> Tensor:
    """Return the log of each item's share of the training interactions: (N,) float32.

    An item without training interactions counts as one with half an interaction.
    """
    return (counts_N.clamp_min(0.5) / counts_N.sum().clamp_min(1)).log()


def _train_set(dataset: Dataset, positions: Ints, device: torch.device) -> TrainSet:
    """Return the training interactions at some flat positions (T,)."""
    n_items = len(dataset.train_counts)
    items = dataset.items[positions].astype(np.int64)
    offsets = np.searchsorted(positions, dataset.offsets)
    users = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    keys = np.sort(users * n_items + items)  # np.unique takes far longer for sorted users
    return TrainSet(
        counts_N=torch.from_numpy(np.bincount(items, minlength=n_items)),
        keys_J=torch.from_numpy(keys[np.diff(keys, prepend=-1) > 0]),
        histories=SeenItems(items=items, offsets=offsets),
        hidden=dataset.info.hidden_items,
    ).to(device)


def combine_seeds(*parts: int) -> int:
    """Return one seed that depends on all of the numbers."""
    state = np.random.SeedSequence(parts).generate_state(1, np.uint64)[0]
    return int(state >> np.uint64(1))
