"""What each process of test_distributed does; run by ``python -m``, and by the test itself."""

import importlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from features.errors import UserError
from tests.trainer import worlds
from trainer.config import TrainConfig
from trainer.data.batches import Batch, Shard, TrainSet
from trainer.data.negative_sampling import ItemSampler
from trainer.distributed import (
    gather_rows,
    global_mean_rows,
    on_all_ranks,
    process_group,
    process_rank,
    rank_offset,
    world_size,
)
from trainer.evaluation.ranking import RankShare
from trainer.evaluation.transition_prior import TransitionPrior
from trainer.loop import TrainProgress, fit
from trainer.losses import bce
from trainer.models.base import Catalogue
from trainer.models.mmsrec import MMSRec, MMSRecConfig
from trainer.tasks.alignment import AlignConfig, Alignment
from trainer.tasks.next_item import NextItem

N = 12
SMALL: dict[str, Any] = {"dim": 8, "heads": 2, "hidden": 16, "length": 5, "dropout": 0.0}
# Without masks and dropout nothing is drawn: what is left depends on the rows alone.
SETTINGS: dict[str, dict[str, Any]] = {
    "sasrec": {},
    "sasrec-mixed": {"loss": "in-batch", "negatives": 6, "debias_target": False},
    # At length 5 an epoch has a last batch of one window, which two processes join to another.
    "mmsrec": {"mask_ratio": 0, "embed_dropout": 0, "length": 4},
    "mmsrec-next": {"embed_dropout": 0, "objective": "next", "ids": True},
    "mmsr": {"fusion_heads": 2, "sequence_encoder": "gru"},
    "idsr": {"loss": "bce"},
    "vqrec-contrast": {"objective": "contrast", "synthetic": 0, "codes": 4, "code_bits": 2},
    "tedrec": {"adaptor_dropout": 0, "experts": 1},  # the gate of one expert is 1 with any noise
    "unisrec-contrast": {
        "objective": "contrast", "adaptor_dropout": 0, "experts": 1, "drop": 0,
        "sequence_weight": 1,
    },
    "pmmrec": {
        "fusion_heads": 2, "align": "nicl", "nid": True, "rcl": True, "shuffle": 0, "replace": 0,
    },
}  # fmt: skip
SHARED = ("mmsrec", "mmsrec with a prior", "carca", "ease", "itemknn", "popularity")
LOOP: dict[str, Any] = {"epochs": 2, "batch_size": 15, "device": "cpu"}


