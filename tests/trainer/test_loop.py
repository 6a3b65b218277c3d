import math
import signal
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor
from torch.optim import AdamW

from features.errors import UserError
from tests.marks import heavy_after
from tests.trainer import worlds
from trainer import interruption, loop
from trainer.checkpoint import TrainState, load_weights
from trainer.config import TrainConfig
from trainer.data.batches import Batch, TrainingData
from trainer.ema import ExponentialMovingAverage
from trainer.loop import EpochRow, TrainProgress, fit
from trainer.models.base import Recommender
from trainer.models.registry import MODELS
from trainer.models.sasrec import SASRec
from trainer.optimizer import scheduled
from trainer.runs.folder import record
from trainer.tasks.next_item import NextItem, check_trainable

N = 12
SMALL: dict[str, Any] = {"dim": 8, "heads": 2, "hidden": 16, "length": 5, "dropout": 0.1}


WholeRun = tuple[TrainState, Recommender, list[EpochRow], bytes]
"""The result of :func:`train`, and the file of the best weights."""


def world(name: str) -> tuple[Recommender, TrainingData]:
    features = worlds.features(N)
    known = {field.name for field in fields(MODELS.find(name).load().settings_class)}
    small = {key: value for key, value in SMALL.items() if key in known}
    return worlds.build(name, features, **small), worlds.training_data(
        worlds.cycles(n_items=N), features
    )


def train(
    name: str,
    folder: Path,
    *,
    resume: bool = False,
    interrupt_at: int | None = None,
    watch: Callable[[TrainProgress], None] = lambda progress: None,
    **settings: Any,
) -> tuple[TrainState, Recommender, list[EpochRow]]:
    model, data = world(name)
    folder.mkdir(exist_ok=True)
    rows: list[EpochRow] = []
    n_reports = 0

    def on_progress(progress: TrainProgress) -> None:
        nonlocal n_reports
        n_reports += 1
        watch(progress)
        if n_reports == interrupt_at:
            signal.raise_signal(signal.SIGINT)

    config = TrainConfig(**{"epochs": 4, "batch_size": 16, "device": "cpu", **settings})
    progress = fit(
        NextItem(model, data),
        config,
        folder,
        {"a": 1},
        resume=resume,
        on_epoch=rows.append,
        on_progress=on_progress,
    )
    return progress, model, rows


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], WholeRun]:
    """Return the function that trains a model to the end, once for the tests of this file."""

    @cache
    def train_once(name: str) -> WholeRun:
        folder = tmp_path_factory.mktemp("whole") / name
        return (*train(name, folder), (folder / "model.safetensors").read_bytes())

    return train_once


@pytest.mark.parametrize("name", worlds.trained_models())
@pytest.mark.parametrize("interrupt_at", heavy_after(1, [7, 1, 11]))
def test_a_resumed_run_ends_where_the_whole_one_does_to_the_bit(
    name: str, interrupt_at: int, tmp_path: Path, whole_runs: Callable[[str], WholeRun]
) -> None:
    whole, model, rows, best = whole_runs(name)
    stopped, _, _ = train(name, tmp_path / "torn", interrupt_at=interrupt_at)
    assert not stopped.finished
    torch.manual_seed(99)  # whatever the process drew before
    resumed, other, resumed_rows = train(name, tmp_path / "torn", resume=True)
    assert resumed == whole
    assert resumed_rows == rows[-len(resumed_rows) :]
    for whole_row, resumed_row in zip(rows[-len(resumed_rows) :], resumed_rows, strict=True):
        assert list(resumed_row.losses) == list(whole_row.losses)
    for (key, mine), theirs in zip(
        model.state_dict().items(), other.state_dict().values(), strict=True
    ):
        assert torch.equal(mine, theirs), key
    assert best == (tmp_path / "torn" / "model.safetensors").read_bytes()


def test_means_are_resumed_to_the_bit(tmp_path: Path) -> None:
    whole, _, _ = train("sasrec", tmp_path / "whole", average=0.9)
    train("sasrec", tmp_path / "torn", average=0.9, interrupt_at=7)
    resumed, _, _ = train("sasrec", tmp_path / "torn", average=0.9, resume=True)
    assert resumed == whole
    best = [(tmp_path / f / "model.safetensors").read_bytes() for f in ("whole", "torn")]
    assert best[0] == best[1]


