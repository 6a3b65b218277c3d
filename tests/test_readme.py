"""The commands in the READMEs are valid, those on the demo run, and links lead to files."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer

from cli.app import app
from tests.cli.invoke import run

ROOT = Path(__file__).parents[1]
PACKAGES = ("cli", "features", "pipeline", "retrieval", "trainer")
PAGES = [
    ROOT / "README.md",
    *sorted(path for package in PACKAGES for path in (ROOT / package).rglob("README.md")),
    ROOT / "warehouse" / "README.md",
    ROOT / ".github" / "CONTRIBUTING.md",
]
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMANDS: dict[str, Any] = vars(typer.main.get_command(app))["commands"]


@dataclass(frozen=True)
class Example:
    """A command of a page."""

    page: str
    arguments: tuple[str, ...]
    output: str
    """The lines below a command after ``$``, if there are any."""

    def __str__(self) -> str:
        return f"{self.page}: mmrec {shlex.join(self.arguments)}"


def examples(page: Path) -> Iterator[Example]:
    """Yield the commands of code blocks without a language, or of the shell."""
    name = str(page.relative_to(ROOT))
    for language, block in _FENCE.findall(page.read_text(encoding="utf-8")):
        if language not in ("", "sh", "bash", "console"):
            continue
        lines = iter(block.splitlines())
        for line in lines:
            command = line.removeprefix("$ ")
            if not command.startswith("mmrec "):
                continue
            while command.endswith("\\"):
                command = command[:-1] + next(lines)
            while (words := split(command)) is None:
                command += "\n" + next(lines)
            output = "".join(f"{rest}\n" for rest in lines) if line.startswith("$ ") else ""
            yield Example(name, tuple(words[1:]), output)


def split(command: str) -> list[str] | None:
    """Return the words of a command; None if a quote is open."""
    try:
        return shlex.split(command, comments=True)
    except ValueError:
        return None


def prose(page: Path) -> str:
    """Return a page without its code blocks."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def inline(page: Path) -> list[str]:
    """Return the commands in the text of a page, such as `mmrec eval --run RUN`."""
    text = prose(page)
    return [" ".join(span.split()) for span in re.findall(r"`(mmrec\s[^`]+)`", text)]


EXAMPLES = [example for page in PAGES for example in examples(page)]


def test_every_command_has_a_help_text_and_is_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, command in COMMANDS.items():
        assert command.help, name
        assert f"mmrec {name}" in text, name


@pytest.mark.parametrize("example", EXAMPLES, ids=str)
def test_a_command_of_a_block_is_valid(example: Example) -> None:
    name, *arguments = example.arguments
    assert name in COMMANDS, example
    COMMANDS[name].make_context(name, arguments)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_command_in_the_text_has_known_options(page: Path) -> None:
    for span in inline(page):
        name, *arguments = shlex.split(span)[1:]
        if name == "--help":
            continue
        if arguments and arguments[-1].startswith("--"):
            arguments.append("1")  # the text names an option without its value
        assert name in COMMANDS, span
        context = COMMANDS[name].context_class(COMMANDS[name])
        COMMANDS[name].make_parser(context).parse_args(arguments)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", prose(page)):
        assert link.startswith("https://") or (page.parent / link).exists(), link


def runs_on_the_demo(example: Example) -> bool:
    """Return True if a command needs no download, no other dataset, and less than 10 s."""
    name, *arguments = example.arguments
    if name in ("train", "pretrain", "grid", "demo"):
        return False
    if any(option in arguments for option in ("--raw", "--protocol")):
        return False
    if any(word.isupper() or word.startswith("RUN-") for word in arguments):
        return False  # a placeholder
    if "--dataset" in arguments:
        return arguments[arguments.index("--dataset") + 1] == "demo"
    return name != "extract"


ON_THE_DEMO = [example for example in EXAMPLES if runs_on_the_demo(example)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A warehouse with the demo, its features and an evaluated run."""
    root = str(tmp_path_factory.mktemp("readme") / "warehouse")
    run("prepare", "--dataset", "demo", "--warehouse", root)
    backbones = [word for kind in ("image", "text", "video") for word in (f"--{kind}", "hashed")]
    run("extract", *backbones, "--warehouse", root)
    settings = ["dim=16", "heads=2", "hidden=16", "epochs=1", "length=8", "device=cpu"]
    sets = [word for setting in settings for word in ("--set", setting)]
    run("train", "--model", "sasrec", *sets, "--warehouse", root)
    run("eval", "--warehouse", root)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("example", ON_THE_DEMO, ids=str)
def test_a_command_runs_on_the_demo(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, example: Example
) -> None:
    monkeypatch.setenv("MMREC_WAREHOUSE", root)
    monkeypatch.chdir(tmp_path)
    printed = run(*example.arguments).stdout
    if not example.output:
        return
    if re.search(r"\b(runs|metrics|predictions)\b", example.arguments[-1]):
        columns = example.output.splitlines()[0].split()
        assert printed.splitlines()[0].split() == columns  # the run is another one
    else:
        assert printed == example.output


def test_commands_on_the_demo_are_found() -> None:
    names = {example.arguments[0] for example in ON_THE_DEMO}
    assert {"prepare", "extract", "models", "eval", "recommend", "sql"} <= names


@pytest.mark.slow
def test_the_python_of_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = [
        block for language, block in _FENCE.findall(PAGES[0].read_text()) if language == "python"
    ]
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile("\n".join(blocks), "README.md", "exec"), names)
    assert names["vectors"].shape == (432, 128)
    assert 0 < len(names["table"]) <= 432
    printed = capsys.readouterr().out
    assert "sasrec" in printed
    assert printed.count("Suggestion(") == 5
