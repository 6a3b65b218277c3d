"""MMSRec's pre-training: its loss by the formula, what it may see, and what it learns."""

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from features.errors import UserError
from tests.trainer import worlds
from trainer.checkpoint import load_weights
from trainer.config import TrainConfig
from trainer.data.batches import ItemFeatures, Shard
from trainer.evaluation.cross_modal import both_ways, recalls, retrieve
from trainer.loop import EpochRow, fit
from trainer.models.base import Catalogue
from trainer.models.mmsrec import MMSRec, MMSRecConfig
from trainer.tasks.alignment import AlignConfig, Alignment, contrast

SMALL: dict[str, Any] = {"dim": 16, "heads": 2, "hidden": 16, "length": 5, "dropout": 0.1}


def build(features: ItemFeatures, **settings: Any) -> MMSRec:
    torch.manual_seed(0)
    catalogue = Catalogue(n_items=features.n_items, n_users=1, widths=features.widths)
    return MMSRec(MMSRecConfig(**{**SMALL, **settings}), catalogue)


def splits(n_items: int) -> dict[str, Any]:
    place = np.arange(n_items) % 10
    return {"validation": place == 0, "test": place == 5}


def alignment(features: ItemFeatures, model: MMSRec | None = None, **config: Any) -> Alignment:
    model = model or build(features)
    return Alignment(model, features, splits(features.n_items), AlignConfig(**config))


def pair_loss(x: Tensor, y: Tensor, labels: Tensor | None = None) -> Tensor:
    """Eq. 6 as it stands, in float64."""
    scores = x.double() @ y.double().T / 0.05
    if labels is not None:
        other = (labels[:, None] == labels) & ~torch.eye(len(labels), dtype=torch.bool)
        scores = scores.masked_fill(other, -torch.inf)
    hit = scores.diagonal()
    return (scores.logsumexp(1) - hit).mean() + (scores.logsumexp(0) - hit).mean()


@pytest.mark.parametrize("labels", [None, [0, 1, 0, 3, 1]])
def test_a_pair_by_the_formula(labels: list[int] | None) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (functional.normalize(torch.randn(5, 4, generator=generator)) for _ in range(2))
    label = None if labels is None else torch.tensor(labels)
    torch.testing.assert_close(
        contrast(x, y, 20.0, label).double(), pair_loss(x, y, label), rtol=1e-5, atol=1e-6
    )


def test_a_learned_scale_has_the_loss_of_a_fixed_one_and_its_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (functional.normalize(torch.randn(6, 4, generator=generator)) for _ in range(2))
    scale = torch.tensor(20.0, requires_grad=True)
    loss = contrast(x, y, scale, None)
    torch.testing.assert_close(loss, contrast(x, y, 20.0, None), rtol=1e-5, atol=1e-6)
    loss.backward()
    step = 0.01
    above, below = (contrast(x, y, 20 + sign * step, None) for sign in (1, -1))
    assert scale.grad is not None
    assert scale.grad.item() == pytest.approx(float(above - below) / (2 * step), rel=0.02)


def test_a_learned_temperature_is_a_bounded_parameter_of_the_model() -> None:
    features = worlds.features(40)
    fixed = alignment(features, build(features, dropout=0.0, embed_dropout=0.0))
    task = alignment(
        features, build(features, dropout=0.0, embed_dropout=0.0), learn_temperature=True
    )
    assert "alignment_log_scale" in task.model.state_dict()
    assert "alignment_log_scale" not in fixed.model.state_dict()
    batch = torch.arange(40)
    losses = [fixed.loss(batch)["loss"], task.loss(batch)["loss"]]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-4)
    losses[1].backward()
    assert task.log_scale is not None
    assert task.log_scale.grad is not None
    assert task.log_scale.grad.item() != 0
    bounded = []
    for value in (np.log(100), 9.0):
        task.log_scale.data.fill_(value)
        bounded.append(task.loss(batch)["loss"].item())
    assert bounded[0] == pytest.approx(bounded[1])


@pytest.mark.parametrize("missing", ["drop", "mask"])
def test_a_view_of_everything_is_the_item(missing: str) -> None:
    features = worlds.features(12)
    model = build(features, missing=missing).eval()
    items = torch.tensor([3, 2, 7])
    rows = torch.tensor([2, 0])
    views = [(("text", "image"), rows), (("text",), torch.tensor([0, 1]))]
    both, _ = model.encode_views(items, views, features)
    torch.testing.assert_close(both, model.encode_items(features)[items[rows]])


@pytest.mark.parametrize("missing", ["drop", "mask"])
def test_a_view_of_one_modality_is_an_item_without_the_other(missing: str) -> None:
    features = worlds.features(12, missing=False)
    model = build(features, missing=missing).eval()
    gone = {**features.present, "image": torch.zeros(12, dtype=torch.bool)}
    blind = ItemFeatures(n_items=12, vectors=features.vectors, present=gone)
    items = torch.arange(12)
    (text,) = model.encode_views(items, [(("text",), items)], features)
    torch.testing.assert_close(text, model.encode_items(blind), rtol=1e-5, atol=1e-5)