def test_the_mean_of_the_weights_is_what_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training itself is the same with an average; validated and saved is the mean."""
    after: list[Tensor] = []
    step = AdamW.step

    def spy(self: AdamW, *args: Any) -> Any:
        result = step(self, *args)
        after.append(self.param_groups[0]["params"][0].detach().clone())
        return result

    monkeypatch.setattr(AdamW, "step", spy)
    _, plain, rows = train("sasrec", tmp_path / "plain", epochs=1)
    after.clear()
    _, model, mean_rows = train("sasrec", tmp_path / "mean", epochs=1, average=0.3)
    assert rows[0].losses == mean_rows[0].losses
    assert rows[0].metrics != mean_rows[0].metrics
    assert torch.equal(items(plain), items(model))
    mean = items(world("sasrec")[0]).double()
    for number, weight in enumerate(after, 1):
        kept = min(0.3, (1 + number) / (10 + number))
        mean = kept * mean + (1 - kept) * weight.double()
    load_weights(tmp_path / "mean" / "model.safetensors", model, {"a": 1})
    torch.testing.assert_close(items(model).double(), mean)
    assert not torch.equal(items(plain), items(model))


def items(model: Recommender) -> Tensor:
    weight: Tensor = model.state_dict()["item_encoder.weight"]
    return weight.clone()


def test_one_ctrl_c_that_arrives_twice_is_one_and_a_later_one_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a terminal, torchrun's processes have it from the terminal and from torchrun."""

    def twice(tick: TrainProgress) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    stopped, _, _ = train("sasrec", tmp_path / "once", watch=twice)
    assert (stopped.steps, stopped.finished) == (1, False)
    assert (tmp_path / "once" / "resume.safetensors").exists()
    monkeypatch.setattr(interruption, "_SAME_SECONDS", -1.0)
    with pytest.raises(KeyboardInterrupt):
        train("sasrec", tmp_path / "later", watch=twice)


def _in_forward(patch: pytest.MonkeyPatch, interrupt: Callable[[], None]) -> None:
    real = SASRec.loss

    def loss(self: SASRec, batch: Batch) -> dict[str, Tensor]:
        losses = real(self, batch)  # draws dropout
        interrupt()
        return losses

    patch.setattr(SASRec, "loss", loss)


def _in_backward(patch: pytest.MonkeyPatch, interrupt: Callable[[], None]) -> None:
    real = SASRec.loss

    def loss(self: SASRec, batch: Batch) -> dict[str, Tensor]:
        losses = real(self, batch)
        losses["loss"].register_hook(lambda gradient: interrupt())
        return losses

    patch.setattr(SASRec, "loss", loss)


def _in_batches(patch: pytest.MonkeyPatch, interrupt: Callable[[], None]) -> None:
    real = NextItem.epoch

    def epoch(self: NextItem, *args: Any, **options: Any) -> tuple[int, Iterator[Batch]]:
        total, batches = real(self, *args, **options)

        def interrupted() -> Iterator[Batch]:
            for batch in batches:
                interrupt()
                yield batch

        return total, interrupted()

    patch.setattr(NextItem, "epoch", epoch)


def _after(owner: Any, name: str) -> Callable[[pytest.MonkeyPatch, Callable[[], None]], None]:
    def plant(patch: pytest.MonkeyPatch, interrupt: Callable[[], None]) -> None:
        real = getattr(owner, name)

        def interrupted(*args: Any, **options: Any) -> Any:
            result = real(*args, **options)
            interrupt()
            return result

        patch.setattr(owner, name, interrupted)

    return plant


PLACES = {
    "forward": _in_forward,
    "backward": _in_backward,
    "batches": _in_batches,
    "windows": _after(NextItem, "epoch"),
    "validation": _after(NextItem, "measure"),
    "optimizer": _after(AdamW, "step"),
    "average": _after(ExponentialMovingAverage, "update"),
    "weights": _after(loop, "save_weights"),
    "state": _after(loop, "save_state"),
}
RARE = ("weights", 2)  # the first weights can remain the best
ABANDONED = ("forward", "backward", "batches", "windows", "validation")


@pytest.mark.parametrize(
    ("place", "at"), [(place, at) for place in PLACES for at in (1, 2) if (place, at) != RARE]
)
def test_a_signal_at_any_instant_loses_no_whole_step_and_no_bit(
    place: str, at: int, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"average": 0.9}
    whole, model, _ = train("sasrec", tmp_path / "whole", **settings)
    calls = 0

    def interrupt() -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            signal.raise_signal(signal.SIGTERM)
            if place in ABANDONED:
                raise AssertionError("the work went on")

    with pytest.MonkeyPatch.context() as patch:
        PLACES[place](patch, interrupt)
        stopped, _, _ = train("sasrec", tmp_path / "torn", **settings)
    steps = stopped.steps
    assert calls >= at
    assert not stopped.finished
    assert (tmp_path / "torn" / "resume.safetensors").exists() == (steps > 0)
    assert not list((tmp_path / "torn").glob(".*.tmp"))
    resumed, other, _ = train("sasrec", tmp_path / "torn", resume=steps > 0, **settings)
    assert resumed == whole
    for (key, mine), theirs in zip(
        model.state_dict().items(), other.state_dict().values(), strict=True
    ):
        assert torch.equal(mine, theirs), key
    best = [(tmp_path / f / "model.safetensors").read_bytes() for f in ("whole", "torn")]
    assert best[0] == best[1]


