"""A run's folder: claimed once, locked while it is written, and never of two minds."""

import shutil
import signal
import threading
from contextlib import AbstractContextManager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from features.atomic_files import write_table
from features.documents import read_toml, write_toml
from features.errors import UserError
from features.schema import METRICS_SCHEMA
from features.sql_views import query
from features.warehouse import Warehouse
from tests.trainer import worlds
from trainer import loop
from trainer.evaluation.protocol import REFERENCES
from trainer.loop import EpochRow, TrainProgress
from trainer.runs import evaluate as evaluation
from trainer.runs.evaluate import evaluate
from trainer.runs.folder import create_run_dir, record, replace_metrics, run_lock
from trainer.runs.read import read_metrics, read_record
from trainer.runs.run import Run, open_run
from trainer.runs.spec import RunSpec
from trainer.runs.train import train_run

STAMP = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
SMALL = ["dim=8", "hidden=8", "length=5", "epochs=2", "batch_size=4", "device=cpu"]
# Item 0 is popular; the target of one half of the users is 0, of the other a cold item.
WORLD = [[0, 1, 0, 1, target, 3] for target in (0, 2) * 6]


@pytest.fixture
def warehouse(warehouse: Warehouse) -> Warehouse:
    worlds.prepare(warehouse, WORLD, 6)
    return warehouse


def begin(warehouse: Warehouse, name: str = "r", *settings: str) -> Run:
    return worlds.begin(warehouse, "sasrec", "world", settings=[*SMALL, *settings], name=name)


def stop_at(count: int) -> Any:
    ticks = 0

    def on_progress(tick: TrainProgress) -> None:
        nonlocal ticks
        ticks += 1
        if ticks == count:
            signal.raise_signal(signal.SIGINT)

    return on_progress


def test_runs_that_begin_together_have_folders_of_their_own(tmp_path: Path) -> None:
    barrier = threading.Barrier(8)
    folders: list[Path] = []

    def begin() -> None:
        barrier.wait()
        with create_run_dir(tmp_path / "runs", None, STAMP, "d-m") as folder:
            folders.append(folder)

    threads = [threading.Thread(target=begin) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(folders)) == 8
    assert tmp_path / "runs" / "20260102-030405-d-m" in folders
    assert sorted(folders) == sorted((tmp_path / "runs").iterdir())


def test_a_name_is_claimed_once_and_given_back_on_failure(warehouse: Warehouse) -> None:
    def claim() -> AbstractContextManager[Path]:
        return create_run_dir(warehouse.runs_dir, "mine", STAMP, "d-m")

    with suppress(RuntimeError), claim():
        assert warehouse.runs() == []  # nobody sees it before it has its configuration
        with pytest.raises(UserError, match="another process"):
            claim().__enter__()
        raise RuntimeError
    begin(warehouse, "mine")
    with pytest.raises(UserError, match=r"mmrec train --resume --run mine$"):
        begin(warehouse, "mine")
    assert warehouse.runs() == ["mine"]


@pytest.mark.parametrize("name", ["../x", "", "a/b", ".hidden", "x" * 101])
def test_the_name_that_cannot_be_is_a_runs(warehouse: Warehouse, name: str) -> None:
    with pytest.raises(UserError, match=r"run name .* cannot be a folder"):
        begin(warehouse, name)


@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        ([[0, 1], [1, 2]], "no user has 3 interactions, so nothing can be validated"),
        ([[0, 1, 2], [1], [2, 1, 0]], "no user has two training interactions"),
    ],
)
def test_too_few_interactions_leave_no_run(
    warehouse: Warehouse, sequences: list[list[int]], message: str
) -> None:
    begin(warehouse, "before")
    worlds.prepare(warehouse, sequences, 6)
    with pytest.raises(UserError, match=message):
        begin(warehouse)
    assert [path.name for path in warehouse.runs_dir.iterdir()] == ["before"]
    # An old run cannot be evaluated on it either.
    with pytest.raises(UserError, match=r"another preparation of 'world'.*train again"):
        open_run(warehouse, warehouse.runs_dir / "before")


def test_a_model_without_its_features_leaves_no_run(warehouse: Warehouse) -> None:
    with pytest.raises(UserError, match="mmsrec needs features"):
        worlds.begin(warehouse, "mmsrec", "world", settings=["device=cpu"])
    assert list(warehouse.runs_dir.iterdir()) == []