def test_the_loss_is_the_weighted_sum_and_items_without_a_side_take_part_in_the_other() -> None:
    features = worlds.features(40)
    model = build(features, dropout=0.0, embed_dropout=0.0)
    config = {"weight_vv": 0.1, "weight_tt": 0.2, "weight_vt": 0.3, "weight_joint": 0.4}
    task = alignment(features, model, **config)
    batch = torch.arange(40)
    losses = task.loss(batch)
    seen, written = features.present["image"], features.present["text"]
    both = seen & written
    v, t, vt = model.encode_views(
        batch,
        [
            (("image",), seen.nonzero()[:, 0]),
            (("text",), written.nonzero()[:, 0]),
            (("image", "text"), both.nonzero()[:, 0]),
        ],
        features,
    )
    expected = {
        "v-v": pair_loss(v, v),
        "t-t": pair_loss(t, t),
        "v-t": pair_loss(v[both[seen]], t[both[written]]),
        "vt-vt": pair_loss(vt, vt),
    }
    for name, value in expected.items():
        torch.testing.assert_close(losses[name].double(), value, rtol=1e-4, atol=1e-4)
    total = sum(w * e for w, e in zip((0.1, 0.2, 0.3, 0.4), expected.values(), strict=True))
    torch.testing.assert_close(losses["loss"].double(), total, rtol=1e-4, atol=1e-4)


def test_dropout_makes_the_second_view() -> None:
    features = worlds.features(20, missing=False)
    still = alignment(features, build(features, dropout=0.0, embed_dropout=0.0))
    moved = alignment(features)
    batch = torch.arange(20)
    assert moved.loss(batch)["v-v"] > still.loss(batch)["v-v"]


def test_copies_are_no_negatives_unless_kept() -> None:
    features = worlds.features(20, missing=False)
    for name, one, other in (("image", 3, 4), ("text", 4, 6)):
        features.vectors[name][other] = features.vectors[name][one]
    labels = alignment(features)._labels
    assert labels["v"][3] == labels["v"][4] != labels["v"][6]
    assert labels["t"][4] == labels["t"][6] != labels["t"][3]
    assert labels["vt"].unique().numel() == 20
    assert labels["either"][3] == labels["either"][4] == labels["either"][6]
    assert labels["either"].unique().numel() == 18
    model = build(features, dropout=0.0, embed_dropout=0.0)
    losses = {}
    for duplicates in ("mask", "keep"):
        losses[duplicates] = alignment(features, model, duplicates=duplicates).loss(
            torch.arange(20)
        )
    for name in ("v-v", "t-t", "v-t"):
        assert losses["mask"][name] < losses["keep"][name]
    assert losses["mask"]["vt-vt"] == losses["keep"]["vt-vt"]


def test_held_out_items_are_never_learned_from() -> None:
    features = worlds.features(40)
    task = alignment(features)
    total, batches = task.epoch(TrainConfig(batch_size=7), 0, skip=0, shard=Shard())
    items = torch.cat(list(batches))
    evaluated = torch.from_numpy(splits(40)["validation"] | splits(40)["test"])
    anything = features.present["image"] | features.present["text"]
    assert sorted(items.tolist()) == (anything & ~evaluated).nonzero()[:, 0].tolist()
    assert total == -(-len(items) // 7)
    for name, pool in task.pools.items():
        assert set(pool.tolist()) <= set(np.flatnonzero(splits(40)[name]).tolist())
    _, rest = task.epoch(TrainConfig(batch_size=7), 0, skip=total - 1, shard=Shard())
    (last,) = rest
    halves = []
    for rank in range(2):
        shard = Shard(process_rank=rank, world_size=2)
        _, part = task.epoch(TrainConfig(batch_size=7), 0, skip=total - 1, shard=shard)
        halves += next(iter(part)).tolist()
    assert sorted(halves) == sorted(last.tolist())


def test_copies_of_an_image_are_in_one_split() -> None:
    """Training never sees the image of a held-out item under another id."""
    features = worlds.features(40, missing=False)
    before = alignment(features)
    assert before.pools["validation"].tolist() == [0, 10, 20, 30]
    features.vectors["image"][11] = features.vectors["image"][10]
    features.vectors["image"][30] = features.vectors["image"][29]
    features.vectors["text"][20] = features.vectors["text"][21]  # another image: another item
    after = alignment(features)
    assert after.pools["validation"].tolist() == [0, 10, 11, 20]
    assert torch.equal(after.pools["test"], before.pools["test"])
    _, batches = after.epoch(TrainConfig(batch_size=40), 0, skip=0, shard=Shard())
    training = set(torch.cat(list(batches)).tolist())
    assert {29, 30, 21} <= training
    assert not {0, 10, 11, 20} & training


def test_retrieval_by_hand_ties_count_against() -> None:
    vision = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    text = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1]])
    ranks = both_ways(vision, text)
    assert ranks["text-to-vision"].tolist() == [1, 2, 3]
    assert ranks["vision-to-text"].tolist() == [2, 1, 2]
    values = {name: value.mean() for name, value in recalls(ranks["text-to-vision"]).items()}
    assert values["Recall@1"] == pytest.approx(1 / 3)
    assert values["Recall@5"] == 1
    assert values["MRR"] == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)


