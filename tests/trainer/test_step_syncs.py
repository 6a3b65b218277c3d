"""A training step never waits for its device.

The steps run on torch's ``meta`` device, whose tensors have shapes and no values. What needs a
value there raises an error: ``item``, ``tolist``, ``bool``, ``numpy``, ``cpu``, and operators whose
shapes depend on values, such as ``nonzero``, ``unique`` and an index by a mask. A dispatch mode
adds what the meta device does not check: where an index is, and how a tensor of the host is copied.
"""

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.optim import AdamW
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.marks import heavy_after
from tests.trainer import worlds
from trainer import loop, optimizer, step_losses
from trainer.checkpoint import TrainState
from trainer.config import TrainConfig
from trainer.data.batches import Batch, ItemFeatures, TrainingData
from trainer.loop import fit
from trainer.models.base import Catalogue
from trainer.models.registry import MODELS
from trainer.models.sasrec import SASRec
from trainer.optimizer import Optimizer
from trainer.step_losses import StepLosses
from trainer.tasks.alignment import AlignConfig, Alignment
from trainer.tasks.base import Validation
from trainer.tasks.next_item import NextItem

N = 12
MANY = 100_003
META = torch.device("meta")
VALIDATION = Validation(metrics={}, users=1, monitored=0.0, shown={})
CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in worlds.trained_models()),
    *(("sasrec", {"loss": loss}) for loss in ("in-batch", "bce", "bpr", "top1-max")),
    ("sasrec", {"loss": "in-batch", "exclude": "window"}),
    ("sasrec", {"loss": "in-batch", "negatives": 4, "negatives_power": 0.5}),
    ("sasrec", {"loss": "bpr-max", "negatives": 4, "negatives_power": 0.5}),
    ("sasrec", {"candidates": 4}),
    ("sasrec", {"rows": "prefixes", "score": "cosine"}),
    ("mmsrec", {"candidates": 4, "ids": True}),
    ("mmsrec", {"loss": "in-batch", "missing": "mask"}),
    ("mmsrec", {"objective": "next", "loss": "bce"}),
    ("bert4rec", {"loss": "in-batch"}),
    ("carca", {"rows": "prefixes"}),
    ("duorec", {"rows": "prefixes"}),
    ("fmrlrec", {"loss": "bce"}),
    ("mmsr", {"loss": "bce", "fusion": "co-attention"}),
    ("mmsr", {"sequence_encoder": "gru", "fusion": "film", "dnn": True}),
    ("pmmrec", {"align": "nicl", "nid": True, "rcl": True}),
    ("pmmrec", {"align": "vcl", "dap": False}),
    ("unisrec", {"objective": "contrast"}),
    ("vqrec", {"objective": "contrast"}),
]


class Copies(TorchDispatchMode):
    """Raises an error for an operator that reads two devices, or a copy that waits."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        on_host = [x for x in tensors if x.device.type == "cpu" and x.dim()]
        on_device = [x for x in tensors if x.device.type == "meta"]
        name = func._schema.name
        if name == "aten::_to_copy" and on_host and kwargs.get("device") == META:
            assert kwargs.get("non_blocking"), "a copy to the device waits"
        elif name == "aten::copy_" and on_host and on_device:
            assert kwargs.get("non_blocking") or args[2:] == (True,), "a copy to the device waits"
        else:
            assert not (on_host and on_device), f"{name} reads tensors of the host and the device"
        return func(*args, **kwargs)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Replace what reads or saves results; return the steps after which losses are read."""
    steps: list[int] = []

    def read(self: StepLosses) -> None:
        if self._unread:
            steps.append(self._state.step)
            assert {values.device for values in self._unread} == {META}
            self._unread.clear()

    monkeypatch.setattr(StepLosses, "read", read)
    monkeypatch.setattr(step_losses, "_SECONDS_BETWEEN_READS", math.inf)
    monkeypatch.setattr(NextItem, "measure", lambda *args: None)
    monkeypatch.setattr(NextItem, "join_measures", lambda *args: VALIDATION)
    monkeypatch.setattr(loop, "save_state", lambda *args: None)
    monkeypatch.setattr(loop, "save_weights", lambda *args: None)
    # The meta device has no fused optimizer and no autocast.
    monkeypatch.setattr(optimizer, "AdamW", lambda groups, fused: AdamW(groups))
    for name in ("is_autocast_enabled", "get_autocast_dtype"):
        real = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda device, real=real: real("cpu"))
    autocast = torch.autocast
    monkeypatch.setattr(
        torch, "autocast", lambda device, *args, **options: autocast("cpu", *args, **options)
    )
    return steps


