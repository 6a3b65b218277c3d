import json
from pathlib import Path

import pytest

from features.errors import UserError
from features.warehouse import Warehouse
from pipeline.datasets.prepare import PrepareOptions, prepare_dataset
from tests.pipeline.datasets.raws import folder, items_of, prepared, sequences_of

FLAGS = "0|1|0|1|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0"  # Action, Animation
ML100K: dict[str, str | bytes] = {
    "u.data": "7\t2\t1\t900\n7\t1\t5\t100\n8\t1\t3\t50\n",
    "u.item": (
        f"1|Amélie (2001)|01-Jan-1995||http://x/?a=1|{FLAGS}\n"
        f"2|A & B|||| {'|'.join('0' * 19)}\n".replace(" 0", "0")
    ).encode("latin-1"),
}
ML1M: dict[str, str | bytes] = {
    "ratings.dat": "7::2::1::900\n7::1::5::100\n8::1::3::50\n",
    "movies.dat": "1::Amélie (2001)::Action|Animation\n2::A &amp; B::Drama\n".encode("latin-1"),
}
LATEST: dict[str, str | bytes] = {
    "ratings.csv": "userId,movieId,rating,timestamp\n7,2,0.5,900\n7,1,5,100\n8,1,3,50\n",
    "movies.csv": (
        'movieId,title,genres\r\n1,"Amélie, or ""A"" (2001)",Action|Animation\r\n'
        "2,B,(no genres listed)\r\n"
    ),
}


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("ml-100k", ML100K, ["Amélie (2001). Action, Animation", "A & B"]),
        ("ml-1m", ML1M, ["Amélie (2001). Action, Animation", "A & B. Drama"]),
        ("ml-latest-small", LATEST, ['Amélie, or "A" (2001). Action, Animation', "B"]),
    ],
)
def test_the_three_layouts(
    warehouse: Warehouse,
    tmp_path: Path,
    name: str,
    content: dict[str, str | bytes],
    texts: list[str],
) -> None:
    info = prepared(warehouse, tmp_path / "raw", content, dataset=name, format=None, k_core=0)
    assert sequences_of(warehouse, name) == {"7": ["1", "2"], "8": ["1"]}
    assert [row["text"] for row in items_of(warehouse, name)] == texts
    assert (info.timestamps, info.format) == (True, "movielens")
    assert json.loads(items_of(warehouse, name)[0]["attributes"])["genres"] == [
        "Action", "Animation",
    ]  # fmt: skip


def test_the_default_is_the_five_core(warehouse: Warehouse, tmp_path: Path) -> None:
    raw = folder(tmp_path / "raw", ML1M)
    with pytest.raises(UserError, match=r"5-core.*--k-core"):
        prepare_dataset(warehouse, PrepareOptions(dataset="ml-1m", raw=raw))


def test_posters_and_plots(warehouse: Warehouse, tmp_path: Path) -> None:
    plot = (
        "1::Amélie::2001::R::x::Comedy::J. P. Jeunet::N/A::A. Tautou::She helps\tall.::http://x\r\n"
    )
    none = "2::B::2001::N/A::x::y::N/A::N/A::N/A::N/A::N/A\r\n"
    content = {
        **ML1M,
        "movies_extrainfos.dat": plot + none,
        "posters/2.jpg": "x",
        "posters_extra/1.jpg": "x",
    }
    prepared(warehouse, tmp_path / "raw", content, dataset="ml-1m", format=None, k_core=0)
    first, second = items_of(warehouse, "ml-1m")
    assert first["text"] == "Amélie (2001). Action, Animation. She helps all."
    assert (first["image"], second["image"]) == ("posters_extra/1.jpg", "posters/2.jpg")
    assert json.loads(first["attributes"])["director"] == "J. P. Jeunet"
    assert second["text"] == "A & B. Drama"
    assert "director" not in json.loads(second["attributes"])


def test_chronological_sequences_stand_in_for_ratings(warehouse: Warehouse, tmp_path: Path) -> None:
    sequences = "7 2 1 2\n8 1\n"
    content = {"movies.dat": ML1M["movies.dat"], "ml1m_sequences_chronological.txt": sequences}
    raw = folder(tmp_path / "raw", content)
    info = prepare_dataset(warehouse, PrepareOptions(dataset="ml-1m", raw=raw, k_core=0))
    assert sequences_of(warehouse, "ml-1m") == {"7": ["2", "1", "2"], "8": ["1"]}
    assert not info.timestamps
    folder(raw, ML1M)  # the ratings win when they are there
    assert prepare_dataset(warehouse, PrepareOptions(dataset="ml-1m", raw=raw, k_core=0)).timestamps


def test_another_dataset_is_not_taken_for_this_one(warehouse: Warehouse, tmp_path: Path) -> None:
    raw = folder(tmp_path / "raw", ML100K)
    with pytest.raises(UserError, match=r"ratings\.dat or ml1m_sequences.*--file"):
        prepare_dataset(warehouse, PrepareOptions(dataset="ml-1m", raw=raw))
    with pytest.raises(UserError, match=r"ratings\.csv.*--file"):
        prepare_dataset(warehouse, PrepareOptions(dataset="ml-latest-small", raw=raw))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"ratings.dat": "1::1::3::x\n"}, r"ratings\.dat, row 1: .*'x'.*integers"),
        ({"ratings.dat": "1::1::3\n"}, r"ratings\.dat, line 1: 3 columns.*4"),
        ({"ratings.dat": "1::9::3::4\n"}, r"1 item of 1 interaction .*'9'.*--unlisted"),
        ({"movies.dat": "1::a\n"}, r"movies\.dat, line 1: 2 columns.*3"),
    ],
)
def test_mistakes(
    warehouse: Warehouse, tmp_path: Path, content: dict[str, str | bytes], expected: str
) -> None:
    raw = folder(tmp_path / "raw", {**ML1M, **content})
    with pytest.raises(UserError, match=expected):
        prepare_dataset(warehouse, PrepareOptions(dataset="ml-1m", raw=raw, k_core=0))


@pytest.mark.parametrize("role", ["interactions", "items"])
def test_an_ending_that_tells_no_layout(warehouse: Warehouse, tmp_path: Path, role: str) -> None:
    raw = folder(tmp_path / "raw", {**ML1M, "odd.xyz": "1::2::3::4\n"})
    with pytest.raises(UserError, match=r"odd\.xyz .*rename"):
        prepare_dataset(
            warehouse, PrepareOptions(dataset="ml-1m", raw=raw, files={role: "odd.xyz"})
        )
