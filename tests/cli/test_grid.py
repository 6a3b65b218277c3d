"""``mmrec grid`` on a world of a few rows: what it prints, reuses, and how it ends."""

import json
import re
import shlex
import signal
import tomllib
from pathlib import Path
from typing import Any

import pyarrow.csv as pa_csv
import pyarrow.json as pa_json
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from cli import console
from cli.grid_tables import show_pivot
from features.dataset import load_dataset
from features.errors import UserError
from features.warehouse import Warehouse
from retrieval.metrics import METRIC_NAMES
from tests.cli.invoke import run
from tests.marks import heavy_after
from tests.trainer import worlds
from trainer.checkpoint import read_tensors
from trainer.models.registry import MODELS, Model
from trainer.models.sasrec import SASRec
from trainer.runs import grid as runs_grid
from trainer.runs.grid_file import read_grid
from trainer.runs.grid_table import pivot
from trainer.runs.recipes import recipe_names
from trainer.runs.train import train_run

GRID = """
rows = ["fusion"]
columns = ["sequence_encoder"]
[runs]
model = "mmsr"
dim = 8
fusion_heads = 2
hidden = 8
epochs = 1
length = 5
device = "cpu"
fusion = ["sum", "merge-attention"]
sequence_encoder = ["sasrec", "gru"]
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "table.toml"
    path.write_text(GRID)
    return str(path)


@pytest.mark.slow
def test_a_stopped_grid_goes_on_and_prints_the_table(
    root: str, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    command_line = ("grid", file, "--warehouse", root)
    listed = json.loads(run(*command_line, "--dry-run", "--json").stdout)["runs"]
    assert [entry["state"] for entry in listed] == ["new"] * 4
    assert len({entry["run"] for entry in listed}) == 4
    assert Warehouse(root).runs() == []

    update = console.ProgressLine.update

    def interrupt(self: console.ProgressLine, text: str, **options: Any) -> None:
        update(self, text, **options)
        if re.match(r"3/4 .*: epoch ", text) and not options.get("keep"):
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(console.ProgressLine, "update", interrupt)
        stopped = run(*command_line, code=130)
    command = stopped.stderr.splitlines()[-1]
    assert command.startswith("stopped: 2 of 4 ")
    again = shlex.split(command.partition(" with: mmrec ")[2])
    assert again == list(command_line)
    body = [line.split() for line in stopped.stdout.splitlines()]
    assert body[1:3] == [["sasrec", "gru"], ["fusion", *["HR@10", "NDCG@10"] * 2]]
    assert body[4] == ["merge-attention", "-", "-", "-", "-"]
    states = [
        entry["state"]
        for entry in json.loads(run(*command_line, "--dry-run", "--json").stdout)["runs"]
    ]
    assert states == ["finished", "finished", "begun", "new"]

    done = run(*again)
    lines = done.stderr.splitlines()
    assert ["reused" in line for line in lines if "NDCG@10" in line] == [True, True, False, False]
    table = [line.split() for line in done.stdout.splitlines()]
    assert done.stdout.startswith("world, test split, filtered")
    for column in range(1, 5):
        cells = [row[column] for row in table[3:5]]
        values = [float(cell.removeprefix("*")) for cell in cells]
        is_single_best = [value == max(values) and values.count(value) == 1 for value in values]
        assert [cell[0] == "*" for cell in cells] == is_single_best

    document = json.loads(run(*command_line, "--json").stdout)
    assert [entry["state"] for entry in document["runs"]] == ["reused"] * 4
    shown = float(table[3][1].removeprefix("*"))
    assert document["runs"][0]["metrics"]["HR@10"] == pytest.approx(shown, abs=1e-4)
    result = pq.read_table(document["result"])
    assert result.column_names[:7] == [
        "model",
        "dataset",
        "features",
        "control",
        "fusion",
        "sequence_encoder",
        "run",
    ]
    assert set(result["split"].to_pylist()) == {"validation", "test"}
    assert len(set(result["run"].to_pylist())) == 4
    for ending in (".csv", ".jsonl", ".PARQUET"):
        out = Path(document["result"]).with_suffix(ending)
        run(*command_line, "--out", str(out))
        read = {".csv": pa_csv.read_csv, ".jsonl": pa_json.read_json, ".PARQUET": pq.read_table}
        table = read[ending](out)
        assert table.column_names == result.column_names
        assert table["value"].to_pylist() == result["value"].to_pylist()


@pytest.mark.slow
def test_a_run_that_fails_does_not_stop_the_others(
    root: str, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = runs_grid._train

    def break_one(warehouse: Any, one: Any, *more: Any) -> None:
        if one.combination.keys == {"fusion": "sum", "sequence_encoder": "gru"}:
            raise UserError("the loss is nan")
        train(warehouse, one, *more)

    monkeypatch.setattr(runs_grid, "_train", break_one)
    failed = run("grid", file, "--warehouse", root, code=2)
    assert "2/4 fusion=sum, sequence_encoder=gru: failed: the loss is nan" in failed.stderr
    assert failed.stderr.splitlines()[-1].startswith("error: 1 of 4 runs failed")
    assert failed.stdout.splitlines()[3].split()[-2:] == ["-", "-"]


def test_another_setting_or_other_features_are_another_run(root: str, file: str) -> None:
    command_line = ("grid", file, "--warehouse", root, "--dry-run", "--json")

    def names() -> set[str]:
        return {entry["run"] for entry in json.loads(run(*command_line).stdout)["runs"]}

    first = names()
    assert names() == first
    Path(file).write_text(GRID.replace("epochs = 1", "epochs = 2"))
    assert not names() & first
    Path(file).write_text(GRID + 'features = "text"\n')
    assert not names() & first


def test_what_a_run_cannot_be_is_refused_before_the_first_one(root: str, file: str) -> None:
    for line, message in (
        ("colour = 3", "table.toml, fusion=sum, sequence_encoder=sasrec: unknown setting 'colour'"),
        ("loss = ['bce', 'mse']", "the axis 'loss' is named neither"),
        ("dataset = 'none'", "dataset 'none' is not prepared"),
        ("features = 'video'", "has no feature table 'video'"),
    ):
        Path(file).write_text(f"{GRID}{line}\n")
        assert message in run("grid", file, "--warehouse", root, code=2).stderr
    assert Warehouse(root).runs() == []


@pytest.mark.parametrize("value", ["3", "-2.5", "{a = 1}", "'fusion'", "true", "[['fusion']]"])
@pytest.mark.parametrize("key", ["rows", "columns"])
def test_axes_that_are_no_names_are_refused(root: str, file: str, key: str, value: str) -> None:
    lines = [line for line in GRID.splitlines() if not line.startswith(key)]
    Path(file).write_text("\n".join([f"{key} = {value}", *lines]))
    assert "must be a list of names" in run("grid", file, "--warehouse", root, code=2).stderr


def test_columns_that_are_too_wide_stand_below_each_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "wide.toml"
    path.write_text("columns = ['lr']\n[runs]\nmodel = 'x'\nlr = [1, 2, 3, 4]\ndim = [8, 16]")
    asked = read_grid(path)
    monkeypatch.setattr(type(console.out), "width", 50)
    values: list[Any] = [{"HR@10": number / 10, "NDCG@10": 0.5} for number in range(8)]
    show_pivot(asked, pivot(asked, values), ["a"])
    printed = capsys.readouterr().out.splitlines()
    assert max(map(len, printed[1:])) <= 50
    assert [line.split() for line in printed if line.startswith("dim")] == [
        ["dim", "HR@10", "NDCG@10", "HR@10", "NDCG@10"]
    ] * 2
    assert [line.split()[0] for line in printed if "*" in line] == ["16", "16"]


def test_combinations_start_from_other_runs(root: str, file: str) -> None:
    fixed = (
        GRID[: GRID.index("fusion =")].partition("[runs]")[2]
        + 'fusion = "sum"\nsequence_encoder = "gru"'
    )
    variants = (
        "fresh = {init = ''}\nwhole = {init = 'source'}\n"
        "users = {init = 'source', transfer = 'users'}\n"
    )
    where = ("--warehouse", root)
    Path(file).write_text(f"rows = ['from']\n[runs]\n{fixed}\n[runs.from]\n{variants}")
    assert "unknown run 'source'" in run("grid", file, *where, code=2).stderr
    settings = [line.replace(" = ", "=").replace('"', "") for line in fixed.splitlines() if line]
    sets = [word for line in settings[1:] for word in ("--set", line)]
    run("train", "--model", "mmsr", "--name", "source", *sets, *where)
    planned = json.loads(run("grid", file, *where, "--dry-run", "--json").stdout)["runs"]
    assert len({entry["run"] for entry in planned}) == 3
    done = json.loads(run("grid", file, *where, "--json").stdout)["runs"]
    assert [entry["state"] for entry in done] == ["finished"] * 3
    starts = []
    for entry in done:
        path = Path(root) / "runs" / entry["run"] / "config.toml"
        init = tomllib.loads(path.read_text())["run"].get("init", {})
        starts.append((init.get("run"), init.get("transfer")))
    assert starts == [(None, None), ("source", "full"), ("source", "users")]

    text = Path(file).read_text()
    both = text.replace('model = "mmsr"', 'model = ["mmsr", "idsr"]').replace(
        "['from']", "['from', 'model']"
    )
    Path(file).write_text(both.replace('fusion = "sum"\n', ""))
    message = run("grid", file, *where, "--dry-run", code=2).stderr
    assert "model=idsr" in message

    run("train", "--model", "idsr", "--name", "ids", "--set", "epochs=1", *where)
    Path(file).write_text(text.replace("'source'", "'ids'"))
    message = run("grid", file, *where, code=2).stderr
    assert "from=whole: run 'ids' is of 'idsr', its weights have no place in 'mmsr'" in message


def test_weights_that_changed_since_the_plan_are_not_trained_from(root: str, file: str) -> None:
    where = ("--warehouse", root)
    settings = ("--set", "dim=8", "--set", "hidden=8", "--set", "length=5", "--set", "epochs=1")
    run("train", "--model", "sasrec", "--name", "source", *settings, *where)
    Path(file).write_text(
        "[runs]\nmodel = 'sasrec'\ninit = 'source'\ndim = 8\nhidden = 8\nlength = 5\nepochs = 1\n"
    )
    warehouse = Warehouse(root)
    planned = runs_grid.plan_grid(warehouse, read_grid(Path(file)))
    path = warehouse.runs_dir / "source" / "model.safetensors"
    tensors, document = read_tensors(path, "")
    tensors["item_encoder.weight"] += 1
    save_file(tensors, path, metadata={"mmrec": json.dumps(document)})
    outcome = next(runs_grid.run_grid(warehouse, planned))
    assert outcome.state == "failed"
    assert re.search(r"from run 'source', whose weights have changed .*try again", outcome.message)
    assert not runs_grid.is_begun(warehouse, planned[0])


@pytest.mark.parametrize(
    ("model", "setting"), [("unisrec", "freeze"), ("vqrec", "freeze"), ("vqrec", "permute")]
)
def test_a_plan_refuses_settings_of_given_weights_without_a_run(
    root: str, file: str, model: str, setting: str
) -> None:
    Path(file).write_text(f"[runs]\nmodel = '{model}'\n{setting} = true\n")
    message = run("grid", file, "--dry-run", "--warehouse", root, code=2).stderr
    assert re.search(rf"{setting}=true.*--init", message)


class Popular(SASRec):
    """The same configuration as SASRec; the first items of the catalogue always come first."""

    def encode_sequences(self, *arguments: Any) -> Tensor:
        return torch.zeros_like(super().encode_sequences(*arguments))


def test_two_models_of_one_configuration_class_are_two_runs(
    root: str, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Model("tests.cli.test_grid:Popular", "the first items always come first")
    monkeypatch.setitem(MODELS, "popular", other)
    Path(file).write_text(
        "rows = ['model']\n[runs]\nmodel = ['sasrec', 'popular']\n"
        "dim = 8\nheads = 2\nhidden = 8\nlength = 5\nepochs = 1\n"
    )
    done = json.loads(run("grid", file, "--warehouse", root, "--json").stdout)["runs"]
    assert [entry["state"] for entry in done] == ["finished"] * 2
    assert len({entry["run"] for entry in done}) == 2
    assert done[0]["metrics"] != done[1]["metrics"]


@pytest.mark.slow
def test_a_run_out_of_memory_is_a_failed_cell_and_the_others_are_printed(
    root: str, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = train_run

    def train_small(trained: Any, **options: Any) -> Any:
        if trained.spec.settings.fusion == "merge-attention":
            torch.empty(2**50)
        return train(trained, **options)

    monkeypatch.setattr(runs_grid, "train_run", train_small)
    result = run("grid", file, "--warehouse", root, code=2)
    failed = [line for line in result.stderr.splitlines() if "failed: " in line]
    assert len(failed) == 2
    assert all("out of memory" in line and "give smaller settings" in line for line in failed)
    assert re.search(r"^sum +\*?\d\.\d{4}", result.stdout, re.MULTILINE)
    assert "2 of 4 runs failed" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), TypeError("a bug")])
def test_an_error_that_ends_the_grid_comes_after_the_finished_rows(
    error: Exception, root: str, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = train_run

    def train_some(trained: Any, **options: Any) -> Any:
        if trained.spec.settings.fusion == "merge-attention":
            raise error
        return train(trained, **options)

    monkeypatch.setattr(runs_grid, "train_run", train_some)
    code = 2 if isinstance(error, OSError) else 1
    result = run("grid", file, "--warehouse", root, code=code)
    assert re.search(r"^sum +\*?\d\.\d{4}", result.stdout, re.MULTILINE)
    assert "No space left" in result.stderr or result.exception is error


TINY = ("--set", "device=cpu", "--quick", "--json")


@pytest.mark.slow
def test_a_recipe_runs_to_its_end_and_shares_its_pre_training(root: str, tmp_path: Path) -> None:
    where = ("--warehouse", root, "--out", str(tmp_path / "result.parquet"))
    waiting = run("grid", "pmmrec/table-6", *where, *TINY, "--dry-run").stdout
    states = [entry["state"].split(" ")[0] for entry in json.loads(waiting)["runs"]]
    assert states == ["new", "new", "after"]
    document = json.loads(run("grid", "pmmrec/table-6", *where, *TINY).stdout)
    assert [entry["state"] for entry in document["runs"]] == ["finished"] * 3
    source = next(entry for entry in document["runs"] if entry["source"] == "world")
    runs = Path(root) / ".quick" / "runs"
    config = tomllib.loads((runs / source["run"] / "config.toml").read_text())
    pretrained = runs / config["run"]["init"]["run"] / "config.toml"
    assert tomllib.loads(pretrained.read_text())["run"]["stage"] == "pretrain"
    assert len(Warehouse(runs.parent).runs()) == 4
    assert Warehouse(root).runs() == []

    again = json.loads(run("grid", "pmmrec/table-6", *where, *TINY).stdout)
    assert [entry["state"] for entry in again["runs"]] == ["reused"] * 3
    shared = json.loads(run("grid", "pmmrec/figure-3", *where, *TINY).stdout)
    assert [entry["state"] for entry in shared["runs"]] == [
        "reused", "finished", "finished", "reused",
    ]  # fmt: skip
    assert len(Warehouse(runs.parent).runs()) == 6

    table = run("grid", "pmmrec/table-6", *where, *TINY[:-1]).stdout.splitlines()
    assert [line.split()[0] for line in table if "HR@10" in line or "NDCG@10" in line] == [
        "world", "NDCG@10",
    ]  # fmt: skip


def test_an_option_that_no_run_of_the_grid_can_take_is_refused(root: str, file: str) -> None:
    for options, message in (
        (("--set", "colour=3"), "unknown setting 'colour'"),
        (("--set", "fusion=gate"), "fusion is an axis of the grid; leave it out"),
        (("--features", "sound=x"), "unknown modality 'sound'"),
        (("--source", "world"), "has no pre-training; leave --source out"),
    ):
        result = run("grid", file, "--warehouse", root, "--dry-run", *options, code=2)
        assert message in result.stderr
    assert Warehouse(root).runs() == []


def test_the_list_names_every_recipe_and_its_differences() -> None:
    listed = json.loads(run("grid", "--list", "--json").stdout)
    assert [entry["recipe"] for entry in listed] == recipe_names()
    text = run("grid", "--list").stdout
    assert all(f"{entry['recipe']}: " in text for entry in listed)
    commands = [command for entry in listed for command in entry["first"]]
    assert all(command.startswith("mmrec extract --dataset ") for command in commands)
    assert all(command in text for command in commands)


def test_the_list_of_a_name_is_one_recipe() -> None:
    listed = json.loads(run("grid", "--list", "--json").stdout)
    named = json.loads(run("grid", "mmsr/table-3", "--list", "--json").stdout)
    assert named == [entry for entry in listed if entry["recipe"] == "mmsr/table-3"]


@pytest.mark.parametrize("name", ["mmsr/table-1", "pmmrec/table-2"])
@pytest.mark.parametrize(
    "options",
    [("--plot", "x.png"), ("--source", "s"), ("--set", "dim=3"), ("--features", "text")],
)
def test_a_table_of_datasets_refuses_the_options_of_runs(
    root: str, name: str, options: tuple[str, ...]
) -> None:
    result = run("grid", name, *options, "--warehouse", root, code=2)
    assert f"leave {options[0]} out" in result.stderr


def test_the_statistics_count_cold_sequences_in_both_ways(root: str) -> None:
    rows = json.loads(run("grid", "mmsr/table-1", "--warehouse", root, "--json").stdout)
    dataset = load_dataset(Warehouse(root), "world")
    histories = [
        dataset.items[begin:end].tolist()
        for begin, end in zip(dataset.offsets, dataset.offsets[1:], strict=False)
    ]
    cold = {item for item, count in enumerate(dataset.train_counts) if count < 10}
    assert rows[0]["cold_occurrences"] == sum(item in cold for h in histories for item in h[1:])
    assert rows[0]["cold_targets"] == sum(
        item in cold for h in histories if len(h) > 2 for item in h[-2:]
    )


@pytest.mark.parametrize("targets", ["cold", "new"])
def test_the_table_of_a_subset_of_the_targets(root: str, file: str, targets: str) -> None:
    Path(file).write_text(
        f"targets = '{targets}'\nseen = 'kept'\n[runs]\nmodel = 'popularity'\nseed = [1]\n"
    )
    done = json.loads(run("grid", file, "--warehouse", root, "--json").stdout)
    rows = pq.read_table(done["result"]).to_pylist()
    wanted = {
        row["metric"]: row["value"]
        for row in rows
        if (row["split"], row["seen"], row["targets"]) == ("test", "kept", targets)
    }
    if targets == "new" and not wanted:
        wanted = {
            row["metric"]: row["value"]
            for row in rows
            if (row["split"], row["seen"], row["targets"]) == ("test", "kept", "all")
            and row["metric"] in METRIC_NAMES
        }
    metrics = done["runs"][0]["metrics"] or {}
    assert {name: value for name, value in metrics.items() if name in METRIC_NAMES} == wanted


@pytest.fixture
def large(warehouse: Warehouse) -> str:
    """Return the path of a warehouse with enough items for an alignment."""
    world = worlds.cycles(n_items=60)
    bounds = zip(world.offsets, world.offsets[1:], strict=False)
    worlds.prepare(warehouse, [world.items[a:b].tolist() for a, b in bounds], 60)
    worlds.extract(warehouse, worlds.features(60))
    return str(warehouse.root)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "ranker"), [("Ours", "mmsrec"), ("Clip", "features")])
def test_a_retrieval_grid_prints_what_the_protocol_measures(
    method: str, ranker: str, large: str, tmp_path: Path
) -> None:
    where = ("--warehouse", large, "--out", str(tmp_path / "result.parquet"))
    share = ("--set", "holdout=0.3")
    document = json.loads(run("grid", "mmsrec/table-1", *where, *share, *TINY).stdout)
    entry = next(entry for entry in document["runs"] if entry["method"] == method)
    place = ("--warehouse", f"{large}/.quick")
    again = run("eval", "--protocol", "retrieval", "--run", entry["run"], *place, "--json")
    expected = {
        row["metric"]: row["value"]
        for row in json.loads(again.stdout)["rows"]
        if (row["split"], row["targets"], row["ranker"]) == ("test", "text-to-vision", ranker)
    }
    assert entry["metrics"] == (expected or None)
    assert {entry["run"] for entry in document["runs"]} == {entry["run"]}


def test_a_recipe_names_its_tables_and_the_command_that_makes_them(root: str) -> None:
    where = ("--warehouse", root, "--dry-run")
    refused = run("grid", "mmsr/table-14", *where, code=2).stderr
    assert "mmrec extract --dataset world --image mae-b --level layer-10" in refused
    own = ("--features", "image=other,text=other")
    assert (
        "no feature table 'image=other'"
        in run("grid", "mmsr/table-14", *where, *own, code=2).stderr
    )


def test_a_model_without_pre_training_is_trained_on_one_source(root: str, tmp_path: Path) -> None:
    file = tmp_path / "table.toml"
    file.write_text(
        "[pretrain.p]\nmodel = 'mmsr'\ndatasets = ['world', 'other']\n"
        "[runs]\nmodel = 'mmsr'\ninit = 'p'\n"
    )
    refused = run("grid", str(file), "--warehouse", root, "--dry-run", code=2).stderr
    assert "mmsr is trained on one dataset, not on world, other" in refused


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "shown"),
    heavy_after(
        2,
        [
            ("pmmrec/figure-3", ["epoch", "training time", "w. PT-I", "validation HR@10"]),
            ("mmsrec/figure-3", ["Recall@10", "NDCG@50", "w/o P+V", "world"]),
            ("mmsrec/figure-2", ["Recall@10", "k-core", "SASRec", "Ours"]),
            ("mmsr/table-12", ["HR@10", "NDCG@10", "top 5e-5, downstream 1e-4"]),
        ],
    ),
)
def test_a_recipe_draws_its_figure(
    recipe: str, shown: list[str], large: str, tmp_path: Path
) -> None:
    figure = tmp_path / "figure.svg"
    share = ("--set", "holdout=0.3") if recipe.startswith("mmsrec") else ()
    where = ("--warehouse", large, "--out", str(tmp_path / "result.parquet"), *share)
    document = json.loads(run("grid", recipe, *where, "--plot", str(figure), *TINY).stdout)
    text = figure.read_text()
    assert all(name in text for name in shown)
    speed_ups = document.get("speed_up", [])
    assert [row["label"] for row in speed_ups] == (
        ["w/o PT", "w. PT-I", "w. PT-U", "w. PT"] if recipe == "pmmrec/figure-3" else []
    )


def test_an_unknown_kind_of_image_is_refused_before_anything_is_run(root: str, file: str) -> None:
    refused = run("grid", file, "--warehouse", root, "--plot", "figure.bmp", code=2).stderr
    assert "figure.bmp is not an image file; end it in .png, .svg, .pdf" in refused
    assert Warehouse(root).runs() == []


@pytest.mark.slow
def test_a_map_is_the_command_that_comes_next(root: str, tmp_path: Path) -> None:
    where = ("--warehouse", root, "--out", str(tmp_path / "result.parquet"))
    runs = json.loads(run("grid", "mmsr/figure-4", *where, *TINY).stdout)["runs"]
    printed = run("grid", "mmsr/figure-4", *where, *TINY[:-1]).stdout
    names = " ".join(entry["run"] for entry in runs)
    typed = " ".join(printed.split()).partition("now type: mmrec map ")[2]
    assert typed.startswith(f"{names} --label IDSR --label MMSR")
    assert typed.endswith(f"--warehouse {root}/.quick")


@pytest.mark.slow
def test_a_figure_without_its_baseline_is_drawn_and_without_any_run_is_left_out(
    large: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = runs_grid._train
    broken = {"w/o PT"}

    def break_some(warehouse: Any, one: Any, *more: Any) -> None:
        if one.combination.keys["transferred"] in broken:
            raise UserError("the loss is nan")
        train(warehouse, one, *more)

    monkeypatch.setattr(runs_grid, "_train", break_some)
    figure = tmp_path / "figure.svg"
    where = ("--warehouse", large, "--out", str(tmp_path / "result.parquet"), *TINY)
    command_line = ("grid", "pmmrec/figure-3", *where, "--plot", str(figure))
    document = json.loads(run(*command_line, code=2).stdout)
    assert document["speed_up"] == []
    assert "w. PT-I" in figure.read_text()
    figure.unlink()
    broken |= {"w. PT", "w. PT-I", "w. PT-U"}
    failed = run(*command_line, "--set", "dropout=0.3", code=2)
    assert "error: 4 of 4 runs failed" in failed.stderr
    assert json.loads(failed.stdout)["speed_up"] == []
    assert not figure.exists()


@pytest.mark.slow
def test_a_run_and_a_pre_training_of_equal_settings_are_two_runs(root: str, tmp_path: Path) -> None:
    where = ("--warehouse", root, "--out", str(tmp_path / "result.parquet"), *TINY)
    file = tmp_path / "whole.toml"
    file.write_text(
        "[runs]\nmodel = 'pmmrec'\npreset = 'published'\nfeatures = 'image,text'\n"
        "align = 'nicl'\nnid = true\nrcl = true\n"
    )
    for recipe in ("pmmrec/table-6", str(file), "pmmrec/table-6"):
        document = json.loads(run("grid", recipe, *where).stdout)
        assert all(entry["metrics"] for entry in document["runs"])


@pytest.mark.parametrize(
    "name", ["mmsr/table-5", "mmsr/table-8", "mmsr/table-10", "mmsr/figure-3", "pmmrec/table-4"]
)
def test_a_recipe_with_tuned_blocks_takes_pooled_tables(name: str, root: str) -> None:
    pooled = ("--features", "image=toy,text=toy", "--set", "tune_blocks=0")
    listed = run("grid", name, "--warehouse", root, *pooled, "--dry-run", "--json").stdout
    assert {entry["state"].split(" ")[0] for entry in json.loads(listed)["runs"]} == {
        "new", "after",
    } - ({"after"} if name in ("mmsr/table-5", "mmsr/table-8") else set())  # fmt: skip


def test_blocks_are_tuned_only_in_models_that_read_tokens(root: str, tmp_path: Path) -> None:
    file = tmp_path / "table.toml"
    file.write_text("[runs]\nmodel = ['idsr', 'mmsr']\ntune_blocks = 2\n")
    plan = ("grid", str(file), "--warehouse", root, "--dry-run", "--json")
    tuned, pooled = (
        {entry["model"]: entry["run"] for entry in json.loads(run(*options).stdout)["runs"]}
        for options in (plan, (*plan, "--set", "tune_blocks=0"))
    )
    assert tuned["idsr"] == pooled["idsr"]
    assert tuned["mmsr"] != pooled["mmsr"]
    file.write_text("[runs.method]\na = {model = 'idsr', tune_blocks = 2}\n")
    refused = run(*plan, code=2).stderr
    assert "tune_blocks=2 is for models that read tokens" in refused
