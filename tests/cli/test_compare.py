"""``mmrec compare``: what it prints."""

import json

from features.warehouse import Warehouse
from tests.cli.invoke import run
from tests.trainer.analysis.test_compare import RANKS, write_run


def test_the_table_the_document_and_the_mistakes(warehouse: Warehouse) -> None:
    option = ["--warehouse", str(warehouse.root)]
    for name, filtered in RANKS.items():
        write_run(warehouse, name, filtered)
    printed = run("compare", "a", "b", "--metric", "MRR", *option).stdout.splitlines()
    assert printed[0].startswith("d, test: 4 users")
    assert printed[2].startswith("filtered: ")
    assert printed[4].split() == ["MRR", "a", "0.4811", "-", "-"]
    assert printed[5].split()[:3] == ["b", "0.3250", "-0.1561"]
    assert printed[5].split()[-1] == "0.5000"
    document = json.loads(run("compare", "a", "b", "--json", *option).stdout)
    assert document["systems"] == [
        {"label": name, "runs": [name], "settings": "", "control": "none"} for name in ("a", "b")
    ]
    assert len(document["lines"]) == 2 * 2 * 5
    assert document["lines"][1]["test"]["p_value"] == 1.0
    write_run(warehouse, "new", None)
    for arguments in (["a", "new"], ["a"], ["a", "none"], ["a", "b", "--by", "x"]):
        stderr = run("compare", *arguments, *option, code=2).stderr
        assert stderr.startswith("error: ")
        assert stderr.count("\n") == 1


def test_a_comparison_names_the_settings_of_its_runs(root: str) -> None:
    for name, width in (("narrow", 4), ("wide", 8)):
        words = ("--set", f"dim={width}", "--set", "epochs=1", "--set", "device=cpu")
        run("train", "--model", "sasrec", "--name", name, *words, "--warehouse", root)
        run("eval", name, "--warehouse", root)
    printed = run("compare", "narrow", "wide", "--warehouse", root).stdout
    assert "narrow: epochs=1, device=cpu, dim=4" in printed
    assert "wide: epochs=1, device=cpu, dim=8" in printed