def features_on_device(features: ItemFeatures) -> ItemFeatures:
    copies = ItemFeatures(
        n_items=features.n_items,
        vectors={name: x.to(META) for name, x in features.vectors.items()},
        present={name: x.to(META) for name, x in features.present.items()},
        attributes={name: x.to(META) for name, x in features.attributes.items()},
    )
    vars(copies)["present_on_host"] = features.present  # a training reads it once
    return copies


@pytest.mark.parametrize("name", ["mmsr", "pmmrec", "morec"])
def test_tables_of_tokens_are_the_exception(name: str, tmp_path: Path, reads: list[int]) -> None:
    """The tokens of a batch are read from disk by item number: the step waits for the numbers."""
    features = worlds.token_features(N)
    model = worlds.build(name, features).to(META)
    tokens = {key: replace(table, device=META) for key, table in features.tokens.items()}
    on_device = replace(features_on_device(features), tokens=tokens)
    data = TrainingData(worlds.cycles(n_items=N), on_device, META)
    batch = next(data.epoch(model.window_sampling, batch_size=16, seed=0, epoch=0)[1])
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        model.loss(batch)


def train(name: str, folder: Path, *, has_more: bool = False, **settings: Any) -> None:
    """Train an epoch on the meta device by ``fit``.

    Args:
        name: Name of the model.
        folder: Folder of the run.
        has_more: Whether the items have attributes and the interactions times.
        **settings: Settings of the model.
    """
    features, world = worlds.features(N), worlds.cycles(n_items=N)
    if has_more:
        genres = torch.arange(N)[:, None] % torch.tensor([2, 3])
        features = replace(features, attributes={"genre": genres})
        world = replace(world, times=np.arange(len(world.items)) * 100_000)
    catalogue = Catalogue(
        n_items=N, n_users=worlds.USERS, widths=features.widths,
        n_attributes=3 * has_more, time_unit="s" if has_more else None,
    )  # fmt: skip
    model = MODELS.find(name).load()(worlds.small_settings(name, **settings), catalogue).to(META)
    data = TrainingData(world, features_on_device(features), META)
    size = 128 if settings.get("rows") == "prefixes" else 24  # an epoch has a few steps
    config = TrainConfig(epochs=1, batch_size=size, device="cpu")
    with Copies():  # type: ignore[no-untyped-call]
        state = fit(
            NextItem(model, data), config, folder, {},
            on_epoch=lambda row: None, on_progress=lambda progress: None,
        )  # fmt: skip
    assert state.steps > 2


@pytest.mark.parametrize(("name", "settings"), CASES, ids=str)
def test_a_step_reads_nothing_back(
    name: str, settings: dict[str, Any], tmp_path: Path, reads: list[int]
) -> None:
    train(name, tmp_path, **settings)
    assert reads[0] == 1


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("s3rec", {"objective": "pretrain", "attributes": "genre"}),
        ("fdsa", {"fields": "both", "attributes": "genre"}),
        ("carca", {}),
        ("carca", {"rows": "prefixes"}),
    ],
    ids=str,
)
def test_a_step_with_attributes_and_times_reads_nothing_back(
    name: str, settings: dict[str, Any], tmp_path: Path, reads: list[int]
) -> None:
    train(name, tmp_path, has_more=True, **settings)


