"""Hidden items: no loss reads them, and an evaluation ranks them on their own."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from features.documents import write_json
from features.errors import UserError
from features.warehouse import Warehouse
from tests.trainer import worlds
from tests.trainer.models.test_recommenders import OPTIONS, build, learns, sequences
from trainer.analysis.compare import compare
from trainer.data.multi_dataset import load_data
from trainer.data.negative_sampling import sample_unseen
from trainer.models.registry import MODELS
from trainer.runs.evaluate import EvalReport, evaluate
from trainer.runs.train import train_run

N, HIDDEN = 12, 3
ROWS = [[0, 1, 2, 3, 4, 5], [5, 6], [7, 8, 2, 1]]


@pytest.mark.parametrize("name", [*MODELS, *OPTIONS])
def test_a_step_does_not_depend_on_hidden_items(name: str) -> None:
    if not learns(name):
        pytest.skip("it has no parameters")
    values = []
    for garbage in (0.0, 100.0):
        features = worlds.features(N, missing=False)
        torch.manual_seed(0)
        model = build(name, features).train()
        for vectors in features.vectors.values():
            vectors[-HIDDEN:] += garbage
        batch = worlds.batch(sequences(ROWS), features, torch.Generator().manual_seed(2))
        batch = replace(batch, train=replace(batch.train, hidden=HIDDEN))
        model.fit_buffers(features, batch.train)
        torch.manual_seed(1)
        loss = model.loss(batch)["loss"]
        loss.backward()
        gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
        values.append((loss.detach(), gradients))
    assert torch.equal(values[0][0], values[1][0])
    for key, gradient in values[0][1].items():
        torch.testing.assert_close(gradient, values[1][1][key])
        if len(gradient) == N and gradient.dim() == 2:
            assert not gradient[-HIDDEN:].any(), key


def test_hidden_items_are_no_sampled_negatives() -> None:
    features = worlds.features(N)
    batch = worlds.batch(sequences(ROWS), features, torch.Generator())
    train = replace(batch.train, hidden=HIDDEN)
    items, exists = sample_unseen(
        train, torch.zeros(4000, dtype=torch.int64), torch.Generator().manual_seed(0)
    )
    assert exists.all()
    assert sorted(set(items.tolist())) == [6, 7, 8]
    assert min(np.bincount(items)[6:]) > 1200


def hide(warehouse: Warehouse, count: int) -> None:
    info = replace(warehouse.info("world"), hidden_items=count, seed=5)
    write_json(warehouse.dataset_dir("world") / "dataset.json", asdict(info))


SEQUENCES = [[0, 1, 2, 3], [1, 2, 3, 0], [2, 3, 0, 5], [3, 0, 1, 4], [0, 2, 1, 3]]


def evaluated(warehouse: Warehouse) -> EvalReport:
    worlds.prepare(warehouse, SEQUENCES, 6)
    hide(warehouse, 2)
    run = worlds.begin(warehouse, "popularity", name="one", settings=["device=cpu"])
    train_run(run)
    return evaluate(warehouse, run, index="torch")


def test_an_evaluation_has_rows_of_hidden_targets(warehouse: Warehouse) -> None:
    report = evaluated(warehouse)
    rows = [row for row in report.rows if row["targets"] == "hidden"]
    assert {(row["split"], row["users"]) for row in rows} == {("test", 2)}
    # Of the items that the user has not had, the target is tied with the other hidden one.
    (mrr,) = (
        row["value"]
        for row in rows
        if (row["ranker"], row["seen"], row["metric"]) == ("popularity", "filtered", "MRR")
    )
    assert mrr == pytest.approx(1 / 3)
    (line,) = (line for line in report.protocol if line.startswith("hidden: "))
    assert "2 of 6 items (seed 5)" in line
    other = worlds.begin(warehouse, "transitions", name="two", settings=["device=cpu"])
    train_run(other)
    evaluate(warehouse, other, index="torch")
    comparison = compare(warehouse, ["one", "two"], targets="hidden", metrics=["MRR"])
    assert comparison.users == 2


def test_an_evaluation_without_hidden_items_has_no_such_rows(warehouse: Warehouse) -> None:
    worlds.prepare(warehouse, SEQUENCES, 6)
    run = worlds.begin(warehouse, "popularity", settings=["device=cpu"])
    train_run(run)
    report = evaluate(warehouse, run, index="torch")
    assert all(row["targets"] != "hidden" for row in report.rows)
    assert not any(line.startswith("hidden: ") for line in report.protocol)


def test_datasets_with_hidden_items_are_not_joined(warehouse: Warehouse) -> None:
    worlds.prepare(warehouse, SEQUENCES, 6)
    hide(warehouse, 2)
    with pytest.raises(UserError, match=r"'world' has 2 hidden items.*give it alone"):
        load_data(warehouse, ["world", "world"], [], torch.device("cpu"))
