"""MMSRec's pre-training (arXiv:2304.13277, section 3.2): align the modalities of items.

The loss (Eq. 5) is the weighted sum of four contrastive losses (Eq. 6, both directions summed)
between two encodings of the same items: (v, v'), (t, t'), (v, t) and (vt, vt'). Here v is the item
encoded from its images or videos, t from its text, vt from both, and the prime is a second pass
with other dropout masks. An item that has only vision or only text takes part in one term.

Differences from the paper and the released code:

- In both, a copy of an item (the same image or title under another id) is a negative of the item.
  Here it is not, unless ``duplicates="keep"``.
- The negatives are the items of all processes. In the released code they are the 6,000 items of one
  GPU.

Legend: K items of a batch, M items of a term, N items of the catalogue, D width.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Protocol, Self, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from features.dataset import Ints
from features.errors import UserError
from features.warehouse import Warehouse
from trainer.config import Choice, NonNegativeFloat, Range, Settings, TrainConfig
from trainer.data.batches import ItemFeatures, Shard, TrainingData
from trainer.data.device_copy import to_device
from trainer.data.multi_dataset import item_splits
from trainer.distributed import gather_ids, gather_rows, global_mean_rows, rank_offset, world_size
from trainer.evaluation.cross_modal import Sides, copies, recalls, retrieve
from trainer.losses.clip import in_batch_symmetric
from trainer.losses.in_batch import Columns, in_batch
from trainer.models.base import Recommender
from trainer.tasks.base import Task, Validation

_LARGEST_LOG_SCALE = math.log(100)  # the bound of CLIP


@dataclass(frozen=True, kw_only=True)
class AlignConfig(Settings):
    """Settings of the alignment. The weights are those of the paper."""

    weight_vv: NonNegativeFloat = 0.25
    """Weight of the term (v, v')."""
    weight_tt: NonNegativeFloat = 0.25
    """Weight of the term (t, t')."""
    weight_vt: NonNegativeFloat = 0.25
    """Weight of the term (v, t)."""
    weight_joint: NonNegativeFloat = 0.25
    """Weight of the term (vt, vt')."""
    duplicates: Annotated[str, Choice("duplicates", ("mask", "keep"))] = "mask"
    """``mask``: items with equal vectors are not negatives of each other; ``keep``: they are
    negatives, as published."""
    learn_temperature: bool = False
    """Learn the divisor of the cosines, from ``temperature`` on; it stays at least 0.01."""
    holdout: Annotated[
        float,
        Range(0, 0.5, "above 0 and below 0.5: two such shares are held out", includes_low=False),
    ] = 0.1
    """Share of the items to validate on, and of the items to test on. Training uses neither. A hash
    of the ids chooses the items, so they are the same in each run."""

    def check(self) -> None:
        """Raise a UserError if all weights are 0."""
        if self.weight_vv + self.weight_tt + self.weight_vt + self.weight_joint == 0:
            raise UserError("all four weights are 0, so nothing can be learned; set one above 0")


@runtime_checkable
class Aligned(Protocol):
    """A recommender that can encode an item from some of its modalities."""

    @property
    def temperature(self) -> float:
        """Divisor of the cosines."""

    @property
    def unaligned(self) -> tuple[str, ...]:
        """Names of the parameters that ``encode_views`` does not read; they are not trained."""

    def encode_views(
        self, items_K: Tensor, views: Sequence[tuple[Sequence[str], Tensor]], features: ItemFeatures
    ) -> list[Tensor]:
        """Encode items; see :func:`trainer.modules.item_views.encode_views`."""


class Alignment(Task[Tensor]):
    """Train on batches of items; validate by retrieving held-out items across modalities.

    Args:
        model: A recommender that is :class:`Aligned`.
        features: Features of the whole catalogue.
        splits: (N,) bool for each of ``validation`` and ``test``, true for the items of the split.
            Training uses no item of a split. Items with the same image and video are in the split
            of the first of them.
        config: Settings.
        hidden: Number of items at the end of the catalogue that take no part.

    Raises:
        UserError: There is no text or no vision, or too few items have both.
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
        """Create the task. A hash of the item ids chooses the held-out items."""
        splits = item_splits(warehouse, datasets, settings.holdout)
        hidden = data.dataset.info.hidden_items
        return cls(model, data.features, splits, settings, hidden=hidden)

    def __init__(
        self,
        model: Recommender,
        features: ItemFeatures,
        splits: Mapping[str, npt.NDArray[np.bool_]],
        config: AlignConfig,
        *,
        hidden: int = 0,
    ) -> None:
        super().__init__(model)
        assert isinstance(model, Aligned)
        self.aligned: Aligned = model
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in model.unaligned)
        self.log_scale: nn.Parameter | None = None
        """Learned logarithm of 1 / temperature, a parameter of the model."""
        if config.learn_temperature:
            start = next(model.parameters()).new_tensor(-math.log(model.temperature))
            self.log_scale = nn.Parameter(start)
            model.register_parameter("alignment_log_scale", self.log_scale)
        self.features = features
        self.config = config
        self.sides = Sides.of(features)
        shown_N = torch.arange(features.n_items) < features.n_items - hidden
        vision_N, text_N = (has_N & shown_N.to(has_N) for has_N in self.sides.present(features))
        self._present = {"v": vision_N, "t": text_N, "vt": vision_N & text_N}
        self._present_on_host = {side: has_N.cpu() for side, has_N in self._present.items()}
        self._names = {
            "v": self.sides.vision,
            "t": self.sides.text,
            "vt": tuple(features.present),
        }
        labels = self._copies()
        # An image and its copies, such as the captions of one image, are in one split.
        item_N = torch.arange(features.n_items, device=vision_N.device)
        first_N = torch.where(vision_N, labels["v"], item_N)
        in_split = {
            name: torch.from_numpy(is_held_N).to(vision_N.device)[first_N]
            for name, is_held_N in splits.items()
        }
        is_training_N = ~torch.stack(list(in_split.values())).any(0)
        self._is_training_N = is_training_N
        self.pools = {
            name: (self._present["vt"] & is_held_N).nonzero()[:, 0]
            for name, is_held_N in in_split.items()
        }
        """Split to its items (K,) that have vision and text."""
        self._training_items = ((vision_N | text_N) & is_training_N).nonzero()[:, 0].cpu().numpy()
        self.training_pairs = (self._present["vt"] & is_training_N).nonzero()[:, 0]
        counts = {name: len(pool_K) for name, pool_K in self.pools.items()}
        counts = {"training": len(self.training_pairs), **counts}
        if min(counts.values()) < 2:
            listed = ", ".join(f"{count} for {name}" for name, count in counts.items())
            raise UserError(
                f"too few items have text and vision ({listed}); extract more, or set holdout"
                f" (it is {config.holdout})"
            )
        self._labels = labels if config.duplicates == "mask" else {}

    def features_to_fit(self, features: ItemFeatures) -> ItemFeatures:
        """Return the features of the items that are not held out."""
        present = {name: has_N & self._is_training_N for name, has_N in features.present.items()}
        return replace(features, present=present)

    def epoch(
        self, config: TrainConfig, epoch: int, *, skip: int, shard: Shard
    ) -> tuple[int, Iterator[Tensor]]:
        """Return all training items, shuffled, in batches of nearly equal size, on the CPU."""
        order = np.random.default_rng([config.seed, epoch]).permutation(self._training_items)
        batches = np.array_split(order, -(-len(order) // config.batch_size))
        remaining = (
            torch.from_numpy(batch[shard.process_rank :: shard.world_size])
            for batch in batches[skip:]
        )
        return len(batches), remaining

    def size(self, batch: Tensor) -> int:
        """Return the number of items."""
        return len(batch)

    def loss(self, batch: Tensor) -> dict[str, Tensor]:
        """Return the loss of Eq. 5, and its terms by name.

        Args:
            batch: (K,) int64 items, best on the CPU: which modalities they have is read there.
        """
        device, host_K = self._present["vt"].device, batch.cpu()
        host_rows = {
            side: has_N[host_K].nonzero()[:, 0] for side, has_N in self._present_on_host.items()
        }
        both_v, both_t = (
            to_device(self._present_on_host["vt"][host_K[host_rows[side]]].nonzero()[:, 0], device)
            for side in ("v", "t")
        )
        batch = to_device(host_K, device)
        rows = {side: to_device(row_M, device) for side, row_M in host_rows.items()}
        views = [(self._names[side], rows[side]) for side in ("v", "v", "t", "t", "vt", "vt")]
        v, v2, t, t2, vt, vt2 = self.aligned.encode_views(batch, views, self.features)
        config = self.config
        terms = {
            "v-v": (config.weight_vv, "v", v, v2),
            "t-t": (config.weight_tt, "t", t, t2),
            "v-t": (config.weight_vt, "either", v[both_v], t[both_t]),
            "vt-vt": (config.weight_joint, "vt", vt, vt2),
        }
        items = {"v": batch[rows["v"]], "t": batch[rows["t"]], "vt": batch[rows["vt"]]}
        scale: float | Tensor = 1 / self.aligned.temperature
        if self.log_scale is not None:
            scale = self.log_scale.clamp_max(_LARGEST_LOG_SCALE).exp()
        losses: dict[str, Tensor] = {}
        total = v.new_zeros(())
        for name, (weight, label, x_MD, y_MD) in terms.items():
            item_M = items[label] if label in items else items["vt"]
            label_M = self._labels[label][item_M] if self._labels else None
            losses[name] = contrast(x_MD, y_MD, scale, label_M)
            total = total + weight * losses[name]
        return {"loss": total, **{name: value.detach() for name, value in losses.items()}}

    def split(self, config: TrainConfig) -> str:
        """Return the number of held-out items and the directions of retrieval."""
        pool_K = self.pools["validation"]
        return f"validation: {len(pool_K):,} held-out items, text to vision and back"

    def measure(self, config: TrainConfig, shard: Shard) -> dict[str, Ints] | None:
        """Rank the validation items from text to vision and back, all of them in process 0."""
        if shard.process_rank:
            return None
        return retrieve(self.model, self.features, self.pools["validation"])

    def join_measures(
        self, config: TrainConfig, measures: Sequence[dict[str, Ints] | None]
    ) -> Validation:
        """Return the metrics of both directions; monitor their mean."""
        ranks = measures[0]
        assert ranks is not None
        metrics = {
            (direction, metric): float(values.mean())
            for direction, ranks_K in ranks.items()
            for metric, values in recalls(ranks_K).items()
        }
        known = dict.fromkeys(metric for _, metric in metrics)
        if config.monitor not in known:
            raise UserError(
                f"monitor={config.monitor!r} is not a retrieval metric; known: {', '.join(known)}"
            )
        means = {
            metric: sum(metrics[direction, metric] for direction in ranks) / len(ranks)
            for metric in known
        }
        return Validation(
            metrics=metrics,
            users=len(self.pools["validation"]),
            monitored=means[config.monitor],
            shown={name: means[name] for name in ("Recall@1", "Recall@10")},
        )

    def _copies(self) -> dict[str, Tensor]:
        """Return (N,) int64 labels for each term. Items that are copies have equal labels."""
        labels = {side: copies(self.features, names) for side, names in self._names.items()}
        # Term (v, t): items are copies if they share an image or a title, or both are copies of a
        # third item.
        group_N = torch.arange(self.features.n_items, device=self._present["vt"].device)
        both_N = self._present["vt"]
        while True:
            before_N = group_N
            for side in ("v", "t"):
                label_N = labels[side]
                least = torch.full_like(group_N, self.features.n_items)
                least.scatter_reduce_(0, label_N[both_N], group_N[both_N], "amin")
                group_N = torch.where(both_N, least[label_N], group_N)
            if torch.equal(group_N, before_N):
                return {**labels, "either": group_N}


def contrast(x_MD: Tensor, y_MD: Tensor, scale: float | Tensor, label_M: Tensor | None) -> Tensor:
    """Return the loss of Eq. 6, x to y plus y to x, with the items of all processes as negatives.

    Args:
        x_MD: (M, D), of unit length.
        y_MD: (M, D), of unit length; row m is the same item as in ``x_MD``.
        scale: 1 / temperature; a tensor gets a gradient.
        label_M: (M,) int64; rows with equal labels are not negatives of each other.
    """
    are_units = not isinstance(scale, Tensor)
    if isinstance(scale, Tensor):  # the losses take a number, which has no gradient
        x_MD, scale = x_MD * scale.to(x_MD.dtype), 1.0
    if world_size() == 1:
        return 2 * in_batch_symmetric(x_MD, y_MD, scale=scale, label_B=label_M, are_units=are_units)
    rows, device = len(x_MD), x_MD.device
    begin, mean = rank_offset(rows), global_mean_rows(rows) or 1.0
    label_C = None if label_M is None else gather_ids(label_M)
    positive_M = torch.arange(begin, begin + rows, device=device)
    both = [
        in_batch(query, gather_rows(key), positive_M, scale=scale, columns=Columns(label_C=label_C))
        for query, key in ((x_MD, y_MD), (y_MD, x_MD))
    ]
    return (both[0] + both[1]) * (rows / mean)
