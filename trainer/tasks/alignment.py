"""MMSRec's pre-training (arXiv:2304.13277, section 3.2): modalities aligned item by item.

Eq. 5: the weighted sum of four contrastive losses (Eq. 6, both directions summed) between encodings
of the same items: (v, v'), (t, t'), (v, t), (vt, vt'), where v is what is seen of an item, t what
is written, vt both, and the prime a second pass with other dropout. An item without one of the two
takes part in the term of the other.

Where code and paper differ from the sound form: they take for a negative of an item also its own
copy, the same picture or title under another id (``duplicates="keep"``; the default leaves copies
out); the released code has the negatives of one GPU's 6,000 items, here those of all processes.

Legend: K items of a batch, M items of a term, N items of the catalogue, D width.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Protocol, Self, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from features.errors import UserError
from features.warehouse import Warehouse
from trainer.config import Choice, NonNegativeFloat, Range, Settings, TrainConfig
from trainer.data.batches import ItemFeatures, Shard, TrainingData
from trainer.data.multi_dataset import item_splits
from trainer.distributed import gather_ids, gather_rows, global_mean_rows, rank_offset, world_size
from trainer.evaluation.cross_modal import Sides, recalls, retrieve
from trainer.losses.clip import in_batch_symmetric
from trainer.losses.in_batch import Columns, in_batch
from trainer.models.base import Recommender
from trainer.tasks.base import Task, Validation


@dataclass(frozen=True, kw_only=True)
class AlignConfig(Settings):
    """Settings of the alignment; weights and temperature are the paper's."""

    weight_vv: NonNegativeFloat = 0.25
    """Weight of the term (v, v')."""
    weight_tt: NonNegativeFloat = 0.25
    """Weight of the term (t, t')."""
    weight_vt: NonNegativeFloat = 0.25
    """Weight of the term (v, t)."""
    weight_joint: NonNegativeFloat = 0.25
    """Weight of the term (vt, vt')."""
    duplicates: Annotated[str, Choice("duplicates", ("mask", "keep"))] = "mask"
    """``mask``: items with the same vectors are no negatives of each other; ``keep``: they are
    negatives, as published."""
    holdout: Annotated[
        float,
        Range(0, 0.5, "above 0 and below 0.5: two such shares are held out", includes_low=False),
    ] = 0.05
    """Share of the items to validate on, and as many to test on, that training never sees: the
    same items in each run, chosen by a hash of their ids."""

    def check(self) -> None:
        """Check that at least one term counts."""
        if self.weight_vv + self.weight_tt + self.weight_vt + self.weight_joint == 0:
            raise UserError("all four weights are 0, so nothing can be learned; set one above 0")


@runtime_checkable
class Aligned(Protocol):
    """A recommender whose item tower can encode an item from some of its modalities."""

    @property
    def temperature(self) -> float:
        """Divides the cosines."""

    @property
    def unaligned(self) -> tuple[str, ...]:
        """Parameters that ``encode_views`` never reads: they stay as they were drawn."""

    def encode_views(
        self, items_K: Tensor, views: Sequence[tuple[Sequence[str], Tensor]], features: ItemFeatures
    ) -> list[Tensor]:
        """See :meth:`trainer.models.mmsrec.MMSRec.encode_views`."""


