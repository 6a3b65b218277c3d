"""retrieval/README.md lists every file, and the index of its example is exact."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retrieval.index_ranking import rank_with
from retrieval.ranking import rank
from retrieval.registry import INDEXES, make_index
from retrieval.sparse_scores import SparseScores
from tests.retrieval import brute

PACKAGE = Path(__file__).parents[2] / "retrieval"
README = (PACKAGE / "README.md").read_text(encoding="utf-8")


def test_the_table_lists_every_file() -> None:
    table = README.partition("## The way of the data")[0]
    files = set(re.findall(r"^\| `(\w+\.py)` \|", table, re.MULTILINE))
    assert files == {path.name for path in PACKAGE.glob("[!_]*.py")}


@pytest.mark.parametrize("kind", brute.KINDS)
def test_the_example_index_is_exact(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    monkeypatch.setattr("retrieval.registry.INDEXES", dict(INDEXES))
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(code, "README.md", "exec"), names)
    rng = np.random.default_rng(3)
    queries, items = brute.vectors("gauss", rng, 20, 6), brute.vectors(kind, rng, 300, 6)
    seen = brute.make_seen(brute.seen_lists(rng, 20, 300, 30))
    values = rng.standard_normal((20, 300)) * (rng.random((20, 300)) < 0.1)
    correction, targets = SparseScores.from_dense(values), rng.integers(0, 300, 20)
    found = make_index("sort", items).search(queries, 10, seen, correction)
    for left, right in zip(
        found, make_index("torch", items).search(queries, 10, seen, correction), strict=True
    ):
        np.testing.assert_array_equal(left, right)
    ranks = rank_with("sort", queries, items, targets, seen, correction)
    expected = rank(queries, items, targets, seen, correction=correction)
    np.testing.assert_array_equal(ranks.filtered, expected.filtered)