def test_one_process_writes_a_run(warehouse: Warehouse) -> None:
    run = begin(warehouse)
    with run_lock(run.folder):
        for work in (lambda: train_run(run), lambda: evaluate(warehouse, run, index="torch")):
            with pytest.raises(UserError, match="another process is writing run r"):
                work()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('dataset = "world"', "dataset = 3", "has dataset=3"),
        ("features = []", 'features = "x"', "has features='x'"),
        ("features = []", "features = [1]", r"has features=\[1\]"),
        ('fingerprint = "f"', "", "has fingerprint=None"),
        ("[run]", "run = 3\n[other]", "has model=None"),
        ("[run]", "[run", "is damaged"),
        ('model = "sasrec"', 'model = "nope"', "config.toml: unknown model 'nope'"),
        ("lr = 0.002", "lr = -1", "config.toml: lr=-1.0 must be above 0"),
        ("dim = 8", 'dim = "8"', "config.toml: dim='8' must be a whole number"),
        ('monitor = "NDCG@10"', 'monitor = "NDCG"', "config.toml: unknown monitor 'NDCG'"),
    ],
)
def test_a_damaged_configuration_names_its_file(
    warehouse: Warehouse, old: str, new: str, message: str
) -> None:
    folder = begin(warehouse).folder
    path = folder / "config.toml"
    text = path.read_text().split("\n", 1)[1]  # without the checksum
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(UserError, match=message) as caught:
        open_run(warehouse, folder)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def metrics(folder: Path, **wanted: object) -> list[dict[str, Any]]:
    rows = pq.read_table(folder / "metrics.parquet").to_pylist()
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def test_cold_targets_and_popularity_by_hand(warehouse: Warehouse) -> None:
    run = begin(warehouse)
    train_run(run)
    report = evaluate(warehouse, run, index="torch")
    stored = pq.read_table(run.folder / "predictions.parquet").to_pylist()
    assert {(row["split"], row["item"], row["cold"]) for row in stored} == {
        ("validation", 0, False), ("validation", 2, True), ("test", 3, True),
    }  # fmt: skip
    assert [row["user_id"] for row in stored[:3]] == ["u0", "u1", "u2"]
    # Training counts are 24 of item 0, 24 of item 1, none of the others. At the validation target
    # 0, item 1 is as popular: rank 2; the user already had 0, a miss when filtered. Target 2 has
    # all five others at or above it: rank 6, without the seen two rank 4. At test, 0 and 1 are
    # seen, and of those whose validation item was 2, that one too.
    expected = {
        ("validation", "all", "kept"): (1 / 2 + 1 / 6) / 2,
        ("validation", "all", "filtered"): (0 + 1 / 4) / 2,
        ("validation", "new", "kept"): 1 / 6,
        ("validation", "new", "filtered"): 1 / 4,
        ("validation", "repeated", "kept"): 1 / 2,
        ("validation", "cold", "kept"): 1 / 6,
        ("validation", "cold", "filtered"): 1 / 4,
        ("test", "all", "kept"): 1 / 6,
        ("test", "all", "filtered"): (1 / 4 + 1 / 3) / 2,
        ("test", "cold", "kept"): 1 / 6,
        ("test", "cold", "filtered"): (1 / 4 + 1 / 3) / 2,
    }
    rows = metrics(run.folder, phase="eval", ranker="popularity", metric="MRR")
    assert {(r["split"], r["targets"], r["seen"]): r["value"] for r in rows} == pytest.approx(
        expected
    )
    users = {(r["split"], r["targets"]): r["users"] for r in rows}
    assert users == {
        ("validation", "all"): 12, ("validation", "cold"): 6, ("test", "all"): 12,
        ("test", "cold"): 12, ("validation", "new"): 6, ("validation", "repeated"): 6,
    }  # fmt: skip
    assert {row["ranker"] for row in report.rows} == {"sasrec", *REFERENCES}


def test_an_evaluation_goes_when_training_goes_on(warehouse: Warehouse) -> None:
    run = begin(warehouse)
    predictions = run.folder / "predictions.parquet"
    stopped = train_run(run, on_progress=stop_at(5))  # in the second epoch
    assert (stopped.epochs, stopped.finished) == (1, False)
    evaluate(warehouse, run, index="torch")
    assert metrics(run.folder, phase="eval")
    assert predictions.exists()
    again = open_run(warehouse, run.folder)
    assert train_run(again, resume=True).finished
    assert not metrics(run.folder, phase="eval")
    assert [row["epoch"] for row in metrics(run.folder, metric="loss")] == [1, 2]
    assert not predictions.exists()

    evaluate(warehouse, again, index="torch")
    held = predictions.read_bytes(), metrics(run.folder)
    train_run(
        open_run(warehouse, run.folder), resume=True
    )  # finished: nothing is trained, nothing goes
    assert (predictions.read_bytes(), metrics(run.folder)) == held