class Alignment(Task[Tensor]):
    """Batches of items; validation retrieves held-out items across modalities.

    Args:
        model: With ``encode_views``.
        features: Of the whole catalogue.
        splits: (N,) bool each, the items of ``validation`` and ``test``; training sees neither.
        config: Settings.

    Raises:
        UserError: There are not both text and vision, or too few items with both.
    """

    unit = "items"
    settings_class = AlignConfig

    @classmethod
    def build(
        cls,
        model: Recommender,
        data: TrainingData,
        warehouse: Warehouse,
        datasets: Sequence[str],
        settings: Any,
    ) -> Self:
        """Create the task; the held-out items are chosen by a hash of their ids."""
        splits = item_splits(warehouse, datasets, settings.holdout)
        return cls(model, data.features, splits, settings)

    def __init__(
        self,
        model: Recommender,
        features: ItemFeatures,
        splits: Mapping[str, npt.NDArray[np.bool_]],
        config: AlignConfig,
    ) -> None:
        super().__init__(model)
        assert isinstance(model, Aligned)
        self.tower: Aligned = model
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in model.unaligned)
        self.features = features
        self.config = config
        self.sides = Sides.of(features)
        seen_N, written_N = self.sides.present(features)
        self._there = {"v": seen_N, "t": written_N, "vt": seen_N & written_N}
        self._names = {
            "v": self.sides.vision,
            "t": self.sides.text,
            "vt": tuple(features.present),
        }
        held = {name: torch.from_numpy(at_N).to(seen_N.device) for name, at_N in splits.items()}
        left_N = ~torch.stack(list(held.values())).any(0)
        copies = self._copies()
        learned = copies["vt"][self._there["vt"] & left_N]
        new_N = self._there["vt"] & ~torch.isin(copies["vt"], learned)
        self.pools = {name: (new_N & at_N).nonzero()[:, 0] for name, at_N in held.items()}
        """(K,) the items of each split that have both sides, and are no copies of learned ones."""
        self._known = ((seen_N | written_N) & left_N).nonzero()[:, 0].cpu().numpy()
        counts = {name: len(pool_K) for name, pool_K in self.pools.items()}
        counts = {"training": int((self._there["vt"] & left_N).sum()), **counts}
        if min(counts.values()) < 2:
            found = ", ".join(f"{count} for {name}" for name, count in counts.items())
            raise UserError(
                f"too few items have text and vision ({found}); extract more, or set holdout"
                f" (it is {config.holdout})"
            )
        self._labels = copies if config.duplicates == "mask" else {}

    def epoch(
        self, config: TrainConfig, epoch: int, *, skip: int, shard: Shard
    ) -> tuple[int, Iterator[Tensor]]:
        """All items that are not held out, shuffled, in batches of nearly one size."""
        order = np.random.default_rng([config.seed, epoch]).permutation(self._known)
        batches = np.array_split(order, -(-len(order) // config.batch_size))
        device = self._there["vt"].device
        left = (
            torch.from_numpy(batch[shard.process_rank :: shard.world_size]).to(device)
            for batch in batches[skip:]
        )
        return len(batches), left

    def size(self, batch: Tensor) -> int:
        """Items."""
        return len(batch)

    def loss(self, batch: Tensor) -> dict[str, Tensor]:
        """Eq. 5; each term by its name."""
        rows = {side: there_N[batch].nonzero()[:, 0] for side, there_N in self._there.items()}
        views = [(self._names[side], rows[side]) for side in ("v", "v", "t", "t", "vt", "vt")]
        v, v2, t, t2, vt, vt2 = self.tower.encode_views(batch, views, self.features)
        both_v, both_t = (self._there["vt"][batch[rows[side]]] for side in ("v", "t"))
        config = self.config
        terms = {
            "v-v": (config.weight_vv, "v", v, v2),
            "t-t": (config.weight_tt, "t", t, t2),
            "v-t": (config.weight_vt, "either", v[both_v], t[both_t]),
            "vt-vt": (config.weight_joint, "vt", vt, vt2),
        }
        items = {"v": batch[rows["v"]], "t": batch[rows["t"]], "vt": batch[rows["vt"]]}
        losses: dict[str, Tensor] = {}
        total = v.new_zeros(())
        for name, (weight, label, x_MD, y_MD) in terms.items():
            item_M = items[label] if label in items else items["vt"]
            label_M = self._labels[label][item_M] if self._labels else None
            losses[name] = contrast(x_MD, y_MD, 1 / self.tower.temperature, label_M)
            total = total + weight * losses[name]
        return {"loss": total, **{name: value.detach() for name, value in losses.items()}}

    def split(self, config: TrainConfig) -> str:
        """The held-out items."""
        pool_K = self.pools["validation"]
        return f"validation: {len(pool_K):,} held-out items, text to vision and back"

    def validate(self, config: TrainConfig) -> Validation:
        """Text to vision and back among the items of validation; monitored is their mean."""
        pool_K = self.pools["validation"]
        found = retrieve(self.model, self.features, pool_K)
        metrics = {
            (direction, metric): float(values.mean())
            for direction, ranks_K in found.items()
            for metric, values in recalls(ranks_K).items()
        }
        known = dict.fromkeys(metric for _, metric in metrics)
        if config.monitor not in known:
            raise UserError(
                f"monitor={config.monitor!r} is no metric of retrieval; known: {', '.join(known)}"
            )
        means = {
            metric: sum(metrics[direction, metric] for direction in found) / len(found)
            for metric in known
        }
        return Validation(
            metrics=metrics,
            users=len(pool_K),
            monitored=means[config.monitor],
            shown={name: means[name] for name in ("Recall@1", "Recall@10")},
        )

    def _copies(self) -> dict[str, Tensor]:
        """For each term, (N,) labels: equal where two items are the same to it."""
        hashes = {name: _hash_rows(x_ND) for name, x_ND in self.features.vectors.items()}
        found = {}
        for side, names in self._names.items():
            stacked = torch.stack([hashes[name] for name in names], dim=1)
            found[side] = stacked.unique(dim=0, return_inverse=True)[1]
        # (v, t): two items that share a picture, or a title, and so on through third ones.
        group_N = torch.arange(self.features.n_items, device=self._there["vt"].device)
        both_N = self._there["vt"]
        while True:
            before_N = group_N
            for side in ("v", "t"):
                label_N = found[side]
                least = torch.full_like(group_N, self.features.n_items)
                least.scatter_reduce_(0, label_N[both_N], group_N[both_N], "amin")
                group_N = torch.where(both_N, least[label_N], group_N)
            if torch.equal(group_N, before_N):
                return {**found, "either": group_N}


def contrast(x_MD: Tensor, y_MD: Tensor, scale: float, label_M: Tensor | None) -> Tensor:
    """Eq. 6: x to y and y to x, summed, with the negatives of all processes.

    Args:
        x_MD: (M, D), of unit length.
        y_MD: (M, D), row by row of the same items.
        scale: 1 / temperature.
        label_M: (M,) int64; rows with equal labels are no negatives of each other.
    """
    if world_size() == 1:
        return 2 * in_batch_symmetric(x_MD, y_MD, scale=scale, label_B=label_M)
    rows, device = len(x_MD), x_MD.device
    begin, mean = rank_offset(rows, device), global_mean_rows(rows, device) or 1.0
    label_C = None if label_M is None else gather_ids(label_M)
    positive_M = torch.arange(begin, begin + rows, device=device)
    both = [
        in_batch(query, gather_rows(key), positive_M, scale=scale, columns=Columns(label_C=label_C))
        for query, key in ((x_MD, y_MD), (y_MD, x_MD))
    ]
    return (both[0] + both[1]) * (rows / mean)


def _hash_rows(x_ND: Tensor) -> Tensor:
    """(N,) int64: equal for equal rows, and by all odds only for them."""
    factors = np.random.default_rng(0).integers(-(2**62), 2**62, x_ND.shape[1])
    factor_D = torch.from_numpy(factors * 2 + 1).to(x_ND.device)
    blocks = x_ND.view(torch.int32).split(2**16)
    return torch.cat([(block.long() * factor_D).sum(1) for block in blocks])
