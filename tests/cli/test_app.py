"""The commands as a user types them, on the small dataset that the program makes."""

import csv
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.cli.invoke import run
from trainer.models.registry import MODELS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A warehouse in which the whole way has been gone once."""
    root = str(tmp_path_factory.mktemp("cli") / "warehouse")
    run("prepare", "--dataset", "demo", "--warehouse", root)
    run("extract", "--image", "hashed", "--text", "hashed", "--warehouse", root)
    for model in ("sasrec", "mmsrec"):
        small = ["dim=16", "heads=2", "hidden=16", "epochs=2", "length=8", "device=cpu"]
        sets = [word for entry in small for word in ("--set", entry)]
        run("train", "--model", model, "--name", model, *sets, "--warehouse", root)
        run("eval", "--index", "faiss", "--run", model, "--warehouse", root)
    return root


def rows(root: str, statement: str) -> list[dict[str, Any]]:
    return list(json.loads(run("sql", statement, "--json", "--warehouse", root).stdout))


def test_a_flag_takes_no_value() -> None:
    shown = run("extract", "--help").output
    assert "--strict" in shown
    assert "<str>" in shown
    assert shown.count("<bool>") <= 1  # of --help, which is not ours


@pytest.mark.parametrize(
    ("form", "shown"),
    [("--json", '"caf\\u00e9 \\ud83c\\udfac"'), ("--csv", "café 🎬"), ("", "caf\\xe9 \\U0001f3ac")],
)
def test_a_terminal_without_unicode_shows_escapes(tmp_path: Path, form: str, shown: str) -> None:
    arguments = ["sql", "SELECT 'café 🎬' AS a", *[form] * bool(form), "--warehouse", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "cli.app", *arguments], capture_output=True, check=True, cwd=ROOT,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert shown in done.stdout.decode()
    assert not done.stderr  # DuckDB reports the objects that are left when Python ends


@pytest.mark.slow
def test_the_indexes_agree_and_evaluation_is_repeatable(root: str) -> None:
    found: dict[str, tuple[Any, Any]] = {}
    for index in ("faiss", "torch", "faiss"):
        document = json.loads(
            run("eval", "--index", index, "--run", "mmsrec", "--json", "--warehouse", root).stdout
        )
        ranks = pq.read_table(Path(root) / "runs" / "mmsrec" / "predictions.parquet")
        found.setdefault(index, (document["rows"], ranks))
        assert found[index][0] == document["rows"]
        assert found[index][1].equals(ranks)
    assert found["faiss"][1].equals(found["torch"][1])
    assert found["faiss"][0] == found["torch"][0]


@pytest.mark.slow
def test_ranks_and_metrics_equal_a_plain_recomputation(root: str) -> None:
    """Vectors from the run, scores and ranks in plain numpy, metrics by their definition."""
    import torch

    from features.dataset import load_dataset
    from features.warehouse import Warehouse
    from trainer.checkpoint import load_weights
    from trainer.evaluation.encode import encode_catalogue, encode_histories
    from trainer.runs.run import open_run

    warehouse = Warehouse(root)
    opened = open_run(warehouse, warehouse.runs_dir / "mmsrec")
    load_weights(opened.weights, opened.model, opened.spec.identity())
    dataset = load_dataset(warehouse, "demo")
    table = pq.read_table(opened.folder / "predictions.parquet").to_pylist()
    for split, back in (("validation", 2), ("test", 1)):
        users = dataset.eval_split(split)
        items_ND = encode_catalogue(opened.model, opened.data)
        queries_ED = encode_histories(opened.model, opened.data, items_ND, users, 64)
        queries, items = (x.numpy().astype(np.float64) for x in (queries_ED, items_ND))
        mine = {row["user"]: row for row in table if row["split"] == split}
        filtered = []
        for user, query in zip(users.users.tolist(), queries, strict=True):
            sequence = dataset.items[dataset.offsets[user] : dataset.offsets[user + 1]].tolist()
            target, seen = sequence[-back], set(sequence[:-back])
            scores = items @ query
            ahead = np.flatnonzero(scores >= scores[target])
            others = [item for item in ahead.tolist() if item != target]
            unseen = [item for item in others if item not in seen]
            assert mine[user]["item"] == target
            assert mine[user]["rank_kept"] == 1 + len(others)
            assert mine[user]["rank_filtered"] == 1 + len(unseen)
            filtered.append(1 + len(unseen))
        ranks = np.array(filtered)
        expected = {
            "HR@10": (ranks <= 10).mean(),
            "NDCG@10": np.where(ranks <= 10, 1 / np.log2(ranks + 1), 0).mean(),
            "MRR": (1 / ranks).mean(),
        }
        for metric, value in expected.items():
            measured = rows(
                root,
                f"SELECT value, low, high FROM metrics WHERE run = 'mmsrec' AND phase = 'eval'"
                f" AND split = '{split}' AND targets = 'all' AND ranker = 'mmsrec'"
                f" AND seen = 'filtered' AND metric = '{metric}'",
            )
            assert len(measured) == 1
            assert measured[0]["value"] == pytest.approx(value, abs=1e-12)
            assert measured[0]["low"] <= measured[0]["value"] <= measured[0]["high"]
    torch.manual_seed(0)


@pytest.mark.slow
def test_the_views_hold_what_was_done(root: str) -> None:
    count = "SELECT count(*) AS n FROM"
    assert rows(root, f"{count} items")[0]["n"] > 0
    assert rows(root, f"{count} features WHERE modality = 'image'")[0]["n"] > 0
    assert rows(root, f"{count} failures")[0]["n"] >= 1
    assert [r["run"] for r in rows(root, "SELECT run FROM runs ORDER BY created")] == [
        "sasrec",
        "mmsrec",
    ]
    near = rows(
        root,
        "SELECT b.item, array_cosine_similarity(a.embedding, b.embedding) AS c"
        " FROM features_demo_hashed_text a, features_demo_hashed_text b"
        " WHERE a.item = (SELECT min(item) FROM features_demo_hashed_text) ORDER BY c DESC LIMIT 1",
    )
    assert near[0]["c"] == pytest.approx(1, abs=1e-3)
    losses = rows(
        root, "SELECT epoch FROM metrics WHERE run = 'sasrec' AND metric = 'loss' ORDER BY epoch"
    )
    assert [row["epoch"] for row in losses] == [1, 2]


@pytest.mark.slow
def test_sql_prints_csv_and_a_table(root: str) -> None:
    statement = "SELECT split, count(*) AS n FROM splits GROUP BY split ORDER BY split"
    text = run("sql", statement, "--csv", "--warehouse", root).stdout
    assert [row["split"] for row in csv.DictReader(io.StringIO(text))] == [
        "test",
        "train",
        "validation",
    ]
    assert "validation" in run("sql", statement, "--warehouse", root).stdout
    lists = run("sql", "SELECT embedding FROM features LIMIT 1", "--csv", "--warehouse", root)
    assert lists.stdout.count("\n") == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sql", "SELEC 1"], "syntax error"),
        (["sql", "SELECT nope FROM items"], "nope"),
        (["sql", "SELECT * FROM nope"], "the views are items"),
        (["sql", "DROP VIEW items"], "not DROP"),
        (["sql", "SELECT 1; SELECT 2"], "one SQL statement"),
        (["sql", "SELECT * FROM read_text('/etc/hostname')"], "Permission"),
        (["sql", "SELECT 1", "--csv", "--json"], "exclude each other"),
        (["train", "--model", "nope"], "unknown model 'nope'; known: "),
        (["train", "--model", "sasrec", "--set", "dimm=3"], "unknown setting 'dimm'"),
        (["train", "--model", "mmsrec", "--features", "video"], "no feature table 'video'"),
        (["train", "--model", "mmsrec", "--features", "smell=x"], "unknown modality 'smell'"),
        (["train", "--model", "sasrec", "--features", "text"], "item ids alone"),
        (["train", "--model", "sasrec", "--dataset", "nope"], "'nope' is not prepared"),
        (["train", "--model", "sasrec", "--name", "sasrec"], "give another name by --name"),
        (["train", "--model", "sasrec", "--name", "../x"], "cannot be a folder"),
        (["train"], "give --model"),
        (["train", "--resume", "--run", "nope"], "unknown run 'nope'"),
        (["train", "--resume", "--run", "sasrec", "--model", "mmsrec"], "is of 'sasrec'"),
        (["train", "--resume", "--set", "dim=3"], "leave --features"),
        (["train", "--run", "sasrec", "--model", "sasrec"], "add --resume"),
        (["eval", "--index", "annoy"], "unknown index 'annoy'"),
        (["eval", "--run", "nope"], "unknown run 'nope'; known: sasrec, mmsrec"),
        (["extract", "--dataset", "nope"], "nope"),
        (["extract", "--image", "nope"], "unknown backbone 'nope'"),
        (["prepare", "--dataset", "nope"], "unknown dataset 'nope'"),
        (["prepare", "--dataset", "ml-1m", "--raw", "nowhere"], "nowhere"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    root: str, arguments: list[str], message: str
) -> None:
    result = run(*arguments, "--warehouse", root, code=2)
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.output
    assert message in lines[0]
    assert "Traceback" not in result.output


@pytest.mark.slow
def test_a_finished_run_resumes_to_nothing(root: str) -> None:
    before = (Path(root) / "runs" / "sasrec" / "model.safetensors").read_bytes()
    document = json.loads(
        run("train", "--resume", "--run", "sasrec", "--json", "--warehouse", root).stdout
    )
    assert document["finished"]
    assert (Path(root) / "runs" / "sasrec" / "model.safetensors").read_bytes() == before


def test_a_folder_that_is_no_warehouse(tmp_path: Path) -> None:
    (tmp_path / "thesis.doc").write_text("mine")
    for arguments in (
        ["datasets"],
        ["sql", "SELECT 1"],
        ["prepare", "--dataset", "demo"],
        ["eval"],
    ):
        result = run(*arguments, "--warehouse", str(tmp_path), code=2)
        assert "is not a warehouse and not empty" in result.stderr
    result = run("datasets", "--warehouse", str(tmp_path / "thesis.doc"), code=2)
    assert "is a file" in result.stderr


def test_an_empty_warehouse_says_what_to_do(tmp_path: Path) -> None:
    root = str(tmp_path / "none")
    assert "mmrec prepare" in run("train", "--model", "sasrec", "--warehouse", root, code=2).stderr
    assert "mmrec train" in run("eval", "--warehouse", root, code=2).stderr
    assert "mmrec prepare" in run("sql", "SELECT 1", "--warehouse", root, code=2).stderr
    Path(root).mkdir()
    assert json.loads(run("sql", "SELECT * FROM runs", "--json", "--warehouse", root).stdout) == []


def test_lists_take_json(tmp_path: Path) -> None:
    for arguments in (["datasets", "--warehouse", str(tmp_path)], ["models"], ["backbones"]):
        assert json.loads(run(*arguments, "--json").stdout)
        assert run(*arguments).stdout


def test_models_are_listed_without_torch() -> None:
    code = (
        "import sys; from cli.app import app\n"
        "for arguments in (['--help'], ['models'], ['models', '--json'], ['backbones']):\n"
        "    try: app(arguments)\n"
        "    except SystemExit as end: assert not end.code, arguments\n"
        "    if 'torch' in sys.modules: sys.exit(f'{arguments} imports torch')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(run("models", "--json").stdout)
    assert {entry["model"] for entry in document["models"]} == {*MODELS}
    printed = run("models").stdout
    for entry in document["models"]:
        assert entry["origin"]
        assert entry["summary"] in printed


@pytest.mark.parametrize("name", list(MODELS))
def test_the_settings_of_a_model_are_explained(name: str) -> None:
    document = json.loads(run("models", name, "--json").stdout)
    printed = run("models", name).stdout
    settings = [*document["settings"], *document["training"], *document["pretraining"]]
    for setting in settings:
        assert setting["meaning"], setting
        assert re.search(rf"^{setting['name']} .*{re.escape(setting['meaning'])}$", printed, re.M)
    defaults = {setting["name"]: setting["default"] for setting in document["training"]}
    chosen = MODELS[name].load().train_defaults
    assert {key: defaults[key] for key in chosen} == dict(chosen)
    assert "full" in document["transfers"]
    for options in document["variants"].values():
        assert options in printed


@pytest.mark.slow
def test_a_run_is_not_evaluated_on_other_interactions(tmp_path: Path) -> None:
    """The same items, each user's history cut: yesterday's training targets would be tested."""
    raw, root = tmp_path / "raw", str(tmp_path / "w")
    raw.mkdir()

    def prepare(last: int) -> None:
        lines = [f"u{u},i{(u + k) % 6},{k}" for u in range(12) for k in range(last)]
        text = "\n".join(["user_id,item_id,timestamp", *lines]) + "\n"
        (raw / "interactions.csv").write_text(text)
        (raw / "items.csv").write_text("item_id\n" + "".join(f"i{n}\n" for n in range(6)))
        arguments = ("--format", "table", "--raw", str(raw), "--k-core", "0")
        run("prepare", "--dataset", "s", *arguments, "--warehouse", root)

    prepare(8)
    small = ("--set", "epochs=1", "--set", "dim=8", "--name", "old")
    run("train", "--model", "sasrec", *small, "--warehouse", root)
    run("eval", "--run", "old", "--warehouse", root)
    prepare(6)
    for arguments in (("eval",), ("train", "--resume")):
        message = run(*arguments, "--run", "old", "--warehouse", root, code=2).stderr
        assert "'old'" in message
        assert "another preparation of 's'" in message


def test_a_mistyped_option_or_command_is_one_line(tmp_path: Path) -> None:
    for arguments in (
        ["train", "--modle", "sasrec"],
        ["trian"],
        ["sql"],
        ["prepare", "--k-core", "x"],
    ):
        message = run(*arguments, code=2).stderr
        assert message.startswith("error: ")
        assert message.count("\n") == 1
        assert "--help" in message
    message = run("--warehouse", str(tmp_path), "eval", code=2).stderr
    assert message.startswith("error: ")
    assert "--warehouse" in message
    assert "after the command" in message
    assert message.count("\n") == 1
    assert "Usage" in run(code=2).output  # no arguments at all are answered by help


def test_a_folder_that_may_not_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    root = tmp_path / "file" / "below"
    result = run("prepare", "--dataset", "demo", "--warehouse", str(root), code=2)
    assert result.stderr.splitlines()[-1].startswith(f"error: {tmp_path / 'file'}")


def test_sql_gives_numbers_and_texts_that_others_can_read(tmp_path: Path) -> None:
    (tmp_path / "w").mkdir()
    ask = ("--warehouse", str(tmp_path / "w"))
    statement = "SELECT sum(range) AS s, 0.5::DECIMAL(4, 2) AS d FROM range(3)"
    assert json.loads(run("sql", statement, "--json", *ask).stdout) == [{"s": 3, "d": 0.5}]
    statement = "SELECT [1, NULL] AS l, INTERVAL 3 DAY AS i"
    (row,) = csv.DictReader(io.StringIO(run("sql", statement, "--csv", *ask).stdout))
    assert json.loads(row["l"]) == [1, None]
    assert "3" in row["i"]


def test_help_shows_names_in_brackets() -> None:
    assert "[runs]" in run("grid", "--help").output


@pytest.mark.parametrize("part", ["full", "items", "users", "text", "image", "video"])
def test_help_names_every_part_that_is_transferred(part: str) -> None:
    _, _, after = run("train", "--help").output.partition("--transfer")
    assert part in after.partition("--tune-blocks")[0]


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "--model", "{}"),
        ("train", "--model", "sasrec", "--set", "{}=1"),
        ("train", "--model", "sasrec", "--set", "{}"),
        ("eval", "--run", "{}"),
        ("prepare", "--dataset", "{}"),
        ("extract", "--image", "{}"),
        ("{}",),
    ],
    ids=" ".join,
)
def test_a_very_long_value_is_shortened(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    words = [word.format("x" * 100_000) for word in arguments]
    root = () if arguments == ("{}",) else ("--warehouse", str(tmp_path / "w"))
    (line,) = run(*words, *root, code=2).stderr.splitlines()[-1:]
    assert line.startswith("error: ")
    assert len(line) < 5000
    assert "left out" in line or "xxxx" not in line
