"""Images in LMDBs, among them the pickled images of published releases."""

import io
import os
import pickle
import pickletools
import struct
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import lmdb
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from features.errors import UserError
from pipeline.media.errors import ContainerError
from pipeline.media.lmdb import LmdbImages, read_lmdb_image
from pipeline.media.reader import MediaReader
from tests.pipeline.media.containers import PIXELS, refused, write_lmdb


def _whole(path: Path) -> tuple[Path, dict[str, bytes]]:
    """Write an LMDB with values in its leaves and values of several pages."""
    random = np.random.RandomState(0)
    values = {f"v{n}": b"x" + random.bytes(40 if n % 3 else 9000) for n in range(400)}
    with lmdb.open(str(path), subdir=False, map_size=1 << 24) as env:
        for start in range(0, 400, 50):  # many transactions leave free pages
            with env.begin(write=True) as transaction:
                for key in list(values)[start : start + 50]:
                    transaction.put(key.encode(), b"old" * 3000)
                    transaction.put(key.encode(), values[key])
    return path, values


def test_every_value_is_what_the_library_reads(tmp_path: Path) -> None:
    path, values = _whole(tmp_path / "a.lmdb")
    with LmdbImages(path) as images:
        assert {key: images.get(key) for key in images.keys()} == values  # noqa: SIM118
        assert {key: images.size(key) for key in values} == {k: len(v) for k, v in values.items()}
        for key in ("", "a", "v", "v00", "v9999", "w", "k" * 600):
            with pytest.raises(ContainerError, match="no key"):
                images.get(key)


@pytest.mark.parametrize("share", [0.001, 0.004, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99])
def test_a_truncated_file_is_refused_in_one_line(tmp_path: Path, share: float) -> None:
    path, _ = _whole(tmp_path / "a.lmdb")
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(ContainerError, match=r"a\.lmdb.*copy it again") as caught:
        LmdbImages(path)
    assert "\n" not in str(caught.value)
    assert caught.value.reason in ("truncated LMDB", "not a readable LMDB")


@pytest.mark.parametrize("size", [4096, 4200, 8191])
def test_a_file_without_its_second_header_is_truncated(tmp_path: Path, size: int) -> None:
    path, _ = _whole(tmp_path / "a.lmdb")
    os.truncate(path, size)
    with pytest.raises(ContainerError, match=r"truncated.*copy it again"):
        LmdbImages(path)


def _patch_headers(path: Path, offset: int, value: bytes) -> None:
    """Overwrite bytes of both headers."""
    data = bytearray(path.read_bytes())
    for page in (0, 4096):
        data[page + offset : page + offset + len(value)] = value
    path.write_bytes(data)


