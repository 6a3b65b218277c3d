import re
import subprocess
import sys
from pathlib import Path

import pytest

from features.errors import UserError
from features.schema import FEATURE_MODALITIES
from trainer.runs.grid_axes import MODALITIES
from trainer.runs.grid_file import Grid, read_grid
from trainer.runs.grid_table import pivot


def read(folder: Path, text: str) -> Grid:
    path = folder / "grid.toml"
    path.write_text(text)
    return read_grid(path)


def test_lists_are_crossed_in_the_order_of_the_file(tmp_path: Path) -> None:
    grid = read(
        tmp_path,
        """
        columns = ["dataset"]
        [runs]
        model = "mmsr"
        dataset = ["a", "b"]
        dnn = [false, true]
        seed = [1, 2]
        lr = 0.01
        """,
    )
    assert (grid.rows, grid.columns) == (["dnn"], ["dataset"])
    assert (grid.split, grid.seen, grid.metrics) == ("test", "filtered", ["HR@10", "NDCG@10"])
    assert len(grid.combinations) == 8
    first, second = grid.combinations[:2]
    assert first.keys == {"dataset": "a", "dnn": "false", "seed": "1"}
    assert second.keys == {"dataset": "a", "dnn": "false", "seed": "2"}
    assert first.settings == {"lr": 0.01, "dnn": False, "seed": 1}
    assert (first.model, first.dataset, first.features) == ("mmsr", "a", None)
    assert first.label == "dataset=a, dnn=false, seed=1"


def test_a_table_is_an_axis_of_variants(tmp_path: Path) -> None:
    grid = read(
        tmp_path,
        """
        rows = ["sequence_encoder"]
        columns = ["system"]
        [runs]
        model = "mmsr"
        sequence_encoder = ["sasrec", "gru"]
        [runs.system]
        IDSR = { model = "idsr" }
        MMSR-T = { features = "text", fusion = "sum" }
        """,
    )
    assert [
        (combination.keys["system"], combination.model, combination.features)
        for combination in grid.combinations
    ] == [
        ("IDSR", "idsr", None),
        ("MMSR-T", "mmsr", "text"),
        ("IDSR", "idsr", None),
        ("MMSR-T", "mmsr", "text"),
    ]
    assert grid.combinations[3].settings == {"sequence_encoder": "gru", "fusion": "sum"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[runs", "is not TOML"),
        ("", "there is no table [runs]"),
        ("[runs]", "there is no table [runs]"),
        ("runs = 3", "there is no table [runs]"),
        ("[runs]\nlr = 1.0", "[runs] sets no model"),
        ("[runs]\nmodel = 3", "model=3 must be text"),
        ("model = 'x'\n[runs]\nmodel = 'x'", "unknown key 'model'; known: rows, columns"),
        ("rows = 3\n[runs]\nmodel = 'x'", "rows=3 must be a list of names"),
        ("rows = ['lr']\n[runs]\nmodel = 'x'\nlr = 1", "rows names 'lr', which is not a list"),
        ("rows = []\n[runs]\nmodel = 'x'\nlr = [1, 2]", "'lr' is named neither"),
        ("columns = ['lr']\nrows = ['lr']\n[runs]\nmodel = 'x'\nlr = [1]", "'lr' is named twice"),
        ("metrics = ['HR']\n[runs]\nmodel = 'x'", "unknown metric 'HR'; known: HR@"),
        ("[runs]\nmodel = 'x'\ntransfer = 'users'", "transfer='users' takes weights of a run"),
        ("[runs]\nmodel = 'x'\ninit = 3", "init=3 must be text"),
        ("metrics = []\n[runs]\nmodel = 'x'", "metrics=[] leaves the table empty; name one"),
        ("split = 'dev'\n[runs]\nmodel = 'x'", "unknown split 'dev'; known: validation"),
        ("seen = 'both'\n[runs]\nmodel = 'x'", "'both'; known: filtered, kept"),
        ("[runs]\nmodel = 'x'\nlr = []", "lr is empty"),
        ("[runs]\nmodel = 'x'\nlr = [1, 1]", "lr has one value twice"),
        ("[runs]\nmodel = 'x'\nlr = [[1]]", "lr=[1] must be text, a number"),
        ("[runs]\nmodel = 'x'\nlr = 2020-01-01", "must be text, a number, true or false"),
        ("[runs]\nmodel = 'x'\nwhat = {a = 3}", "what.a=3 must be a table"),
        ("[runs]\nmodel = 'x'\nwhat = {a = {b = [1]}}", "what.a.b=[1] must be text"),
        ("[runs]\nlr = [1]\nmodel = 'x'\nwhat = {a = {lr = 1}}", "lr is set by lr and by what"),
        ("[runs]\nmodel = 'x'\nrun = {a = {lr = 1}}", "an axis cannot be called 'run'"),
        ("protocol = 'rank'\n[runs]\nmodel = 'x'", "unknown protocol 'rank'; known: ranking"),
        ("plot = 'pie'\n[runs]\nmodel = 'x'", "unknown plot 'pie'; known: "),
        ("protocol = 'retrieval'\n[runs]\nmodel = 'x'", "pre-training; name it by init"),
        (
            "protocol = 'retrieval'\nmetrics = ['NDCG@10']\n[runs]\nmodel = 'x'",
            "unknown metric 'NDCG@10'; known: Recall@1",
        ),
        (
            "protocol = 'retrieval'\ntargets = 'cold'\n[runs]\nmodel = 'x'",
            "unknown targets 'cold'; known: text-to-vision",
        ),
        ("[runs]\nmodel = 'x'\nranker = 'features'", "goes with protocol='retrieval'"),
        (
            "protocol = 'retrieval'\n[pretrain.p]\nmodel = 'x'\n"
            "[runs]\nmodel = 'x'\ninit = 'p'\nranker = 'best'",
            "unknown ranker 'best'; known: model, ridge, untrained, features",
        ),
        ("improvement = 'a'\n[runs]\nmodel = 'x'", "improvement='a' must be a table with of"),
        (
            "improvement = {of = 'c'}\n[runs]\nmodel = 'x'\nlr = [1, 2]",
            "improvement names c: no axis has these values",
        ),
        ("[runs]\nmodel = 'x'\ntext = 3", "text=3 must be text"),
        (
            "[runs]\nmodel = 'x'\n" + "\n".join(f"k{i} = {list(range(30))}" for i in range(3)),
            "27000 combinations; give at most 10000",
        ),
    ],
)
def test_a_bad_file_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        read(tmp_path, text)
    assert str(caught.value).startswith(str(tmp_path / "grid.toml"))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*: No such file"):
        read_grid(tmp_path / "none.toml")


