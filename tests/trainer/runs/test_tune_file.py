"""The file of a search: what is read, and what is refused in one line."""

from pathlib import Path

import pytest

from features.errors import UserError
from trainer.runs.tune_file import read_search

RUNS = '[runs]\nmodel = "sasrec"\n'


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "search.toml"
    path.write_text(text)
    return path


def test_lists_tables_and_ranges_are_the_space(tmp_path: Path) -> None:
    text = """
    trials = 7
    timeout = 60
    sampler = "random"
    [runs]
    model = "sasrec"
    epochs = 3
    dim = [32, 64]
    lr = {low = 1e-4, high = 1e-2, log = true}
    [runs.size]
    small = {layers = 1, hidden = 8}
    large = {layers = 2, hidden = 16}
    """
    search = read_search(write(tmp_path, text))
    assert (search.trials, search.timeout, search.sampler, search.pruner) == (
        7, 60, "random", "median",
    )  # fmt: skip
    combination = search.combination({"dim": "64", "size": "large", "lr": 0.00123456})
    assert combination.model == "sasrec"
    assert combination.settings == {
        "epochs": 3, "dim": 64, "layers": 2, "hidden": 16, "lr": 0.00123456,
    }  # fmt: skip
    assert combination.label == "dim=64, size=large, lr=0.001235"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "runs"),
        (RUNS, "nothing to search"),
        (f"trails = 3\n{RUNS}dim = [8, 16]", "trials"),
        (f"trials = 0\n{RUNS}dim = [8, 16]", "trials=0"),
        (f"trials = 2.5\n{RUNS}dim = [8, 16]", "trials=2.5"),
        (f"trials = true\n{RUNS}dim = [8, 16]", "trials=True"),
        (f"timeout = -1\n{RUNS}dim = [8, 16]", "timeout=-1"),
        (f"timeout = inf\n{RUNS}dim = [8, 16]", "timeout=inf"),
        (f'sampler = "tpee"\n{RUNS}dim = [8, 16]', "tpe"),
        (f"pruner = 3\n{RUNS}dim = [8, 16]", "median"),
        (f"{RUNS}lr = {{low = 1e-4}}", "high"),
        (f"{RUNS}lr = {{low = 1, high = 1}}", "below"),
        (f"{RUNS}lr = {{low = nan, high = 1}}", "lr.low"),
        (f'{RUNS}lr = {{low = "a", high = 1}}', "lr.low"),
        (f"{RUNS}lr = {{low = 0, high = 1, log = true}}", "above 0"),
        (f"{RUNS}lr = {{low = 0, high = 1, log = 1}}", "lr.log"),
        (f"{RUNS}lr = {{low = 0, high = 1, hihg = 1}}", "high"),
        (f"{RUNS}lr = {{low = 0.1, high = 1, log = true, step = 0.1}}", "step"),
        (f"{RUNS}lr = {{low = 0.1, high = 1, step = 0}}", "lr.step"),
        (f"{RUNS}dim = []", "empty"),
        (f"{RUNS}dim = [8, 8]", "twice"),
        (f"{RUNS}seed = [1, 2]", "seed"),
        (f'{RUNS}dataset = ["a", "b"]', "dataset"),
        (f"{RUNS}seed = {{low = 1, high = 3}}", "seed"),
        (f'{RUNS}v = {{a = {{monitor = "HR@5"}}, b = {{monitor = "HR@10"}}}}', "monitor"),
        (f"{RUNS}lr = {{low = 0.1, high = 1}}\nv = {{a = {{lr = 0.5}}}}", "lr"),
        ("[runs]\ndim = [8, 16]", "model"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(tmp_path: Path, text: str, named: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UserError) as error:
        read_search(path)
    message = str(error.value)
    assert named in message
    assert str(path) in message
    assert "\n" not in message
