"""Controls of runs: training without content is worse where content is all, and is told apart."""

import json

import pytest

from features.errors import UserError
from features.warehouse import Warehouse
from tests.trainer import worlds
from tests.trainer.models.test_planted import N, world
from trainer.analysis.compare import compare
from trainer.runs.control import training_command, with_controls
from trainer.runs.evaluate import evaluate
from trainer.runs.later import open_current
from trainer.runs.read import read_record
from trainer.runs.run import Run
from trainer.runs.train import train_run

SETTINGS = [
    *("dim=16", "heads=2", "hidden=32", "length=8", "layers=1", "objective=next", "batch_size=64"),
    *("lr=0.01", "patience=15", "device=cpu"),
]


@pytest.fixture
def planted(warehouse: Warehouse) -> Warehouse:
    """A world whose targets nobody has clicked in training: their texts alone tell the taste."""
    dataset, features = world()
    bounds = zip(dataset.offsets, dataset.offsets[1:], strict=False)
    worlds.prepare(warehouse, [dataset.items[a:b].tolist() for a, b in bounds], N)
    worlds.extract(warehouse, features)
    return warehouse


def begin(warehouse: Warehouse, name: str, *settings: str) -> Run:
    return worlds.begin(warehouse, "mmsrec", name=name, settings=[*SETTINGS, *settings])


def train(warehouse: Warehouse, name: str, *settings: str, epochs: int = 1) -> Run:
    run = begin(warehouse, name, f"epochs={epochs}", f"validate_every={epochs}", *settings)
    train_run(run)
    return run


def test_permuted_texts_are_worse_where_texts_are_all_there_is(planted: Warehouse) -> None:
    for name, settings in (("real", []), ("permuted", ["control=permute"])):
        run = train(planted, name, *settings, epochs=5)
        report = evaluate(planted, run, index="torch")
        assert report.control == run.spec.control.kind
    names = with_controls(planted, ["real"])
    assert names == ["permuted", "real"]
    comparison = compare(planted, names, metrics=["MRR"], by="settings")
    assert [system.control for system in comparison.systems] == ["permute", "none"]
    test = comparison.lines[1].test
    assert test is not None
    assert test.difference > 0.05
    assert test.p_value < 0.001


def test_a_control_has_all_settings_of_its_run_but_one(planted: Warehouse) -> None:
    begin(planted, "real")
    command = "--control permute --name real-permute && mmrec eval real-permute"
    for name, settings in (
        ("other-seed", ["control=permute", "seed=1"]),
        ("other-size", ["control=permute", "eval_batch=8", "clip=2"]),
        ("no-control", ["eval_batch=8"]),
    ):
        begin(planted, name, *settings)
    with pytest.raises(UserError, match=f"run 'real' has no control; run: .*{command}"):
        with_controls(planted, ["real"])
    begin(planted, "random", "control=random", "eval_batch=8")
    assert with_controls(planted, ["real"]) == ["random", "real"]
    begin(planted, "real-1", "seed=1")
    with pytest.raises(UserError, match=r"run 'real' has no control.*--control permute"):
        with_controls(planted, ["real", "real-1"])
    assert with_controls(planted, ["real-1"]) == ["other-seed", "real-1"]
    for names, message in (
        (["random"], "'random' is a control itself"),
        (["real", "other-size"], "'other-size' is a control itself"),
    ):
        with pytest.raises(UserError, match=message):
            with_controls(planted, names)
    words = training_command(read_record(planted, "real"), "permute").split()
    assert words[:6] == ["mmrec", "train", "--model", "mmsrec", "--dataset", "world"]
    assert words[words.index("--features") + 1] == "text=toy"
    assert words[words.index("--config") + 1].endswith("real/config.toml")


def test_a_control_is_part_of_the_identity_and_keeps_its_rows_when_opened(
    planted: Warehouse,
) -> None:
    run = train(planted, "c", "control=permute")
    assert run.spec.identity()["train"]["control"] == "permute"
    assert json.loads(json.dumps(run.spec.identity())) == read_record(planted, "c").identity
    opened = open_current(planted, run.folder)
    expected = run.data.features.vectors["text"]
    assert (opened.data.features.vectors["text"] == expected).all()
    assert not (world()[1].vectors["text"] == expected).all()
    dataset, _ = world()
    bounds = zip(dataset.offsets, dataset.offsets[1:], strict=False)
    sequences = [dataset.items[a:b].tolist() for a, b in bounds]
    worlds.prepare(planted, [*sequences, sequences[0]], N)
    with pytest.raises(UserError, match=r"'c' is a control \(control=permute\).*train again"):
        open_current(planted, run.folder)


def test_a_control_needs_features(planted: Warehouse) -> None:
    for model in ("sasrec", "popularity"):
        with pytest.raises(UserError, match=f"control=permute .*{model} reads none") as refused:
            worlds.begin(planted, model, settings=["control=permute"])
        assert "\n" not in str(refused.value)
    with pytest.raises(UserError, match="unknown control 'shuffle'"):
        worlds.begin(planted, "mmsrec", settings=["control=shuffle"])