def test_the_table_is_the_mean_over_seeds_and_knows_the_best(tmp_path: Path) -> None:
    grid = read(
        tmp_path,
        """
        rows = ["fusion"]
        columns = ["sequence_encoder"]
        metrics = ["HR@10"]
        [runs]
        model = "mmsr"
        fusion = ["sum", "gate", "film"]
        sequence_encoder = ["gru", "sasrec"]
        seed = [1, 2]
        """,
    )
    # sum: gru 1, 2 and sasrec 3, 4; gate: gru 1, - and sasrec 7, 1; film: nothing has ended.
    figures = [1.0, 2.0, 3.0, 4.0, 1.0, None, 7.0, 1.0, None, None, None, None]
    table = pivot(grid, [None if figure is None else {"HR@10": figure} for figure in figures])
    assert table.row_keys == [("sum",), ("gate",), ("film",)]
    assert table.column_keys == [("gru",), ("sasrec",)]
    assert {place[:2]: (cell.value, cell.best) for place, cell in table.cells.items()} == {
        (("sum",), ("gru",)): (1.5, True),
        (("sum",), ("sasrec",)): (3.5, False),
        (("gate",), ("gru",)): (1.0, False),
        (("gate",), ("sasrec",)): (4.0, True),
    }
    assert table.cells[("sum",), ("gru",), "HR@10"].spread == pytest.approx(0.5**0.5)
    assert table.cells[("gate",), ("gru",), "HR@10"].spread is None


