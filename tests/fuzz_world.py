"""The folder in which the fuzzer runs its inputs."""

import os
import shutil
from pathlib import Path

from typer.testing import CliRunner

from cli.app import app
from pipeline.datasets.demo import make_demo


class World:
    """A folder with a prepared warehouse, trained runs, raw tables and odd files.

    Args:
        folder: An empty folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "outer" / "world"
        self._template = folder / "template"
        self._template.mkdir()
        _make_template(self._template)
        self.folder.parent.mkdir()
        self._state: dict[str, tuple[int, int]] = {}
        self._make()

    def restore(self) -> None:
        """Make the folder as it was at the beginning: copy and remove what has changed."""
        os.chdir(self.folder)
        state = self._signature()
        if state == self._state:
            return
        for path in sorted(state.keys() - self._state.keys(), reverse=True):
            _remove(Path(path))
        for path in sorted(self._state):
            if state.get(path) != self._state[path]:
                self._copy(Path(path))
        self._state = self._signature()

    def _make(self) -> None:
        """Make the folder as it is at the beginning."""
        shutil.copytree(self._template, self.folder, symlinks=True)
        os.mkfifo(self.folder / "odd" / "pipe")
        self._state = self._signature()

    def _copy(self, path: Path) -> None:
        """Copy one file or folder of the template, and leave what is in the folder."""
        source = self._template / path.relative_to(self.folder)
        if source.is_dir() and path.is_dir() and not path.is_symlink():
            return
        _remove(path)
        if source.is_dir():
            path.mkdir()
        elif path.name == "pipe":
            os.mkfifo(path)
        else:
            shutil.copy2(source, path, follow_symlinks=False)

    def write(self, files: dict[str, bytes]) -> None:
        """Write the files of an input."""
        for name, content in files.items():
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    def _signature(self) -> dict[str, tuple[int, int]]:
        return {
            str(path): ((status := path.lstat()).st_mtime_ns, status.st_size)
            for path in self.folder.rglob("*")
        }


def _remove(path: Path) -> None:
    """Remove a file or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _make_template(folder: Path) -> None:
    odd, raw, warehouse = folder / "odd", folder / "raw", folder / "warehouse"
    (odd / "folder").mkdir(parents=True)
    raw.mkdir()
    (odd / "empty").touch()
    (odd / "binary").write_bytes(bytes(range(256)) * 16)
    (odd / "text.csv").write_text("a,b\n1,2\n")
    (odd / "damaged.parquet").write_bytes(b"PAR1" + bytes(64) + b"PAR1")
    (odd / "loop").symlink_to("loop")
    (odd / "config.toml").write_text("epochs = 1\ndim = 8\nhidden = 8\n")
    (odd / "grid.toml").write_text(
        '[runs]\nmodel = ["sasrec", "popularity"]\nepochs = 1\ndim = 8\nhidden = 8\n'
    )
    rows = "".join(f"u{n % 4},i{n % 7},{n}\n" for n in range(28))
    (raw / "interactions.csv").write_text(f"user_id,item_id,timestamp\n{rows}")
    items = "".join(f"i{n},title {n}\n" for n in range(7))
    (raw / "items.csv").write_text(f"item_id,title\n{items}")
    make_demo(warehouse / "raw" / "demo", users=40, items=192)
    small = ["--set", "epochs=1", "--set", "dim=8", "--set", "hidden=8", "--set", "heads=2"]
    for command in (
        ["prepare", "--dataset", "demo"],
        ["extract", "--dataset", "demo", "--image", "hashed", "--text", "hashed"],
        ["train", "--dataset", "demo", "--model", "sasrec", "--name", "small", *small[:-2]],
        ["train", "--dataset", "demo", "--model", "mmsrec", "--name", "second", *small],
        ["eval", "--run", "small"],
        ["eval", "--run", "second"],
    ):
        result = CliRunner().invoke(app, [*command, "--warehouse", str(warehouse)])
        if result.exit_code:
            raise SystemExit(f"{command}: {result.output}")
