"""The transition prior against its definition, and its choice on validation."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings

from features.dataset import Dataset
from features.errors import DamagedError, UserError
from features.warehouse import Warehouse
from retrieval.ranking import Ranks
from retrieval.seen_items import SeenItems
from tests.trainer import worlds
from tests.trainer.models.test_transitions import N, histories
from trainer.config import TrainConfig
from trainer.data.batches import ItemFeatures
from trainer.evaluation.encode import histories_of
from trainer.evaluation.ranking import rank_split
from trainer.evaluation.transition_prior import PriorChoice, TransitionPrior, choose_prior
from trainer.loop import fit
from trainer.runs.evaluate import evaluate
from trainer.runs.folder import PRIOR
from trainer.runs.prior import read_prior
from trainer.runs.run import Run, open_run
from trainer.runs.train import train_run
from trainer.tasks.next_item import NextItem

NO_FEATURES = ItemFeatures(n_items=N, vectors={}, present={})


def pair_counts(sequences: list[list[int]]) -> np.ndarray:
    counts = np.zeros((N, N))
    for items in sequences:
        for place, earlier in enumerate(items):
            for distance, later in enumerate(items[place + 1 : place + 11], 1):
                counts[earlier, later] += 1 / distance
    return counts


@settings(max_examples=40, deadline=None)
@given(sequences=histories)
def test_it_leaves_out_the_transitions_of_the_user(sequences: list[list[int]]) -> None:
    dataset = worlds.dataset(sequences, N)
    data = worlds.training_data(dataset, NO_FEATURES)
    ends = dataset.train_ends() - dataset.offsets[:-1]
    train = [items[:end] for items, end in zip(sequences, ends, strict=True)]
    prior = TransitionPrior.of(data, weight=1.5, eps=0.1, bias=-3.0, scale=2.0)
    users = dataset.eval_split("test")
    scores = prior.scores(histories_of(dataset, users), users.users)
    for row, user in enumerate(users.users):
        others = pair_counts([items for u, items in enumerate(train) if u != user])
        shares = others / (others.sum(1, keepdims=True) + 3)
        expected = np.zeros(N)
        for age, item in enumerate(sequences[user][:-1][::-1][:10], 1):
            expected += shares[item] / age
        part = scores.rows(row, row + 1)
        dense = np.zeros(N)
        dense[part.items] = part.values
        expected = 1.5 / 2 * np.log1p(expected / 0.1)
        expected[list(set(sequences[user][:-1]))] += -3.0 / 2
        np.testing.assert_allclose(dense, expected, atol=1e-7)


def test_a_user_who_is_not_in_the_dataset_gets_all_transitions() -> None:
    data = worlds.training_data(worlds.dataset([[0, 1, 2, 3]], N), NO_FEATURES)
    prior = TransitionPrior.of(data, weight=1.0, eps=1.0, bias=0.0, scale=1.0)
    history = SeenItems(items=np.array([0]), offsets=np.array([0, 1]))
    assert prior.scores(history, np.array([-1])).items.tolist() == [1]
    assert prior.scores(history, np.array([0])).items.tolist() == []


def test_an_untrained_model_takes_the_prior_of_an_ordered_world() -> None:
    world, features = worlds.cycles(n_items=24), worlds.features(24)
    data = worlds.training_data(world, features)
    model = worlds.build("sasrec", features)
    users = world.eval_split("validation")
    before = rank_split(model, data, "validation", 64).ranks.filtered
    choice = choose_prior(
        model, data, users, with_transitions=True, metric="NDCG@10", seen="filtered", batch_size=64
    )
    assert choice.weight > 0
    assert choice.best > 0.9 > choice.without
    model.prior = TransitionPrior.of(
        data, weight=choice.weight, eps=choice.eps, bias=choice.bias, scale=model.settings.scale
    )
    after = rank_split(model, data, "validation", 64).ranks.filtered
    assert after.mean() < before.mean()
    assert float(np.where(after <= 10, 1 / np.log2(after + 1), 0).mean()) == pytest.approx(
        choice.best
    )


def begin(tmp_path: Path, model: str = "sasrec") -> Run:
    warehouse = Warehouse(tmp_path)
    world = worlds.cycles(n_items=24)
    sequences = [world.items[a:b].tolist() for a, b in pairwise(world.offsets)]
    worlds.prepare(warehouse, sequences, 24)
    options = ["epochs=2", "dim=8", "hidden=16"] if model == "sasrec" else []
    return worlds.begin(warehouse, model, settings=[*options, "prior=transitions"])


def test_a_training_chooses_it_once_and_every_evaluation_adds_it(tmp_path: Path) -> None:
    run = begin(tmp_path)
    report = train_run(run)
    assert report.prior is not None
    assert report.prior == read_prior(run.folder)
    assert report.prior.weight > 0

    for evaluated in (run, open_run(run.warehouse, run.folder)):  # as a grid does, and mmrec eval
        rows = evaluate(run.warehouse, evaluated, index="torch").rows
        (value,) = [
            row["value"]
            for row in rows
            if (row["split"], row["targets"], row["ranker"], row["seen"], row["metric"])
            == ("validation", "all", "sasrec", "filtered", run.config.metric)
        ]
        assert value == pytest.approx(report.prior.best)

    again = open_run(run.warehouse, run.folder)
    assert train_run(again, resume=True).prior == report.prior


def test_an_interrupted_choice_is_made_up_for_by_resuming(tmp_path: Path) -> None:
    run = begin(tmp_path)
    report = train_run(run)
    (run.folder / PRIOR).unlink()
    again = open_run(run.warehouse, run.folder)
    assert again.model.prior is None
    assert train_run(again, resume=True).prior == report.prior


def test_training_again_removes_the_prior_of_the_old_weights(tmp_path: Path) -> None:
    run = begin(tmp_path)
    train_run(run)

    def stop(row: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_run(open_run(run.warehouse, run.folder), on_epoch=stop)
    assert not (run.folder / PRIOR).exists()


@pytest.mark.parametrize("model", ["popularity", "transitions"])
def test_models_of_counts_refuse_it(model: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="prior=transitions"):
        begin(tmp_path, model)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"weight": 1}', "null", '{"weight": "a", "eps": 0.1, "bias": 0}', "{'"],
)
def test_a_damaged_prior_is_one_line(text: str, tmp_path: Path) -> None:
    run = begin(tmp_path)
    (run.folder / PRIOR).write_text(text)
    with pytest.raises(DamagedError, match=PRIOR):
        open_run(run.warehouse, run.folder)


def choose_bias(world: Dataset, tmp_path: Path) -> tuple[PriorChoice, Ranks]:
    features = worlds.features(world.info.items)
    data = worlds.training_data(world, features)
    model = worlds.build("sasrec", features)
    config = TrainConfig(epochs=4, batch_size=16, lr=3e-3)
    task = NextItem(model, data)
    fit(task, config, tmp_path, {}, on_epoch=lambda row: None, on_progress=lambda tick: None)
    users = world.eval_split("validation")
    choice = choose_prior(
        model, data, users, with_transitions=False, metric="MRR", seen="kept", batch_size=64
    )
    model.prior = TransitionPrior.of(
        data, weight=choice.weight, eps=choice.eps, bias=choice.bias, scale=model.settings.scale
    )
    return choice, rank_split(model, data, "test", 64).ranks


def test_seen_items_are_last_where_users_do_not_repeat_items(tmp_path: Path) -> None:
    choice, ranks = choose_bias(worlds.cycles(n_items=24), tmp_path)
    assert choice.weight == 0
    assert choice.bias < 0
    assert choice.best > choice.without
    assert (ranks.kept == ranks.filtered).all()


def test_seen_items_stay_first_where_users_repeat_them(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sequences = [rng.choice(24, 2, replace=False).tolist() * 4 for _ in range(60)]
    choice, _ = choose_bias(worlds.dataset(sequences, 24), tmp_path)
    assert choice.bias == 0
