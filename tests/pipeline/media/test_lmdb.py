"""Images in LMDBs, among them the pickled images of published releases."""

import io
import os
import pickle
import pickletools
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from features.errors import UserError
from pipeline.media.lmdb import LmdbImages, read_lmdb_image
from tests.pipeline.media.containers import PIXELS, write_lmdb


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