@pytest.mark.parametrize(
    "settings", heavy_after(1, [{"ids": True}, {"missing": "mask"}, {}]), ids=str
)
@pytest.mark.parametrize("duplicates", ["mask", "keep"])
def test_a_step_of_the_alignment_reads_nothing_back(
    settings: dict[str, Any], duplicates: str, tmp_path: Path, reads: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    features = worlds.features(2 * N)
    model = worlds.build("mmsrec", features, **settings)
    splits = {
        name: np.arange(2 * N) % 6 == number + 2
        for number, name in enumerate(("validation", "test"))
    }
    task = Alignment(model, features, splits, AlignConfig(duplicates=duplicates))
    monkeypatch.setattr(Alignment, "measure", lambda *args: None)
    monkeypatch.setattr(Alignment, "join_measures", lambda *args: VALIDATION)
    model.to(META)
    task.features = features_on_device(features)
    task._present = {side: x.to(META) for side, x in task._present.items()}
    task._labels = {side: x.to(META) for side, x in task._labels.items()}
    config = TrainConfig(epochs=1, batch_size=4, device="cpu")
    with Copies():  # type: ignore[no-untyped-call]
        state = fit(
            task, config, tmp_path, {},
            on_epoch=lambda row: None, on_progress=lambda progress: None,
        )  # fmt: skip
    assert state.steps >= 2


SAMPLED = [
    *((name, {"candidates": 8, "loss": "softmax"}) for name in worlds.models_with("candidates")),
    *((name, settings) for name, settings in CASES if settings.get("loss", "softmax") != "softmax"),
    ("carca", {}),
    ("carca", {"rows": "prefixes"}),
    ("mmsrec", {"candidates": 8, "ids": True}),
    ("gru4rec", {"candidates": 8, "tied": False}),
    ("duorec", {"candidates": 8, "score": "cosine"}),
    ("pmmrec", {"align": "nicl", "nid": True, "rcl": True}),
    ("unisrec", {"objective": "contrast", "ids": True}),
    ("vqrec", {"objective": "contrast"}),
]
# The bias of each item is one number: the gradient of all biases is one vector.
WHOLE_TABLES = {"bert4rec": {"embedding_dense_backward": 1}}


class Catalogues(TorchDispatchMode):
    """Counts the operators whose result has a row for each item of the catalogue."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func.is_view:
            return output
        for x in tree_leaves(output):
            if isinstance(x, Tensor) and not x.is_sparse and MANY in x.shape:
                self.counts[func._schema.name.partition("::")[2]] += 1
        return output


@pytest.mark.parametrize(("name", "settings"), SAMPLED, ids=str)
def test_a_step_computes_nothing_for_the_other_items(
    name: str, settings: dict[str, Any], reads: list[int]
) -> None:
    """Without a loss over the catalogue, loss and gradients have no row for each item."""
    few = worlds.features(4)
    features = ItemFeatures(
        n_items=MANY,
        vectors={key: torch.empty(MANY, x.shape[1], device=META) for key, x in few.vectors.items()},
        present={key: torch.empty(MANY, dtype=torch.bool, device=META) for key in few.present},
    )
    vars(features)["present_on_host"] = {
        key: torch.ones(MANY, dtype=torch.bool) for key in few.present
    }
    with META:
        model = worlds.build(name, features, **settings)
    model = model.to(META).train()
    world = replace(worlds.cycles(n_items=N), train_counts=np.zeros(MANY, np.int64))
    data = TrainingData(world, features, META)
    rows = Optimizer(model, TrainConfig(item_updates="rows"))
    _, batches = data.epoch(model.window_sampling, batch_size=16, seed=0, epoch=0)
    model.loss(next(batches))  # computes the popularity of items once
    batch = next(batches)
    rows.prepare(TrainState(), 4)
    with Catalogues() as catalogues:
        model.loss(batch)["loss"].backward()
    assert catalogues.counts == WHOLE_TABLES.get(name, {})


WAITS: dict[str, Any] = {
    "item": lambda x: x.sum().item(),
    "tolist": lambda x: x.tolist(),
    "bool": lambda x: bool((x > 0).any()),
    "cpu": lambda x: x.cpu(),
    "numpy": lambda x: x.detach().numpy(),
    "nonzero": lambda x: x.nonzero(),
    "unique": lambda x: x.unique(),
    "mask": lambda x: x[x > 0],
    "masked_select": lambda x: x.masked_select(x > 0),
    "repeat_interleave": lambda x: x.repeat_interleave(torch.ones(N, dtype=torch.int64)),
    "counts of repeat_interleave": lambda x: x[:, 0].repeat_interleave(x[:, 0].long()),
    "bincount": lambda x: x[:, 0].long().bincount(),
    "index of the host": lambda x: x[torch.zeros(2, dtype=torch.int64)],
    "copy": lambda x: torch.ones(2).to(x.device),
    "copy into": lambda x: torch.empty(2, device=x.device).copy_(torch.ones(2)),
}


@pytest.mark.parametrize("wait", WAITS)
def test_a_step_that_waits_is_refused(
    wait: str, tmp_path: Path, reads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = SASRec.loss

    def loss(self: SASRec, batch: Batch) -> dict[str, Tensor]:
        WAITS[wait](self.item_encoder.weight)
        return real(self, batch)

    monkeypatch.setattr(SASRec, "loss", loss)
    with pytest.raises((RuntimeError, TypeError, AssertionError)):
        train("sasrec", tmp_path)


def test_losses_are_read_every_twenty_steps(tmp_path: Path, reads: list[int]) -> None:
    model = worlds.build("sasrec", worlds.features(N)).to(META)
    data = TrainingData(worlds.cycles(n_items=N), features_on_device(worlds.features(N)), META)
    config = TrainConfig(epochs=1, batch_size=3, device="cpu")
    fit(
        NextItem(model, data), config, tmp_path, {},
        on_epoch=lambda row: None, on_progress=lambda progress: None,
    )  # fmt: skip
    assert reads == [1, 21, 24]