def test_seeds_fix_everything(tmp_path: Path) -> None:
    rows = [train("mmsrec", tmp_path / str(i))[2] for i in range(2)]
    other = train("mmsrec", tmp_path / "other", seed=1)[2]
    assert rows[0] == rows[1]
    assert other != rows[0]


def test_order_is_learned(tmp_path: Path) -> None:
    """In a world where i is followed by i + 1, the id model finds it; popularity cannot."""
    progress, _, rows = train("sasrec", tmp_path / "run", epochs=60, lr=1e-2)
    assert progress.best > 0.95
    assert rows[-1].losses["loss"] < rows[0].losses["loss"] / 2


def test_early_stopping_keeps_the_best(tmp_path: Path) -> None:
    progress, model, rows = train("sasrec", tmp_path / "run", epochs=200, lr=1e-2, patience=2)
    values = [row.metrics["filtered", "HR@10"] for row in rows]
    assert progress.finished
    assert len(rows) < 200
    assert progress.best == max(values)
    assert progress.best_epoch == values.index(max(values)) + 1
    assert len(rows) == progress.best_epoch + 2
    load_weights(tmp_path / "run" / "model.safetensors", model, {"a": 1})


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    _, model, _ = train("sasrec", tmp_path / "run", epochs=1)
    with pytest.raises(UserError, match="a=1, not 2"):
        load_weights(tmp_path / "run" / "model.safetensors", model, {"a": 2})
    with pytest.raises(UserError, match=r"none\.safetensors .*train again"):
        load_weights(tmp_path / "none.safetensors", model, {"a": 1})
    (tmp_path / "bad.safetensors").write_bytes(b"not tensors")
    with pytest.raises(UserError, match="is damaged"):
        load_weights(tmp_path / "bad.safetensors", model, {"a": 1})


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    def loss(self: SASRec, batch: Batch) -> dict[str, Tensor]:
        return {"loss": self.item_encoder.weight.sum() + value}

    monkeypatch.setattr(SASRec, "loss", loss)
    with pytest.raises(UserError, match=f"loss .*{value} .*epoch 1, step 1; .*lower lr"):
        train("sasrec", tmp_path / "run")


@pytest.mark.parametrize("step", [2, 4])
@pytest.mark.parametrize("interrupted", [False, True])
def test_a_loss_that_diverges_between_two_reads_is_named_and_nothing_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, interrupted: bool
) -> None:
    """The four losses of an epoch are read after its first step, and before its validation."""
    real, calls, validated = SASRec.loss, 0, []

    def loss(self: SASRec, batch: Batch) -> dict[str, Tensor]:
        nonlocal calls
        calls += 1
        value = real(self, batch)["loss"]
        return {"loss": value + (math.nan if calls == step else 0.0)}

    monkeypatch.setattr(SASRec, "loss", loss)
    monkeypatch.setattr(NextItem, "measure", lambda *args: validated.append(args))
    with pytest.raises(UserError, match=f"loss .*nan.* epoch 1, step {step};.*lower lr"):
        train("sasrec", tmp_path / "run", interrupt_at=step if interrupted else None)
    assert not validated
    assert not list((tmp_path / "run").iterdir())