VARIANTS = """
[runs]
model = "mmsr"
dnn = [false, true]
[runs.method]
A = { lr = 0.1 }
B = { lr = 0.2 }
C = { lr = 0.3 }
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # the best of C over the best of A and B, in each row
        ("columns = ['method']\nrows = ['dnn', 'metric']\nimprovement = {of = 'C'}",
         {("false", "Improv."): 3 / 2 - 1, ("true", "Improv."): 4 / 8 - 1}),
        ("columns = ['method']\nrows = ['dnn']\nimprovement = {of = ['B', 'C'], over = 'A'}",
         {("false", "Improv."): 3 / 1 - 1, ("true", "Improv."): 8 / 5 - 1}),
        # the same over the rows, in each column
        ("rows = ['method']\ncolumns = ['dnn']\nimprovement = {of = 'C', over = 'A'}",
         {("Improv.", "false"): 3 / 1 - 1, ("Improv.", "true"): 4 / 5 - 1}),
    ],
)  # fmt: skip
def test_the_relative_improvement_is_a_row_or_a_column(
    tmp_path: Path, text: str, expected: dict[tuple[str, str], float]
) -> None:
    grid = read(tmp_path, f"metrics = ['HR@10']\n{text}\n{VARIANTS}")
    values = [{"HR@10": value} for value in (1.0, 2.0, 3.0, 5.0, 8.0, 4.0)]
    table = pivot(grid, values)
    added = {
        (*row, *column): cell.value
        for (row, column, _), cell in table.cells.items()
        if cell.is_improvement
    }
    assert added == {place: pytest.approx(value) for place, value in expected.items()}
    last = table.column_keys[-1] if "columns = ['method']" in text else table.row_keys[-1]
    assert last == ("Improv.",)


def test_an_improvement_waits_for_its_runs_and_is_not_divided_by_zero(tmp_path: Path) -> None:
    grid = read(
        tmp_path,
        "metrics = ['HR@10']\nrows = ['lr']\nimprovement = {of = '2'}\n"
        "[runs]\nmodel = 'x'\nlr = [1, 2]",
    )
    for values in ([None, {"HR@10": 1.0}], [{"HR@10": 0.0}, {"HR@10": 1.0}]):
        table = pivot(grid, values)
        assert table.row_keys[-1] == ("Improv.",)
        assert (("Improv.",), (), "HR@10") not in table.cells


@pytest.mark.parametrize("k", [5, 10, 20, 50])
def test_recall_of_one_target_is_the_hit_rate(tmp_path: Path, k: int) -> None:
    grid = read(tmp_path, f"metrics = ['Recall@{k}']\n[runs]\nmodel = 'x'")
    table = pivot(grid, [{f"HR@{k}": 0.25}])
    assert table.cells[(), (), f"Recall@{k}"].value == 0.25


def test_every_modality_of_a_feature_table_can_be_named() -> None:
    assert set(MODALITIES) == set(FEATURE_MODALITIES)


def test_tables_of_modalities_are_no_settings(tmp_path: Path) -> None:
    grid = read(
        tmp_path,
        """
        [runs]
        model = "mmsr"
        features = "image,text"
        text = "roberta:layer-10"
        [runs.ratio]
        "0%" = { image = "mae-b" }
        "75%" = { image = "mae-b-mask-75" }
        """,
    )
    assert [combination.tables for combination in grid.combinations] == [
        {"image": "mae-b", "text": "roberta:layer-10"},
        {"image": "mae-b-mask-75", "text": "roberta:layer-10"},
    ]
    assert all(combination.settings == {} for combination in grid.combinations)


def test_reading_a_grid_needs_no_torch() -> None:
    code = "import sys, trainer.runs.grid_file; sys.exit('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3]).returncode == 0
    )


def test_metrics_can_be_rows_and_the_best_is_then_a_column(tmp_path: Path) -> None:
    grid = read(
        tmp_path,
        "rows = ['dataset', 'metric']\ncolumns = ['model']\nmetrics = ['HR@10']\n"
        "[runs]\nmodel = ['a', 'b']\ndataset = ['x', 'y']\n",
    )
    assert (grid.rows, grid.metric_rows) == (["dataset"], True)
    table = pivot(grid, [{"HR@10": value} for value in (1.0, 2.0, 4.0, 3.0)])
    best = {place[:2] for place, cell in table.cells.items() if cell.best}
    assert best == {(("x",), ("b",)), (("y",), ("b",))}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pretrain = 3\n[runs]\nmodel = 'x'", "pretrain=3 must be tables"),
        ("[pretrain]\na = 3\n[runs]\nmodel = 'x'", "pretrain.a=3 must be a table"),
        ("[pretrain.a]\nlr = 1\n[runs]\nmodel = 'x'", "pretrain.a sets no model"),
        ("[pretrain.a]\nmodel = 3\n[runs]\nmodel = 'x'", "pretrain.a.model=3 must be text"),
        ("[pretrain.a]\ndatasets = 'x'\n[runs]\nmodel = 'x'", "must be a list of names"),
        ("targets = 'old'\n[runs]\nmodel = 'x'", "unknown targets 'old'"),
        ("targets = 'repeated'\n[runs]\nmodel = 'x'", "give seen='kept'"),
        ("targets = 'cold'\nmetrics = ['coverage@10']\n[runs]\nmodel = 'x'", "leave targets out"),
        ("rows = ['metric', 'lr']\n[runs]\nmodel = 'x'\nlr = [1]", "must name 'metric' last"),
        ("title = 3\n[runs]\nmodel = 'x'", "title=3 must be text"),
    ],
)
def test_a_bad_entry_of_a_published_table_is_one_line(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        read(tmp_path, text)