def test_a_file_without_its_unused_last_pages_is_read(tmp_path: Path) -> None:
    path, values = _whole(tmp_path / "a.lmdb")
    _patch_headers(path, 136, struct.pack("<Q", path.stat().st_size // 4096 + 7))
    with LmdbImages(path) as images:
        assert {key: images.get(key) for key in values} == values


@given(
    places=st.lists(st.integers(0, 100_000), min_size=1, max_size=20),
    junk=st.binary(min_size=1, max_size=40),
)
@settings(max_examples=200, deadline=None)
def test_damaged_pages_are_errors_and_never_signals(places: list[int], junk: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.lmdb"
        path.write_bytes(_damaged_bytes(places, junk))
        try:
            with LmdbImages(path) as images:
                list(images.keys())
                for n in range(400):
                    try:
                        images.get(f"v{n}")
                    except UserError as error:
                        assert "\n" not in str(error)  # noqa: PT017
        except UserError as error:
            assert "\n" not in str(error)  # noqa: PT017


@cache
def _whole_bytes() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return _whole(Path(folder) / "a.lmdb")[0].read_bytes()


def _damaged_bytes(places: list[int], junk: bytes) -> bytes:
    """Overwrite the starts of pages: the places count 8-byte steps of the first 64 of each page."""
    data = bytearray(_whole_bytes())
    for place in places:
        at = (place // 8) * 4096 % len(data) + (place % 8) * 8
        data[at : at + len(junk)] = junk[: len(data) - at]
    return bytes(data)


@pytest.mark.parametrize("field", ["number", "flags", "lower", "upper"])
def test_a_damaged_page_of_a_value_fails_that_image_alone(tmp_path: Path, field: str) -> None:
    path = tmp_path / "covers.lmdb"
    values = {f"v{n}": bytes([n]) * 9000 for n in range(5)}
    write_lmdb(path, values, subdir=False)
    data = bytearray(path.read_bytes())
    start = data.index(values["v2"]) - 16  # the header of its first page
    offset = {"number": 0, "flags": 10, "lower": 0, "upper": 1}[field]
    data[start + offset] ^= 0xFF
    path.write_bytes(data)
    media = MediaReader(tmp_path)
    assert refused(media, "covers.lmdb#v2") == "damaged LMDB"
    assert media.read("covers.lmdb#v3") == values["v3"]
    media.close()


def test_the_newer_valid_header_counts(tmp_path: Path) -> None:
    path = tmp_path / "a.lmdb"
    write_lmdb(path, {"k": b"first"}, subdir=False)
    write_lmdb(path, {"k": b"second"}, subdir=False)
    data = bytearray(path.read_bytes())
    transactions = [struct.unpack_from("<Q", data, 4096 * page + 144)[0] for page in (0, 1)]
    with LmdbImages(path) as images:
        assert images.get("k") == b"second"
    newer = transactions.index(max(transactions))
    if newer == 0:  # the header of a file needs its first page to be found
        write_lmdb(path, {"k": b"third"}, subdir=False)
        data, newer = bytearray(path.read_bytes()), 1
    data[4096 * newer + 16] ^= 0xFF
    path.write_bytes(data)
    with LmdbImages(path) as images:
        assert images.get("k") in (b"first", b"second")


def test_kinds_of_lmdb_that_hold_no_images_by_id(tmp_path: Path) -> None:
    with lmdb.open(str(tmp_path / "a"), max_dbs=1, map_size=1 << 20) as env:
        named = env.open_db(b"table")
        with env.begin(write=True) as transaction:
            transaction.put(b"x", b"y", db=named)
    with LmdbImages(tmp_path / "a") as images:
        with pytest.raises(ContainerError, match="'table' names a table"):
            list(images.keys())
        with pytest.raises(ContainerError, match="'table' names a table"):
            images.get("table")
    path = write_lmdb(tmp_path / "b.lmdb", {"k": b"x"}, subdir=False)
    _patch_headers(path, 92, b"\x08")
    with pytest.raises(ContainerError, match="integer keys"):
        LmdbImages(path)


@pytest.mark.parametrize("instructions", [b"N" * 2_000_000, b"(" * 3000 + b"N", b"K\x01" * 5000])
def test_a_pickle_of_many_instructions_is_refused_at_once(instructions: bytes) -> None:
    start = time.process_time()
    with pytest.raises(UserError, match=r"1,000 instructions.*refused"):
        read_lmdb_image(b"\x80\x04" + instructions + b".", "x")
    assert time.process_time() - start < 1


_IMAGE_CLASS = b"\x80\x04\x8c\x01m\x8c\x0aLMDB_Image\x93"
_MEGABYTES = 1 << 25
_HUGE = struct.pack("<Q", (1 << 63) - 1)
_LENGTH_4 = struct.pack("<I", _MEGABYTES)
_LENGTH_8 = struct.pack("<Q", _MEGABYTES)


@pytest.mark.parametrize(
    "body",
    [
        b"\x8b" + _LENGTH_4 + b"\x7f" * _MEGABYTES,  # LONG4
        b"\x8b" + struct.pack("<i", 2**31 - 1) + b"\x7f",
        b"L" + b"9" * _MEGABYTES + b"L\n",
        b"I" + b"9" * _MEGABYTES + b"\n",
        b"F" + b"9" * _MEGABYTES + b"\n",
        b"V" + b"\\U0001f600" * (_MEGABYTES // 10) + b"\n",
        b"S'" + b"\\x41" * (_MEGABYTES // 4) + b"'\n",
        b"X" + _LENGTH_4 + b"a" * (_MEGABYTES - 4) + "\U0001f600".encode(),
        b"\x8d" + _LENGTH_8 + b"a" * (_MEGABYTES - 4) + "\U0001f600".encode(),
        b"\x8d" + _HUGE + b"a",
        b"\x8e" + _HUGE + bytes(_MEGABYTES),
        b"\x8e" + _LENGTH_8 + bytes(_MEGABYTES),
        b"\x96" + _LENGTH_8 + bytes(_MEGABYTES),  # BYTEARRAY8
        b"c" + b"m" * _MEGABYTES + b"\n" + b"n" * 9 + b"\n",
        b"\x95" + _HUGE,  # FRAME
        b"K\x01\x94" + b"h\x00h\x00\x86\x94" * 240,
        b"\x8e" + _LENGTH_8 + bytes(_MEGABYTES) + b"\x94" + b"h\x00" * 900,
        b"]" + b"\x94h\x00a" * 200,
        b")" + b"\x85" * 998,
        b"(" * 500 + b"t" * 499,
        b"}" + b"\x94" + b"h\x00\x8c\x01ah\x00s" * 240,
        b"r\xff\xff\xff\xff" * 900,
        b"N" + b"r\xff\xff\xff\xff" * 900,
    ],
)
@pytest.mark.parametrize("place", ["alone", "as the state", "as the size"])
def test_a_hostile_pickle_takes_little_time_and_memory(body: bytes, place: str) -> None:
    start, end = {
        "alone": (b"\x80\x04", b"."),
        "as the state": (_IMAGE_CLASS + b")\x81", b"b."),
        "as the size": (_IMAGE_CLASS + b")\x81}\x8c\x04size", b"sb."),
    }[place]
    attack = start + body + end
    began = time.process_time()
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="refused") as refusal:
            read_lmdb_image(attack, "x")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.process_time() - began < 2
    assert peak < 2 * _MEGABYTES + (1 << 20)
    assert len(str(refusal.value)) < 300


def test_a_value_larger_than_a_file_may_be_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lmdb(tmp_path / "a.lmdb", {"big": bytes(100_000), "small": b"x"}, subdir=False)
    monkeypatch.setattr("pipeline.media.reader.MAX_FILE_BYTES", 65_536)
    media = MediaReader(tmp_path)
    assert refused(media, "a.lmdb#big") == "file larger than 0 MiB"
    assert media.read("a.lmdb#small") == b"x"
    media.close()


@pytest.fixture(params=["__main__", "lmdb_build"])
def pickled(request: pytest.FixtureRequest) -> Iterator[Callable[..., bytes]]:
    """Pickles as the releases' own class writes them, whatever its module."""

    class LMDB_Image:  # noqa: N801 - the releases' name
        def __init__(self, image: np.ndarray[Any, Any], item: Any) -> None:
            self.channels = image.shape[2]
            self.size = image.shape[:2]
            self.image = image.tobytes()
            self.id = item

    name = request.param
    LMDB_Image.__module__, LMDB_Image.__qualname__ = name, "LMDB_Image"
    module = sys.modules.get(name)
    home = module or ModuleType(name)
    sys.modules[name] = home
    vars(home)["LMDB_Image"] = LMDB_Image
    yield lambda image, item="v1", protocol=4: pickle.dumps(LMDB_Image(image, item), protocol)
    del vars(home)["LMDB_Image"]
    if module is None:
        del sys.modules[name]


def test_an_lmdb_of_encoded_images(tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.fromarray(PIXELS).save(stream, "PNG")
    with LmdbImages(
        write_lmdb(tmp_path / "a.lmdb", {"k": stream.getvalue()}, subdir=False)
    ) as covers:
        assert covers.get("k") == stream.getvalue()


@pytest.mark.parametrize("content", [b"", b"no lmdb" * 2000, None])
def test_a_file_that_is_nowrite_lmdb(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "a.lmdb"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match="not a readable LMDB"):
        LmdbImages(path)


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_images_of_the_releases_are_read(
    pickled: Callable[..., bytes], protocol: int, channels: int
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, channels)).astype(np.uint8)
    image = read_lmdb_image(pickled(pixels, 12, protocol), "x")
    assert (image.size, len(image.getbands())) == ((4, 5), channels)
    np.testing.assert_array_equal(np.asarray(image).reshape(pixels.shape), pixels)


class _Runs:
    """Unpickling it calls a function."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call, self.arguments


def _attacks(path: Path) -> dict[str, bytes]:
    command = f"touch {path}"
    code = f"open({str(path)!r}, 'w')"
    image = b"\x80\x04\x8c\x01m\x8c\x0aLMDB_Image\x93"  # pushes the class of an image
    return {
        "system": pickle.dumps(_Runs(os.system, command)),
        "system, protocol 0": pickle.dumps(_Runs(os.system, command), 0),
        "eval": pickle.dumps(_Runs(eval, code)),
        "exec in a list": pickle.dumps([1, {"a": _Runs(exec, code)}]),
        "numpy": pickle.dumps(np.arange(3)),
        "numpy scalar": pickle.dumps(np.int64(3)),
        "bytearray": pickle.dumps(bytearray(b"abc")),
        "nothing but a list": pickle.dumps([1, 2]),
        "nothing but the class": image + b".",
        "called": image + b"(tR.",
        "called with its name behind a dot": b"\x80\x04\x8c\x02os\x8c\x11system.LMDB_Image\x93.",
        "by the old instruction": f"(S'{command}'\nios\nsystem\n.".encode(),
        "made with arguments": image + b"K\x01\x85\x81}b.",
        "never built": image + b")\x81.",
        "state on the class": image + b"}b.",
        "state in two parts": image + b")\x81}}\x86b.",
        "through the registry": b"\x80\x02\x82\x01.",
        "persistent": b"\x80\x02Pname\n.",
        "image within an image": image + b")\x81}\x8c\x05image" + image + b")\x81}bsb.",
    }


@pytest.mark.parametrize("name", list(_attacks(Path("x"))))
def test_nothing_else_is_read_and_nothing_runs(tmp_path: Path, name: str) -> None:
    victim = tmp_path / "was_here"
    attack = _attacks(victim)[name]
    with pytest.raises(UserError, match="refused"):
        read_lmdb_image(attack, "x.lmdb#1")
    assert not victim.exists()


def test_the_attacks_would_work(tmp_path: Path) -> None:
    """So that the test above means something."""
    victim = tmp_path / "was_here"
    pickle.loads(_attacks(victim)["eval"]).close()
    assert victim.exists()


def test_what_hides_in_an_attribute_does_not_run(
    tmp_path: Path, pickled: Callable[..., bytes]
) -> None:
    victim = tmp_path / "was_here"
    for hidden in (_Runs(os.system, f"touch {victim}"), np.int64(4), np.arange(3)):
        with pytest.raises(UserError, match=r"it (names|uses)"):
            read_lmdb_image(pickled(PIXELS, hidden), "x")
    assert not victim.exists()


def _image(**state: Any) -> bytes:
    """The pickle of an image with any state."""
    inner = pickle.dumps(state, 4)[11:-1]  # without the header and the stop
    return b"\x80\x04\x8c\x01m\x8c\x0aLMDB_Image\x93)\x81" + inner + b"b."


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"channels": 3, "size": (2, 3)},
        {"channels": 3, "size": (2, 3), "image": "x" * 18},
        {"channels": 3, "size": (2, 4), "image": bytes(18)},
        {"channels": 2, "size": (3, 3), "image": bytes(18)},
        {"channels": 3, "size": (-2, -3), "image": bytes(18)},
        {"channels": 3, "size": (0, 3), "image": b""},
        {"channels": 3, "size": (2.0, 3.0), "image": bytes(18)},
        {"channels": True, "size": (3, 6), "image": bytes(18)},
        {"channels": 3, "size": (2, 3, 1), "image": bytes(18)},
        {"channels": (), "size": {}, "image": bytes(18)},
        {"channels": 1, "size": (1 << 30, 1 << 30), "image": bytes(18)},
    ],
)
def test_a_state_that_makes_no_image(state: dict[str, Any]) -> None:
    assert read_lmdb_image(_image(channels=3, size=(2, 3), image=bytes(18)), "x").size == (3, 2)
    with pytest.raises(UserError, match="refused"):
        read_lmdb_image(_image(**state), "x")


_CLASS = b"\x80\x04\x8c\x01m\x8c\x0aLMDB_Image\x93"  # pushes the class of an image


_NEST = b"q\x00h\x00\x86" * 60  # makes a pair of what lies on the stack with itself


@pytest.mark.parametrize(
    "attack",
    [
        _CLASS[:-2] + b"\nx\x93.",  # a name of two lines
        b"\x80\x04)" + _NEST + b"\x8c\x01a\x93.",
        b"\x80\x04N" + b"r\xff\xff\xff\x7f" + b".",  # a memo of two thousand million places
        b"\x80\x04\x8e" + struct.pack("<Q", 1 << 62) + b"x.",  # four exabytes of bytes
        b"\x80\x04\x96" + struct.pack("<Q", 1 << 40) + b"x.",
        # Tuples of tuples of tuples: two to the sixtieth if anybody walks them.
        _CLASS + b")\x81}\x8c\x04size)" + _NEST + b"sb.",
        _CLASS + b")\x81})" + _NEST + b"Nsb.",
        _CLASS + b")\x81})" + _NEST + b"b.",
        _CLASS + b")" + _NEST + b"\x81}b.",
    ],
)
def test_a_small_pickle_takes_little(attack: bytes) -> None:
    with pytest.raises(UserError, match="refused"):
        read_lmdb_image(attack, "x")


@given(
    place=st.integers(0, 80),
    junk=st.binary(max_size=6),
    cut=st.integers(0, 6),
)
@settings(max_examples=300, deadline=None)
def test_damage_is_refused_or_harmless(place: int, junk: bytes, cut: int) -> None:
    whole = _image(channels=3, size=(2, 3), image=bytes(18))
    data = whole[:place] + junk + whole[place + cut :]
    try:
        assert read_lmdb_image(data, "x").mode in {"L", "RGB", "RGBA"}
    except UserError as refused:
        message = str(refused)
    else:
        message = ""
    assert "\n" not in message


def test_the_helper_makes_what_pickle_makes() -> None:
    names = [opcode.name for opcode, _, _ in pickletools.genops(_image(channels=3))]
    assert names[:5] == ["PROTO", "SHORT_BINUNICODE", "SHORT_BINUNICODE", "STACK_GLOBAL",
                         "EMPTY_TUPLE"]  # fmt: skip
    assert names[-2:] == ["BUILD", "STOP"]