def unseen(train: TrainSet, users_M: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A negative that depends on the user alone, of whom every third has none."""
    return (users_M * 5) % N, users_M % 3 > 0


def draw(
    sampler: ItemSampler, train: TrainSet, count: int, generator: torch.Generator
) -> torch.Tensor:
    """The same items of all processes together, however many processes there are."""
    return torch.arange(count) + count * process_rank()


def next_item(name: str) -> Callable[[Path], dict[str, Tensor]]:
    """Train a recommender; one process takes all rows of a batch, two take half each."""

    def train(folder: Path) -> dict[str, Tensor]:
        features = worlds.features(N)
        # The first process's weights are everybody's.
        settings = SMALL | SETTINGS[name]
        if "negatives" in settings:
            settings["negatives"] //= world_size()
        model = worlds.build(name.partition("-")[0], features, seed=process_rank(), **settings)
        task = NextItem(model, worlds.training_data(worlds.cycles(n_items=N), features))
        mine = folder / (name if process_rank() == 0 else f"{name}-of-{process_rank()}")
        if process_rank() == 0:
            mine.mkdir()
        with (
            mock.patch.object(bce, "sample_unseen", unseen),
            mock.patch.object(ItemSampler, "draw", draw),
        ):
            ended = fit(
                task,
                TrainConfig(**LOOP),
                mine,
                {},
                on_epoch=lambda row: None,
                on_progress=lambda tick: None,
            )
        figures = torch.tensor([ended.best, float(ended.best_epoch), float(ended.steps)])
        return {**model.state_dict(), "progress": figures}

    return train


def aligned(folder: Path) -> dict[str, Tensor]:
    """Align modalities: every process's items are negatives of every other's."""
    features = worlds.features(40)
    torch.manual_seed(process_rank())
    catalogue = Catalogue(n_items=40, n_users=1, widths=features.widths)
    model = MMSRec(MMSRecConfig(**SMALL | SETTINGS["mmsrec"]), catalogue)
    place = np.arange(40) % 5
    splits = {"validation": place == 0, "test": place == 1}
    task = Alignment(model, features, splits, AlignConfig())
    config = TrainConfig(**{**LOOP, "monitor": "MRR"})
    mine = folder / f"aligned-{process_rank()}"
    mine.mkdir()
    fit(task, config, mine, {}, on_epoch=lambda row: None, on_progress=lambda tick: None)
    return model.state_dict()


def torn(folder: Path) -> dict[str, Tensor]:
    """Whether a training with dropout and masks ends where the interrupted one does."""
    features = worlds.features(N)
    ended = []
    for interrupt_at, resume in ((0, False), (3, False), (0, True)):
        torch.manual_seed(0)
        catalogue = Catalogue(n_items=N, n_users=1, widths=features.widths)
        model = MMSRec(MMSRecConfig(**{**SMALL, "dropout": 0.3}), catalogue)
        mine = folder / ("torn" if interrupt_at or resume else "whole")
        mine.mkdir(exist_ok=True)

        def on_progress(tick: TrainProgress, at: int = interrupt_at) -> None:
            if tick.step == at:
                signal.raise_signal(signal.SIGINT)

        task = NextItem(model, worlds.training_data(worlds.cycles(n_items=N), features))
        config = TrainConfig(**LOOP)
        fit(
            task,
            config,
            mine,
            {},
            resume=resume,
            on_epoch=lambda row: None,
            on_progress=on_progress,
        )
        if world_size() > 1:
            torch.distributed.barrier()  # the first one has saved
        ended.append(model.state_dict())
    whole, stopped, resumed = ended
    same = [all(torch.equal(whole[key], other[key]) for key in whole) for other in ended]
    assert any(not torch.equal(whole[key], stopped[key]) for key in whole)
    assert whole.keys() == resumed.keys()
    return {"same": torch.tensor([same[0], same[2]]).float()}


def gathered(folder: Path) -> dict[str, Tensor]:
    """A loss over all rows of both processes: its value and the gradient of a shared weight."""
    x_MD = torch.arange(10.0).view(5, 2).div(10)
    mine = x_MD if world_size() == 1 else (x_MD[:2], x_MD[2:])[process_rank()]
    weight = torch.eye(2).add(0.1).requires_grad_()
    local = mine @ weight
    everyone = gather_rows(local)
    begin = rank_offset(len(mine))
    assert torch.equal(everyone[begin : begin + len(mine)], local)
    scores = local @ everyone.T
    loss = scores.logsumexp(1).sum() / global_mean_rows(len(mine))
    loss.backward()
    assert weight.grad is not None
    values = torch.cat([loss.detach()[None], weight.grad.flatten()])
    if world_size() > 1:
        torch.distributed.all_reduce(values)
    return {"values": values / world_size()}


def shared(folder: Path) -> dict[str, Tensor]:
    """The metrics of validations in which processes share the users, and how many of them."""
    features, values = worlds.features(N), {}
    data = worlds.training_data(worlds.cycles(n_items=N), features)
    shard = Shard(process_rank=process_rank(), world_size=world_size())
    with pytest.MonkeyPatch.context() as patch:
        for module in ("ranking", "search"):
            patch.setattr(f"trainer.evaluation.{module}.SCORED_TOGETHER", 4)
        patch.setattr("trainer.evaluation.search._USERS_PER_BLOCK", 3)
        for name in SHARED:
            task = NextItem(worlds.build(name.split()[0], features), data)
            task.model.fit_buffers(features, data.train)
            if name.endswith("prior"):
                task.model.prior = TransitionPrior.of(
                    data, weight=1.0, eps=0.01, bias=-2.0, scale=task.model.settings.scale
                )
            for users in (60, 13, 5, 1):  # 15, 4, 2 and 1 batches of 4 users
                config = TrainConfig(monitor_users=users, eval_batch=4, device="cpu")

                def join(
                    shares: list[RankShare], task: NextItem = task, config: TrainConfig = config
                ) -> Tensor:
                    metrics = task.join_measures(config, shares).metrics.values()
                    return torch.tensor([*map(len_of, shares), *metrics], dtype=torch.float64)

                measure = partial(task.measure, config, shard)
                values[f"{name}-{users}"] = on_all_ranks(measure, join)
    return values


def len_of(share: RankShare) -> int:
    """The number of users of a process."""
    return len(share.rows)


class Killed(NextItem):
    """A task whose training kills one of the processes in the middle of a step of epoch 2."""

    victim = -1  # process number; -1: none
    _steps_left = 0

    def epoch(
        self, config: TrainConfig, epoch: int, *, skip: int, shard: Shard
    ) -> tuple[int, Iterator[Batch]]:
        """Return the batches of an epoch."""
        self._steps_left = 2 if epoch == 1 else 0
        return super().epoch(config, epoch, skip=skip, shard=shard)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return the loss."""
        self._steps_left -= 1
        if self._steps_left == 0 and process_rank() == self.victim:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().loss(batch)


def train_killed(folder: Path, name: str, *, victim: int = -1, resume: bool = False) -> None:
    """Train with dropout and masks, and write the weights if no process is killed."""
    features = worlds.features(N)
    catalogue = Catalogue(n_items=N, n_users=1, widths=features.widths)
    torch.manual_seed(0)
    model = MMSRec(MMSRecConfig(**{**SMALL, "dropout": 0.3}), catalogue)
    task = Killed(model, worlds.training_data(worlds.cycles(n_items=N), features))
    task.victim = victim
    (folder / name).mkdir(exist_ok=True)
    fit(
        task,
        TrainConfig(**LOOP),
        folder / name,
        {},
        resume=resume,
        on_epoch=lambda row: None,
        on_progress=lambda tick: None,
    )
    state = {key: value.detach().contiguous() for key, value in model.state_dict().items()}
    mode = "resumed" if resume else "whole"
    save_file(state, folder / f"{mode}-{process_rank()}.safetensors")


CASES: dict[str, Callable[[Path], dict[str, Tensor]]] = {
    "sasrec": next_item("sasrec"),
    "sasrec-mixed": next_item("sasrec-mixed"),
    "mmsrec": next_item("mmsrec"),
    "mmsrec-next": next_item("mmsrec-next"),
    "mmsr": next_item("mmsr"),
    "idsr": next_item("idsr"),
    "vqrec-contrast": next_item("vqrec-contrast"),
    "tedrec": next_item("tedrec"),
    "unisrec-contrast": next_item("unisrec-contrast"),
    "pmmrec": next_item("pmmrec"),
    "aligned": aligned,
    "torn": torn,
    "gathered": gathered,
    "shared": shared,
}


def main(folder: Path, mode: str) -> None:
    """Run all cases, or resume the killed training; at the end, a process is killed."""
    if mode == "cases":
        for case, run in CASES.items():
            tensors = {key: value.detach().contiguous() for key, value in run(folder).items()}
            save_file(tensors, folder / f"{case}-{process_rank()}.safetensors")
        train_killed(folder, "not-killed")
        train_killed(folder, "killed", victim=1)
    else:
        train_killed(folder, "killed", resume=True)
        train_killed(folder, "killed-again", victim=0)


def fork() -> None:
    """Return in two new processes; in this one, wait for them and print their exit codes.

    The imports, which take most of the time, are done once.
    """
    importlib.import_module("torch._dynamo")  # the optimizer imports it
    children = []
    for rank in "01":
        children.append(os.fork())
        if children[-1] == 0:
            os.environ.update(RANK=rank, LOCAL_RANK=rank)
            return
    print(*(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
    sys.exit()


if __name__ == "__main__":
    if "RANK" not in os.environ:  # not started by torchrun
        fork()
    exit_code = 0
    try:
        with process_group():
            main(Path(sys.argv[1]), sys.argv[2])
    except UserError as error:
        print(error, file=sys.stderr, flush=True)
        exit_code = error.exit_code
    # gloo's threads sometimes abort the process while the interpreter shuts down.
    os._exit(exit_code)
