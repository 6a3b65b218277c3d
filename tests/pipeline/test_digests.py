"""Fingerprints in little memory: a set like any other, whatever bytes they are made of."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import digests
from pipeline.digests import Digests, digest, place

# Null bytes in front, behind and alone: numpy's fixed bytes drop those at the end.
FEW = st.sampled_from([0, 1, 255, 256, 1 << 120, (1 << 120) + 256, (1 << 128) - 1])
CONTENTS = st.lists(FEW | st.integers(0, 300), max_size=80).map(
    lambda numbers: [f"{number:032x}" for number in numbers]
)


@given(contents=CONTENTS)
def test_a_set_of_fingerprints_is_a_set(contents: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digests, "_FRESH", 4)
        mine = Digests()
        theirs: set[str] = set()
        for content in contents:
            assert mine.add(digest(content)) == (content not in theirs)
            theirs.add(content)


def test_a_large_set_holds_few_runs_and_no_object() -> None:
    mine = Digests()
    random = np.random.default_rng(0)
    contents = [random.bytes(16).rstrip(b"\0") for _ in range(50_000)]
    assert all(map(mine.add, contents))
    assert not any(map(mine.add, contents[::97]))
    assert len(mine._fresh) < 4096
    assert sum(run.nbytes for run in mine._runs) <= 16 * len(contents)
    assert len(mine._runs) <= 5


def test_hashes_are_found_among_chunks_and_none_are_made_up() -> None:
    known = [f"{number:032x}" for number in (7, 1, 256, 1 << 120)]
    others = ["short", "g" * 32, known[0].replace("7", "G"), "?" + known[1]]
    chunks = [pa.array(["?", *known[:2]]).slice(1), pa.array([*known[2:], *others])]
    found = digests.digests(pa.chunked_array(chunks))
    assert found.tolist() == [*(digest(one) for one in known), *[b""] * len(others)]
    assert digests.digests(pa.chunked_array([], pa.string())).tolist() == []
    ordered = np.sort(found)
    assert [ordered[place(digest(one), ordered)] for one in known] == [digest(one) for one in known]
    assert place(digest("f" * 32), ordered) == place(digest("f" * 32), found[:0]) == -1
