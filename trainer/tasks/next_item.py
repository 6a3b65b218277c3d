"""The task of ``mmrec train``: predict the next item from windows of training histories."""

from collections.abc import Iterator, Sequence
from typing import Any, Self

import numpy as np
from torch import Tensor

from features.dataset import Dataset, EvalSplit
from features.errors import UserError
from features.splits import MIN_EVALUATED
from features.warehouse import Warehouse
from retrieval.metrics import per_user
from trainer.config import TrainConfig
from trainer.data.batches import Batch, Shard, TrainingData
from trainer.evaluation.encode import targets_of
from trainer.evaluation.ranking import RankShare, join_shares, rank_split, share_of_users
from trainer.models.base import Recommender
from trainer.tasks.base import Task, Validation

_SAMPLE_SEED = 0  # of the users that early stopping validates on


class NextItem(Task[Batch]):
    """Train on windows of the histories; validate by the rank of each user's held-out item.

    The task is also the pre-training of models that add objectives on histories, such as PMMRec.
    """

    unit = "windows"

    def __init__(self, model: Recommender, data: TrainingData) -> None:
        super().__init__(model)
        self.data = data

    @classmethod
    def build(
        cls,
        model: Recommender,
        data: TrainingData,
        warehouse: Warehouse,
        datasets: Sequence[str],
        settings: Any,
    ) -> Self:
        """Create the task; see :meth:`trainer.tasks.base.Task.build`."""
        check_trainable(data.dataset)
        return cls(model, data)

    def epoch(
        self, config: TrainConfig, epoch: int, *, skip: int, shard: Shard
    ) -> tuple[int, Iterator[Batch]]:
        """Return batches of windows, cut as the model's ``window_sampling`` states."""
        return self.data.epoch(
            self.model.window_sampling,
            batch_size=config.batch_size,
            seed=config.seed,
            epoch=epoch,
            skip=skip,
            shard=shard,
        )

    def size(self, batch: Batch) -> int:
        """Return the number of windows."""
        return len(batch.sequences.lengths_B)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return the losses of the model."""
        return self.model.loss(batch)

    def split(self, config: TrainConfig) -> str:
        """Return ``validation`` and the monitored ranking: seen items filtered or kept."""
        return f"validation, {config.monitor_seen}"

    def measure(self, config: TrainConfig, shard: Shard) -> RankShare:
        """Rank the validation targets of a share of the users, seen items filtered and kept.

        The targets are ranked in the full catalogue. Of more than ``monitor_users`` users, a sample
        is ranked: the same one in every epoch and in every run on the dataset.
        """
        users, batch_size = validation_users(self.data.dataset, config), config.eval_batch
        return RankShare.of(
            users,
            share_of_users(self.model, users, batch_size, shard),
            lambda part: rank_split(self.model, self.data, "validation", batch_size, users=part),
        )

    def join_measures(self, config: TrainConfig, measures: Sequence[RankShare]) -> Validation:
        """Return the metrics of all users."""
        users = validation_users(self.data.dataset, config)
        split_ranks = join_shares(users, targets_of(self.data.dataset, users), measures)
        metrics = {
            (seen, name): float(values.mean())
            for seen, ranks in (
                ("kept", split_ranks.ranks.kept),
                ("filtered", split_ranks.ranks.filtered),
            )
            for name, values in per_user(ranks).items()
        }
        return Validation(
            metrics=metrics,
            users=len(split_ranks.users.users),
            monitored=metrics[config.monitor_seen, config.metric],
            shown={name: metrics[config.monitor_seen, name] for name in ("HR@10", "NDCG@10")},
        )


def validation_users(dataset: Dataset, config: TrainConfig) -> EvalSplit:
    """Return the users of the validation, or the sample of ``monitor_users`` of them."""
    users = dataset.eval_split("validation")
    return users.sample(config.monitor_users, _SAMPLE_SEED) if config.monitor_users else users


def check_trainable(dataset: Dataset, *, hold_out_cold: bool = False) -> None:
    """Raise a UserError if a dataset has too few interactions to learn from or to evaluate.

    Args:
        dataset: The dataset.
        hold_out_cold: Whether interactions with cold items are no training interactions.
    """
    about = f"dataset {dataset.info.name!r}"
    if not len(dataset.eval_split("validation").users):
        raise UserError(
            f"{about}: no user has {MIN_EVALUATED} interactions, so nothing can be validated or"
            " tested; prepare it with more"
        )
    positions = dataset.train_positions(hold_out_cold=hold_out_cold)
    if not (np.diff(np.searchsorted(positions, dataset.offsets)) >= 2).any():
        without, remedy = "", "prepare it with more"
        if hold_out_cold:
            without, remedy = " without cold items", "leave hold_out_cold=true out"
        raise UserError(
            f"{about}: no user has two training interactions{without}, so nothing can be learned;"
            f" {remedy}"
        )