def test_retrieval_of_several_captions_by_hand() -> None:
    vision = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    text = torch.tensor([[0.0, 1.0], [0.9, 1.0], [1.0, 0.0], [1.0, 0.0]])
    ranks = both_ways(vision, text, torch.tensor([5, 2, 5, 5]))
    assert ranks["text-to-vision"].tolist() == [2, 1, 1, 1]
    # Images in the order of their numbers: the caption of 2 is below one of 5, whose two equal
    # captions do not compete.
    assert ranks["vision-to-text"].tolist() == [2, 1]
    generator = torch.Generator().manual_seed(0)
    vision, text = (torch.randn(30, 4, generator=generator) for _ in range(2))
    image = torch.randint(9, (30,), generator=generator)
    first = {number: int((image == number).nonzero()[0, 0]) for number in set(image.tolist())}
    vision = vision[[first[number] for number in image.tolist()]]
    scores = text.double() @ vision.double().T
    distinct = sorted(first)
    ranks = both_ways(vision, text, image)
    to_vision = [
        sum(scores[k, first[other]] >= scores[k, k] for other in distinct) for k in range(30)
    ]
    to_text = [
        1
        + sum(
            scores[image != number, first[number]] >= scores[image == number, first[number]].max()
        )
        for number in distinct
    ]
    assert ranks["text-to-vision"].tolist() == to_vision
    assert ranks["vision-to-text"].tolist() == to_text


def planted(n_items: int = 200) -> ItemFeatures:
    """Text is the picture seen through another basis, with noise."""
    generator = torch.Generator().manual_seed(0)
    taste = torch.randn(n_items, 6, generator=generator)
    vectors = {
        name: taste @ torch.randn(6, width, generator=generator)
        + 0.1 * torch.randn(n_items, width, generator=generator)
        for name, width in (("image", 10), ("text", 9))
    }
    present = torch.ones(n_items, dtype=torch.bool)
    return ItemFeatures(n_items=n_items, vectors=vectors, present=dict.fromkeys(vectors, present))


LOOP: dict[str, Any] = {
    "batch_size": 64,
    "lr": 3e-3,
    "monitor": "MRR",
    "device": "cpu",
    "patience": 50,
}


def run(folder: Path, *, epochs: int, resume: bool = False, stop: int = 0) -> tuple[Any, Any]:
    features = planted()
    task = alignment(features, build(features, dropout=0.1))
    folder.mkdir(exist_ok=True)
    rows: list[EpochRow] = []
    config = TrainConfig(**{**LOOP, "epochs": epochs})
    ticks = 0

    def on_progress(tick: object) -> None:
        nonlocal ticks
        ticks += 1
        if ticks == stop:
            signal.raise_signal(signal.SIGINT)

    fit(task, config, folder, {}, resume=resume, on_epoch=rows.append, on_progress=on_progress)
    return task, rows


@pytest.mark.slow
def test_what_belongs_together_is_found_among_items_never_seen(tmp_path: Path) -> None:
    features = planted()
    pool = alignment(features).pools["test"]
    before = retrieve(build(features), features, pool)["text-to-vision"]
    task, rows = run(tmp_path / "run", epochs=15)
    load_weights(tmp_path / "run" / "model.safetensors", task.model, {})
    after = retrieve(task.model, features, pool)["text-to-vision"]
    assert (before == 1).mean() < 0.2
    assert (after == 1).mean() > 0.6
    assert rows[-1].metrics["text-to-vision", "Recall@5"] > 0.8
    assert set(rows[0].losses) == {"loss", "v-v", "t-t", "v-t", "vt-vt"}


def test_a_resumed_alignment_ends_where_the_whole_one_does(tmp_path: Path) -> None:
    whole, _ = run(tmp_path / "whole", epochs=2)
    run(tmp_path / "torn", epochs=2, stop=6)
    torn, _ = run(tmp_path / "torn", epochs=2, resume=True)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, torn.model.state_dict()[name]), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"holdout": 0.0}, "holdout=0.0 .*above 0 and below 0.5"),
        ({"duplicates": "no"}, "duplicates.*'no'.*mask, keep"),
        ({"weight_vt": -1.0}, "weight_vt=-1.0"),
        (
            dict.fromkeys(("weight_vv", "weight_tt", "weight_vt", "weight_joint"), 0.0),
            "all four weights are 0",
        ),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        AlignConfig(**settings)


def test_what_cannot_be_aligned() -> None:
    features = worlds.features(20)
    text = ItemFeatures(
        n_items=20,
        vectors={"text": features.vectors["text"]},
        present={"text": features.present["text"]},
    )
    with pytest.raises(UserError, match=r"text and vision are aligned, .* features of: text"):
        alignment(text)
    with pytest.raises(UserError, match=r"too few items have text and vision \(.*holdout"):
        alignment(worlds.features(6))
    task = alignment(worlds.features(40))
    with pytest.raises(UserError, match=r"monitor='HR@20' .*known: Recall"):
        task.validate(TrainConfig(monitor="HR@20"))