def test_weights_that_diverge_in_the_only_step_stop_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loss(self: SASRec, batch: Batch) -> dict[str, Tensor]:
        return {
            "loss": (0 * self.item_encoder.weight).sqrt().sum()
        }  # 0, with a gradient of 0 * infinity

    monkeypatch.setattr(SASRec, "loss", loss)
    with pytest.raises(UserError, match=r"not finite.*lower lr"):
        train("sasrec", tmp_path / "run", batch_size=999, epochs=1)
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_the_rate_by_hand() -> None:
    def rate(config: TrainConfig, epoch: int, step: int) -> float:
        progress = TrainState(epoch=epoch, step=step, steps=2 * epoch + step)
        return scheduled(config.lr, config, progress, 2)

    places = [(0, 0), (0, 1), (1, 0), (1, 1)]  # two epochs of two steps
    constant = TrainConfig(lr=0.8, epochs=2)
    assert [rate(constant, *place) for place in places] == [0.8] * 4
    warm = TrainConfig(lr=0.8, epochs=2, warmup=3)
    assert [rate(warm, *p) for p in places] == pytest.approx([0.8 / 3, 1.6 / 3, 0.8, 0.8])
    # (1 + cos(pi x)) / 2 at x = 0, 1/4, 1/2, 3/4
    fall = [1, (2 + 2**0.5) / 4, 1 / 2, (2 - 2**0.5) / 4]
    cosine = TrainConfig(lr=0.8, epochs=2, schedule="cosine")
    assert [rate(cosine, *p) for p in places] == pytest.approx([0.8 * f for f in fall])
    both = TrainConfig(lr=0.8, epochs=2, schedule="cosine", warmup=2)
    expected = [0.4 * fall[0], 0.8 * fall[1], 0.8 * fall[2], 0.8 * fall[3]]
    assert [rate(both, *p) for p in places] == pytest.approx(expected)
    linear = TrainConfig(lr=0.8, epochs=2, schedule="linear")
    assert [rate(linear, *p) for p in places] == pytest.approx([0.8, 0.6, 0.4, 0.2])
    late = TrainConfig(lr=0.8, epochs=4, schedule="linear", decay_from=2, decay_to=0.1)
    assert [rate(late, e, s) for e, s in ((1, 1), (2, 0), (3, 0))] == [
        0.8,
        0.8,
        pytest.approx(0.44),
    ]
    step = TrainConfig(lr=0.8, epochs=4, schedule="step", decay_from=2, decay=0.5)
    assert [rate(step, e, 1) for e in (0, 1, 2, 3)] == [0.8, 0.8, 0.4, 0.4]
    fading = TrainConfig(lr=0.8, epochs=2, schedule="exponential", decay=0.5)
    assert [rate(fading, *p) for p in places] == pytest.approx([0.8, 0.8, 0.4, 0.4])


def steps_of(
    folder: Path, monkeypatch: pytest.MonkeyPatch, clip: float
) -> list[tuple[float, float]]:
    """The learning rate and the norm of the gradient at each step of a short training."""
    steps: list[tuple[float, float]] = []
    real = torch.optim.AdamW.step

    def step(self: torch.optim.AdamW) -> None:
        (group,) = self.param_groups
        norms = [parameter.grad.norm() for parameter in group["params"]]
        steps.append((group["lr"], float(torch.stack(norms).norm())))
        real(self)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        train("sasrec", folder, epochs=2, clip=clip, warmup=4, lr=1e-3)
    return steps


def test_the_optimizer_steps_at_that_rate_with_clipped_gradients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free, clipped = (steps_of(tmp_path / str(clip), monkeypatch, clip) for clip in (0.0, 1e-3))
    assert [lr for lr, _ in free] == [lr for lr, _ in clipped]
    assert [lr for lr, _ in free][:4] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3])
    assert min(norm for _, norm in free) > 2e-3
    assert [norm for _, norm in clipped] == pytest.approx([1e-3] * len(clipped), rel=1e-3)


def test_groups_have_rates_and_decays_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def groups(self: SASRec, config: TrainConfig) -> list[dict[str, Any]]:
        self.get_parameter("sequence_encoder.position.weight").requires_grad_(False)
        rest = [
            p
            for name, p in self.named_parameters()
            if not name.startswith(("item_encoder", "sequence_encoder.position"))
        ]
        return [
            {"params": [self.item_encoder.weight], "lr": config.lr / 4, "weight_decay": 0.0},
            {"params": rest, "lr": config.lr, "weight_decay": config.weight_decay},
        ]

    rates: list[list[tuple[float, float]]] = []
    real = torch.optim.AdamW.step

    def step(self: torch.optim.AdamW) -> None:
        rates.append([(group["lr"], group["weight_decay"]) for group in self.param_groups])
        real(self)

    monkeypatch.setattr(SASRec, "parameter_groups", groups)
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    _, before, _ = train("sasrec", tmp_path / "whole", epochs=2, warmup=2, lr=1e-3)
    assert rates[0] == [(1.25e-4, 0.0), (5e-4, 0.01)]
    assert rates[-1] == [(2.5e-4, 0.0), (1e-3, 0.01)]
    frozen = "sequence_encoder.position.weight"
    drawn = world("sasrec")[0].state_dict()[frozen]
    assert torch.equal(before.state_dict()[frozen], drawn)
    train("sasrec", tmp_path / "torn", epochs=2, warmup=2, lr=1e-3, interrupt_at=3)
    _, after, _ = train("sasrec", tmp_path / "torn", epochs=2, warmup=2, lr=1e-3, resume=True)
    for key, value in before.state_dict().items():
        assert torch.equal(value, after.state_dict()[key]), key


