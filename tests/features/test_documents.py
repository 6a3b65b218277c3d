import os
from pathlib import Path

import pytest

from features.documents import read_user_toml
from features.errors import UserError
from trainer.runs.grid_file import read_grid
from trainer.setting_sources import read_flat

BROKEN = {
    "not UTF-8": b"epochs = 1 # \xff",
    "a NUL": b"epochs = 1\0",
    "an integer of 5,000 digits": b"epochs = " + b"9" * 5000,
    "deep lists": b"epochs = " + b"[" * 5000,
    "deep tables": b"epochs = " + b"{a=" * 5000,
    "no day of a month": b"day = 2024-02-31",
    "cut": b"epochs = '''",
}


@pytest.mark.parametrize("reader", [read_user_toml, read_flat, read_grid])
@pytest.mark.parametrize("kind", BROKEN)
def test_a_file_that_is_no_toml_is_one_line(tmp_path: Path, kind: str, reader: object) -> None:
    path = tmp_path / "file.toml"
    path.write_bytes(BROKEN[kind])
    assert callable(reader)
    with pytest.raises(UserError) as error:
        reader(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("reader", [read_flat, read_grid])
def test_a_pipe_is_refused_before_it_is_opened(tmp_path: Path, reader: object) -> None:
    pipe = tmp_path / "pipe.toml"
    os.mkfifo(pipe)
    assert callable(reader)
    with pytest.raises(UserError, match="pipe"):
        reader(pipe)


def test_the_output_of_a_command_is_read() -> None:
    """A shell passes it as a path in /dev/fd."""
    reading, writing = os.pipe()
    with os.fdopen(reading), os.fdopen(writing, "w") as file:
        file.write("dim = 8\n")
        file.close()
        assert read_flat(Path(f"/dev/fd/{reading}")) == {"dim": 8}