@pytest.mark.slow
@pytest.mark.parametrize("killed_at", ["replace_metrics", "write_table"])
def test_a_killed_evaluation_leaves_no_pair_of_two(
    warehouse: Warehouse, monkeypatch: pytest.MonkeyPatch, killed_at: str
) -> None:
    run = begin(warehouse)
    train_run(run)
    evaluate(warehouse, run, index="torch")

    def kill(*words: object, **more: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, killed_at, kill)
        with pytest.raises(KeyboardInterrupt):
            evaluate(warehouse, run, index="torch")
    assert not (run.folder / "predictions.parquet").exists()
    assert metrics(run.folder, phase="eval")
    evaluate(warehouse, run, index="torch")
    assert (run.folder / "predictions.parquet").exists()


def test_a_replayed_epoch_takes_the_place_of_what_it_wrote(tmp_path: Path) -> None:
    path = tmp_path / "metrics.parquet"
    values = {("filtered", "HR@10"): 0.5, ("kept", "HR@10"): 0.25}
    for epoch, loss in ((1, 3.0), (2, 2.0), (3, 1.0)):
        record(path, "m", EpochRow(epoch=epoch, losses={"loss": loss}, metrics=values, users=7))
    record(path, "m", EpochRow(epoch=2, losses={"loss": 2.5}, metrics={}, users=0))
    rows = pq.read_table(path).to_pylist()
    assert [(r["epoch"], r["split"], r["seen"], r["value"], r["users"]) for r in rows] == [
        (1, "train", "none", 3.0, None),
        (1, "validation", "filtered", 0.5, 7),
        (1, "validation", "kept", 0.25, 7),
        (2, "train", "none", 2.5, None),
    ]


def test_an_epoch_is_added_to_a_table_of_version_0_1(tmp_path: Path) -> None:
    path = tmp_path / "metrics.parquet"
    values = {("filtered", "HR@10"): 0.5, ("kept", "HR@10"): 0.25}
    record(path, "m", EpochRow(epoch=1, losses={}, metrics=values, users=7))
    table = pq.read_table(path)
    old = pa.array(["masked", "unmasked"])
    pq.write_table(table.set_column(5, table.schema.field("seen"), old), path)
    record(path, "m", EpochRow(epoch=2, losses={}, metrics=values, users=7))
    rows = pq.read_table(path).to_pylist()
    assert [row["seen"] for row in rows] == ["filtered", "kept"] * 2


def test_an_evaluation_leaves_the_rows_of_retrieval(warehouse: Warehouse) -> None:
    run = begin(warehouse)
    train_run(run)
    row = {
        "phase": "eval", "epoch": 0, "split": "test", "targets": "text-to-vision", "ranker": "m",
        "seen": "none", "metric": "Recall@1", "value": 0.5,
    }  # fmt: skip
    replace_metrics(run.folder / "metrics.parquet", [row], lambda held: False)
    for _ in range(2):
        evaluate(warehouse, run, index="torch")
    assert len(metrics(run.folder, metric="Recall@1")) == 1
    assert len(metrics(run.folder, metric="MRR", split="test", targets="all", ranker="sasrec")) == 2


@pytest.mark.parametrize("content", [b"PAR1", pa.table({"a": [1]})], ids=["damaged", "columns"])
def test_a_table_of_metrics_that_is_none_costs_no_predictions(
    warehouse: Warehouse, content: bytes | pa.Table
) -> None:
    run = begin(warehouse)
    train_run(run)
    evaluate(warehouse, run, index="torch")
    path = run.folder / "metrics.parquet"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        pq.write_table(content, path)
    with pytest.raises(UserError, match=r"metrics\.parquet cannot be read \(.*\); remove it"):
        evaluate(warehouse, run, index="torch")
    assert (run.folder / "predictions.parquet").exists()
    with pytest.raises(UserError, match=r"metrics\.parquet cannot be read"):
        read_metrics(read_record(warehouse, run.folder.name))


def weights(run: Run) -> list[torch.Tensor]:
    return list(run.model.state_dict().values())


@pytest.mark.parametrize("init", [None, "first"])
def test_a_run_killed_before_it_was_saved_begins_once_more(
    warehouse: Warehouse, init: str | None
) -> None:
    train_run(begin(warehouse, "first", "lr=0.1"))
    killed, whole = (
        worlds.begin(
            warehouse, "sasrec", "world", settings=[*SMALL, "seed=7"], name=name, init=init
        )
        for name in ("killed", "whole")
    )
    train_run(whole)
    again = open_run(warehouse, killed.folder)
    assert train_run(again, resume=True).finished
    assert all(map(torch.equal, weights(again), weights(whole)))
    assert [row["epoch"] for row in metrics(killed.folder, metric="loss")] == [1, 2]