def test_every_named_loss_is_kept_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = SASRec.loss

    def loss(self: SASRec, batch: Batch) -> dict[str, Tensor]:
        value = real(self, batch)["loss"]
        return {"loss": value, "twice": 2 * value}

    monkeypatch.setattr(SASRec, "loss", loss)
    reports: list[TrainProgress] = []
    _, _, rows = train("sasrec", tmp_path / "run", epochs=2, watch=reports.append)
    assert rows[1].losses["twice"] == pytest.approx(2 * rows[1].losses["loss"])
    assert reports[-1].loss_terms == {"twice": pytest.approx(2 * reports[-1].loss)}
    record(tmp_path / "metrics.parquet", "sasrec", rows[0])
    stored = pq.read_table(tmp_path / "metrics.parquet").to_pylist()
    named = {row["metric"]: row["value"] for row in stored if row["split"] == "train"}
    assert named.pop("seconds") == rows[0].seconds > 0
    assert named == rows[0].losses


@pytest.mark.parametrize("name", ["sasrec", "mmsrec"])
def test_bfloat16_learns_the_same(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for probability in ("dropout", "embed_dropout"):  # each precision draws masks of its own
        monkeypatch.setitem(SMALL, probability, 0.0)
    wide, narrow = (
        train(name, tmp_path / precision, precision=precision, epochs=2)
        for precision in ("float32", "bf16")
    )
    assert narrow[2][-1].losses["loss"] == pytest.approx(wide[2][-1].losses["loss"], rel=0.02)
    assert narrow[2][-1].losses != wide[2][-1].losses
    assert {value.dtype for value in narrow[1].state_dict().values()} == {torch.float32}


def test_compiling_is_asked_of_the_transformer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[torch.nn.Module] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: asked.append(self))
    model: Any
    _, model, _ = train("sasrec", tmp_path / "run", epochs=1, compile=True)
    assert asked == [model.sequence_encoder.transformer]


def test_every_other_epoch_and_the_last_are_validated(tmp_path: Path) -> None:
    _, _, rows = train("sasrec", tmp_path / "run", epochs=5, validate_every=2)
    assert [row.epoch for row in rows if row.metrics] == [2, 4, 5]
    assert [row.users for row in rows] == [0, 60, 0, 60, 60]


def test_a_least_number_of_steps_adds_epochs(tmp_path: Path) -> None:
    """The schedule and the result are those of the larger number of epochs."""

    def run(name: str, **settings: Any) -> tuple[int, list[float], bytes]:
        settings = {"schedule": "cosine", "lr": 1e-2, **settings}
        progress, _, rows = train("sasrec", tmp_path / name, **settings)
        assert [row.is_last for row in rows] == [False] * (len(rows) - 1) + [True]
        rates = [rate for row in rows for rate in row.rates.values()]
        return progress.steps, rates, (tmp_path / name / "model.safetensors").read_bytes()

    two = run("two", epochs=2)
    assert run("enough", epochs=2, min_steps=two[0]) == two
    assert run("longer", epochs=2, min_steps=two[0] + 1) == run("three", epochs=3)
    progress, _, rows = train("sasrec", tmp_path / "stops", epochs=1, min_steps=400, patience=2)
    assert progress.finished
    assert len(rows) == progress.best_epoch + 2 < 100


def test_patience_counts_validations(tmp_path: Path) -> None:
    progress, _, rows = train(
        "sasrec", tmp_path / "run", epochs=99, validate_every=3, patience=2, lr=1e-2
    )
    assert progress.finished
    assert len(rows) == progress.best_epoch + 2 * 3 < 99


@pytest.mark.parametrize("seen", ["filtered", "kept"])
def test_the_best_is_by_the_monitored_ranking(tmp_path: Path, seen: str) -> None:
    progress, _, rows = train(
        "sasrec", tmp_path / "run", monitor="NDCG@10", monitor_seen=seen, epochs=3
    )
    best = {s: max(row.metrics[s, "NDCG@10"] for row in rows) for s in ("filtered", "kept")}
    assert best["filtered"] > best["kept"]
    assert progress.best == best[seen]


@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        ([[1], [2, 3]], "3 interactions"),
        ([[1, 2, 3], [1]], "two training interactions"),
    ],
)
def test_too_few_interactions(sequences: list[list[int]], message: str) -> None:
    with pytest.raises(UserError, match=f"'world'.*{message}"):
        check_trainable(worlds.dataset(sequences, N))
    check_trainable(worlds.dataset([[1, 2, 3, 4]], N))
