"""Fingerprints in little memory: a set like any other, whatever bytes they are made of."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.extraction import digests
from pipeline.extraction.digests import Digests, digest, place

# Null bytes in front and behind, where numpy's fixed bytes drop them; neighbours in the table.
FEW = st.sampled_from([1, 255, 256, 1 << 120, (1 << 120) + 256, (1 << 128) - 1])
CONTENTS = st.lists(FEW | st.integers(1, 300), max_size=80).map(
    lambda numbers: [f"{number:032x}" for number in numbers]
)


@given(contents=CONTENTS, room=st.sampled_from([0, 7, 200]))
def test_a_set_of_fingerprints_is_a_set(contents: list[str], room: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digests, "_FEW", 1)
        mine = Digests(room)
    theirs: set[str] = set()
    for content in contents:
        assert mine.add(digest(content)) == (content not in theirs)
        theirs.add(content)


def test_a_large_set_takes_what_was_foreseen() -> None:
    random = np.random.default_rng(0)
    contents = [random.bytes(16).rstrip(b"\0") for _ in range(30_000)]
    mine = Digests(len(contents))
    size = mine._slots.nbytes
    assert size < 25 * len(contents)
    assert all(map(mine.add, contents))
    assert not any(map(mine.add, contents[::97]))
    assert mine._slots.nbytes == size


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