@pytest.mark.parametrize("writes", range(4))
def test_a_run_killed_between_two_files_goes_on(
    warehouse: Warehouse, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    """The files are the first state, the best weights, and the state of the first epoch."""
    whole = begin(warehouse, "whole")
    train_run(whole)
    killed = begin(warehouse, "killed")
    left = writes

    def limited(write: Any) -> Any:
        def write_or_end(*arguments: Any) -> None:
            nonlocal left
            if not left:
                raise RuntimeError("killed here")
            left -= 1
            write(*arguments)

        return write_or_end

    with monkeypatch.context() as patch:
        for name in ("save_weights", "save_state"):
            patch.setattr(loop, name, limited(getattr(loop, name)))
        with pytest.raises(RuntimeError, match="killed here"):
            train_run(killed)
    assert train_run(open_run(warehouse, killed.folder), resume=True).finished
    files = [run.folder / "model.safetensors" for run in (whole, killed)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert metrics(killed.folder, metric="loss") == metrics(whole.folder, metric="loss")


def test_a_killed_run_does_not_begin_from_other_weights(warehouse: Warehouse) -> None:
    first = begin(warehouse, "first")
    train_run(first)
    killed = worlds.begin(warehouse, "sasrec", "world", settings=SMALL, name="killed", init="first")
    shutil.rmtree(first.folder)
    train_run(begin(warehouse, "first", "lr=0.1"))
    with pytest.raises(UserError, match=r"was to start from run 'first', .* train again"):
        open_run(warehouse, killed.folder)


def test_what_is_gone_is_not_begun_again(warehouse: Warehouse) -> None:
    run = begin(warehouse)
    train_run(run)
    best, state = (run.folder / f"{name}.safetensors" for name in ("model", "resume"))
    best.rename(run.folder / "aside")
    lost = rf"the weights of epoch \d.* are lost; remove {run.folder} and train again$"
    with pytest.raises(UserError, match=lost):
        evaluate(warehouse, run, index="torch")
    with pytest.raises(UserError, match=r"model\.safetensors is gone: the weights of epoch \d"):
        train_run(open_run(warehouse, run.folder), resume=True)
    (run.folder / "aside").rename(best)
    state.unlink()
    with pytest.raises(UserError, match=r"resume\.safetensors is gone.*.* mmrec eval"):
        train_run(open_run(warehouse, run.folder), resume=True)
    evaluate(warehouse, run, index="torch")


def test_a_folder_that_is_no_run_is_called_so(warehouse: Warehouse) -> None:
    (warehouse.runs_dir / "half").mkdir(parents=True)
    (warehouse.runs_dir / "note.txt").touch()
    with pytest.raises(UserError, match=r"half is not a run: it has no config\.toml"):
        warehouse.choose_run("half")
    messages: list[str] = []
    query(warehouse, "SELECT * FROM runs", messages.append)
    assert [line for line in messages if "half" in line] == messages
    assert len(messages) == 1


def test_a_damaged_table_of_metrics_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"metrics\.parquet cannot be read"):
        replace_metrics(tmp_path / "metrics.parquet", [], lambda row: True)


def test_a_run_without_a_younger_setting_keeps_its_identity(warehouse: Warehouse) -> None:
    """A later version adds settings; the run's files do not name them, and it stays usable."""
    run = begin(warehouse)
    train_run(run)
    config = run.folder / "config.toml"
    document = read_toml(config, "")
    assert document["model"].pop("final_norm") is True
    write_toml(config, document)
    identity = RunSpec.read(warehouse, run.folder).identity()
    assert "final_norm" not in identity["model"]
    assert run.spec.identity()["model"] == identity["model"] | {"final_norm": True}
    assert open_run(warehouse, run.folder).spec.settings == run.spec.settings


@pytest.mark.parametrize(
    ("targets", "settings", "expected"),
    [
        ((2, 2), (), "filtered"),
        ((2, 0), (), "kept"),
        ((2, 0), ("monitor_seen=filtered",), "filtered"),
        ((2, 2), ("monitor_seen=kept",), "kept"),
    ],
)
def test_early_stopping_keeps_seen_items_where_targets_are_repeated(
    warehouse: Warehouse, targets: tuple[int, int], settings: tuple[str, ...], expected: str
) -> None:
    worlds.prepare(warehouse, [[0, 1, 0, 1, target, 3] for target in targets * 6], 6)
    run = begin(warehouse, "r", *settings)
    assert run.config.monitor_seen == expected
    assert open_run(warehouse, run.folder).config.monitor_seen == expected


def test_one_percent_of_repeated_targets_is_filtered(warehouse: Warehouse) -> None:
    histories = [[0, 1, 0, 1, 2, 3]] * 99 + [[0, 1, 0, 1, 0, 3]]
    worlds.prepare(warehouse, histories, 6)
    assert begin(warehouse).config.monitor_seen == "filtered"


@pytest.mark.parametrize("model", ["popularity", "transitions"])
def test_a_model_without_parameters_is_resumed_by_fitting_it_again(
    warehouse: Warehouse, model: str
) -> None:
    run = worlds.begin(warehouse, model, "world", settings=["device=cpu"], name="r")
    report = train_run(run)
    again = train_run(open_run(warehouse, run.folder), resume=True)
    assert (again.best, again.finished) == (report.best, True)


def test_a_preset_gives_the_settings_and_the_file_and_pairs_win(
    warehouse: Warehouse, tmp_path: Path
) -> None:
    file = tmp_path / "own.toml"
    file.write_text("alpha = 0.6\nepochs = 3\n")
    run = worlds.begin(
        warehouse, "bsarec", "world", preset="published", file=file, settings=["epochs=4"], name="b"
    )
    assert (run.spec.settings.rows, run.spec.settings.alpha) == ("prefixes", 0.6)  # type: ignore[attr-defined]
    assert (run.config.epochs, run.config.weight_decay) == (4, 0.0)


def test_a_preset_can_fix_the_monitored_ranking(warehouse: Warehouse) -> None:
    """Without repeated targets, ``filtered`` is the default; MMSRec is published with ``kept``."""
    worlds.prepare(warehouse, [[0, 1, 2, 3, 4, 5]] * 12, 6)
    worlds.extract(warehouse, worlds.features(6))
    default = worlds.begin(warehouse, "mmsrec", "world", settings=["length=5"])
    published = worlds.begin(
        warehouse, "mmsrec", "world", preset="published", settings=["length=5"]
    )
    rankings = [run.config.monitor_seen for run in (default, published)]
    assert rankings == ["filtered", "kept"]


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("vqrec", ["code_bits=2", "codes=2"]),
        ("unisrec", ["ids=true", "experts=2"]),
        ("mmsrec", ["ids=true", "whiten=true"]),
    ],
)
def test_a_saved_run_opens_with_the_buffers_that_it_was_created_with(
    warehouse: Warehouse, monkeypatch: pytest.MonkeyPatch, model: str, settings: list[str]
) -> None:
    """They are in the weights, so they are fitted once; evaluation and resuming are equal."""
    world = worlds.cycles(n_items=12)
    bounds = zip(world.offsets, world.offsets[1:], strict=False)
    worlds.prepare(warehouse, [world.items[a:b].tolist() for a, b in bounds], 12)
    worlds.extract(warehouse, worlds.features(12))
    small = ["dim=8", "heads=2", "hidden=8", "length=5", "epochs=2", "device=cpu"]
    run = worlds.begin(warehouse, model, settings=[*small, *settings], name="r")
    train_run(run)
    fitted = open_run(warehouse, run.folder)
    buffers = {key: buffer.clone() for key, buffer in run.model.named_buffers()}
    rows = evaluate(warehouse, fitted, index="torch").rows

    def refuse(*_: object) -> None:
        raise AssertionError("the buffers are fitted again")

    monkeypatch.setattr(type(run.model), "fit_buffers", refuse)
    again = open_run(warehouse, run.folder)
    assert evaluate(warehouse, again, index="torch").rows == rows
    assert train_run(open_run(warehouse, run.folder), resume=True).finished
    own = dict(again.model.named_buffers())
    assert own.keys() == buffers.keys()
    assert buffers
    assert all(torch.equal(own[key], buffer) for key, buffer in buffers.items())
    with pytest.raises(AssertionError, match="fitted again"):
        worlds.begin(warehouse, model, settings=[*small, *settings])


def test_the_time_of_a_resumed_run_is_that_of_all_epochs(warehouse: Warehouse) -> None:
    run = begin(warehouse)
    train_run(run, on_progress=stop_at(5))  # in the second epoch
    path = run.folder / "metrics.parquet"
    rows = pq.read_table(path).to_pylist()
    for row in rows:
        if row["metric"] == "seconds":
            row["value"] = 1000.0
    write_table(path, pa.Table.from_pylist(rows, METRICS_SCHEMA))
    report = train_run(open_run(warehouse, run.folder), resume=True)
    assert 1000 < report.seconds < 1100
