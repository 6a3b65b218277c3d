"""cli/README.md names files that exist, and its example command runs."""

import json
import re
from pathlib import Path
from typing import Any

import typer
from typer.testing import CliRunner

from cli.app import Group, app
from features.warehouse import Warehouse
from tests.trainer import worlds

PACKAGE = Path(__file__).parents[2] / "cli"
README = (PACKAGE / "README.md").read_text(encoding="utf-8")


def test_the_table_lists_every_file() -> None:
    table = README.partition("## How a command is built")[0]
    named = set(re.findall(r"`(\w+\.py)`", table))
    assert named == {path.name for path in PACKAGE.glob("[!_]*.py")}


def test_the_example_command_runs(warehouse: Warehouse) -> None:
    worlds.prepare(warehouse, [[0, 1, 2], [1, 2], [2]], 3)
    (code,) = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(code, "popular.py", "exec"), names)
    extended = typer.Typer(cls=Group)
    extended.registered_commands = [*app.registered_commands]
    extended.command("popular")(names["popular"])

    words = ["popular", "--k", "2", "--warehouse", str(warehouse.root)]
    result = CliRunner().invoke(extended, [*words, "--json"])
    assert result.exit_code == 0, result.output
    counts = [(row["item_id"], row["interactions"]) for row in json.loads(result.stdout)["items"]]
    assert counts == [("i2", 3), ("i1", 2)]
    printed = CliRunner().invoke(extended, words).stdout
    assert [line.split()[0] for line in printed.splitlines()] == ["item_id", "i2", "i1"]
    refused = CliRunner().invoke(extended, [*words, "--k", "0"])
    assert refused.exit_code == 2
    assert refused.stderr.startswith("error: --k 0")
    help_text = CliRunner().invoke(extended, ["--help"]).stdout
    assert "Print the items of a dataset with the most interactions." in help_text
