"""``mmrec compare``: what it prints."""

import json

from typer.testing import CliRunner, Result

from cli.app import app
from features.warehouse import Warehouse
from tests.trainer.analysis.test_compare import RANKS, write_run


def run(*words: str, code: int = 0) -> Result:
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == code, (words, result.output, result.exception)
    return result


def test_the_table_the_document_and_the_mistakes(warehouse: Warehouse) -> None:
    here = ["--warehouse", str(warehouse.root)]
    for name, filtered in RANKS.items():
        write_run(warehouse, name, filtered)
    printed = run("compare", "a", "b", "--metric", "MRR", *here).stdout.splitlines()
    assert printed[0].startswith("d, test: 4 users")
    assert printed[2].startswith("filtered: ")
    assert printed[4].split() == ["MRR", "a", "0.4811", "-", "-"]
    assert printed[5].split()[:3] == ["b", "0.3250", "-0.1561"]
    assert printed[5].split()[-1] == "0.5000"
    document = json.loads(run("compare", "a", "b", "--json", *here).stdout)
    assert document["systems"] == [{"label": "a", "runs": ["a"]}, {"label": "b", "runs": ["b"]}]
    assert len(document["lines"]) == 2 * 2 * 5
    assert document["lines"][1]["test"]["p_value"] == 1.0
    write_run(warehouse, "new", None)
    for words in (["a", "new"], ["a"], ["a", "none"], ["a", "b", "--by", "x"]):
        said = run("compare", *words, *here, code=2).stderr
        assert said.startswith("error: ")
        assert said.count("\n") == 1
