import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from features.atomic_files import (
    atomic_write,
    database,
    lock,
    remove_leftovers,
    write_table,
    write_text,
)
from features.documents import read_json, write_json
from features.errors import UserError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_failed_write_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def half() -> None:
        with atomic_write(path) as beside:
            beside.write_text("ne")
            raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        half()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_the_temporary_is_in_the_same_folder_and_hidden_from_globs(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "deep" / "part-00000.parquet") as beside:
        beside.write_text("x")
        assert beside.parent == tmp_path / "deep"
        assert not list(beside.parent.glob("*.parquet"))
    assert names(tmp_path / "deep") == ["part-00000.parquet"]


def test_json_is_checked_before_it_replaces_anything(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"b": 1, "a": "ü"})
    assert list(json.loads(path.read_text())) == ["a", "b", "checksum"]
    assert read_json(path, "write it again") == {"b": 1, "a": "ü"}
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert '"b": 1' in path.read_text()


def test_a_table_comes_back_as_it_was(tmp_path: Path) -> None:
    table = pa.table({"a": [1, 2, 3]})
    write_table(tmp_path / "t.parquet", table, compression="none")
    assert pq.read_table(tmp_path / "t.parquet").equals(table)


def test_leftovers_of_a_killed_writer_go_and_nothing_else(tmp_path: Path) -> None:
    script = (
        "import os, sys\nfrom pathlib import Path\nfrom features.atomic_files import atomic_write\n"
        "with atomic_write(Path(sys.argv[1])) as beside:\n"
        "    beside.write_text('half')\n    os.kill(os.getpid(), 9)\n"
    )
    write_text(tmp_path / "a.txt", "old")
    (tmp_path / ".lock").touch()
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "a.txt")], check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(names(tmp_path)) == 3
    remove_leftovers(tmp_path)
    assert names(tmp_path) == [".lock", "a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


def test_a_second_holder_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "locks" / ".lock"
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom features.atomic_files import lock\n"
        "with lock(Path(sys.argv[1]), 'it'):\n    print('held', flush=True)\n    time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with (
            pytest.raises(UserError, match=r"another process is writing it .*locks"),
            lock(path, "it"),
        ):
            pass
        os.kill(other.pid, signal.SIGKILL)
        other.wait()
    with lock(path, "it"):  # the system frees it, whatever the holder died of
        pass


def test_a_lock_that_cannot_be_made_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="it cannot be locked"), lock(tmp_path / "file" / "a", "it"):
        pass

    def read_only(*arguments: object) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(UserError, match=r"Read-only.*writable"), lock(tmp_path / "a", "it"):
        pass


def test_a_lock_is_free_again_after_an_error(tmp_path: Path) -> None:
    def fail() -> None:
        with lock(tmp_path / "a", "it"):
            with pytest.raises(UserError, match="another process"), lock(tmp_path / "a", "it"):
                pass
            raise RuntimeError("halfway")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="halfway"):
            fail()


def test_files_have_the_usual_mode_and_databases_no_progress_bar(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "a") as beside:
        beside.touch(mode=0o600)
    (tmp_path / "b").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode
    with database() as db:
        setting = db.execute("SELECT current_setting('enable_progress_bar')").fetchone()
    assert setting == (False,)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_an_error_of_the_disk_names_the_file(tmp_path: Path, number: int) -> None:
    def write() -> None:
        with atomic_write(tmp_path / "table.json") as temporary:
            temporary.touch()
            raise OSError(number, os.strerror(number))

    with pytest.raises(OSError, match=re.escape(os.strerror(number))) as caught:
        write()
    assert caught.value.filename == str(tmp_path / "table.json")
    assert not list(tmp_path.iterdir())


WRITER = """
import sys, time
from pathlib import Path
from features.atomic_files import atomic_write
with atomic_write(Path(sys.argv[1])) as temporary:
    temporary.write_text("half")
    print("writing", flush=True)
    sys.stdin.readline()
"""


def test_the_temporary_file_of_a_living_process_stays(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "writing\n"
        remove_leftovers(tmp_path)
        write_text(path, "of another process")
        assert len(names(tmp_path)) == 2
        writer.communicate("\n")
    assert writer.returncode == 0
    assert path.read_text() == "half"
    assert names(tmp_path) == ["a.txt"]


def test_the_next_write_of_a_file_removes_its_leftovers_and_no_others(tmp_path: Path) -> None:
    for name in (".a.txt.0123abcd.tmp", ".b.txt.0123abcd.tmp", ".a.txt", "a.txt.tmp"):
        (tmp_path / name).touch()
    write_text(tmp_path / "a.txt", "new")
    assert names(tmp_path) == [".a.txt", ".b.txt.0123abcd.tmp", "a.txt", "a.txt.tmp"]


@pytest.mark.parametrize("is_replaced", [False, True])
def test_a_locked_folder_that_is_removed_is_an_error(tmp_path: Path, is_replaced: bool) -> None:
    folder = tmp_path / "run"

    def remove() -> None:
        with lock(folder / ".lock", "it"):
            shutil.rmtree(folder)
            if is_replaced:
                folder.mkdir()
                (tmp_path / "keeps the number of the first inode").touch()
                (folder / ".lock").touch()
            else:
                write_text(folder / "a.txt", "creates the folder again")

    with pytest.raises(UserError, match="removed"):
        remove()
