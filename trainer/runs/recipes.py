"""Recipes: tables of the papers as grids inside the package, open in their datasets.

A recipe is ``trainer/recipes/PAPER/NAME.toml``. It has the form of a grid file, see
:mod:`trainer.runs.grid_file`, with ``title``, ``departs`` and ``first``. The command fills in:

- ``dataset`` of ``[runs]``: the datasets of the command, an axis if ``rows`` or ``columns``
  names ``dataset``.
- ``{source}`` in the name of a variant or of a pre-training: the entry is repeated for each
  ``--source``.
- ``{sources}`` in ``datasets`` of a pre-training and in ``improvement``: all of them.

With ``kind = "statistics"`` a recipe is a table of datasets and has no runs. This module does not
import torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from features.documents import read_user_toml
from features.errors import UserError, unknown
from trainer.runs.grid_axes import SEED
from trainer.runs.grid_file import Grid, parse_grid

FOLDER = Path(__file__).parents[1] / "recipes"
STATISTICS = "statistics"
_EACH, _ALL = "{source}", "{sources}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """A grid file of a user or of the package, before the command fills in its datasets."""

    name: str
    """``PAPER/NAME``, or the path of the file."""
    document: dict[str, Any]

    @property
    def title(self) -> str:
        """What the table shows, with its number in the paper."""
        return str(self.document.get("title", ""))

    @property
    def departs(self) -> str:
        """How the table differs from the published one; empty if it does not."""
        return str(self.document.get("departs", ""))

    @property
    def first(self) -> list[str]:
        """Commands that make the feature tables of the recipe; D and EACH stand for datasets."""
        return list(self.document.get("first", []))

    @property
    def is_statistics(self) -> bool:
        """True for a table of datasets."""
        return self.document.get("kind") == STATISTICS

    @property
    def result(self) -> Path:
        """Default file of all metrics: the grid file with the ending of Parquet."""
        own = Path(self.name)
        return own.with_suffix(".parquet") if own.suffix else Path(f"{'-'.join(own.parts)}.parquet")


def recipe_names() -> list[str]:
    """Return the names of all recipes, papers together, tables in the order of the paper."""
    paths = [path.relative_to(FOLDER).with_suffix("") for path in FOLDER.glob("*/*.toml")]
    return [path.as_posix() for path in sorted(paths, key=_order)]


def _order(path: Path) -> tuple[str, str, int]:
    kind, _, number = path.name.partition("-")
    return path.parts[0], "" if kind == "table" else kind, int(number) if number.isdigit() else 0


def read_recipe(name: str) -> Recipe:
    """Read a recipe of the package, or the grid file of a user.

    Args:
        name: ``PAPER/NAME`` as :func:`recipe_names` returns it, or the path of a file.

    Raises:
        UserError: There is no such recipe and no such file, or the file is not TOML.
    """
    if name in recipe_names():
        return Recipe(name=name, document=read_user_toml(FOLDER / f"{name}.toml"))
    if not name.endswith(".toml") and not Path(name).exists():
        raise unknown("recipe", name, [*recipe_names(), "or the path of a TOML file"])
    return Recipe(name=name, document=read_user_toml(Path(name)))


def fill_recipe(
    recipe: Recipe, datasets: Sequence[str], sources: Sequence[str] = (), *, quick: bool = False
) -> Grid:
    """Return the grid of a recipe on the given datasets.

    Args:
        recipe: The recipe.
        datasets: Names of datasets; empty: the grid chooses as every command does, where an axis
            does not need them.
        sources: Datasets to pre-train on; empty: ``datasets``.
        quick: Keep one seed, and the first of the datasets.

    Raises:
        UserError: The file is wrong, sets its datasets itself, has one place for several, has no
            place for sources, or a source has the name of another entry.
    """
    document = dict(recipe.document)
    runs = dict(document["runs"]) if isinstance(document.get("runs"), dict) else {}
    placed = [*_names(document, "rows"), *_names(document, "columns")]
    if datasets and "dataset" in runs:
        raise UserError(f"{recipe.name} sets its datasets itself; leave --dataset out")
    if "dataset" in placed and "dataset" not in runs:
        runs["dataset"] = list(datasets)
    elif len(datasets) > 1:
        raise UserError(f"{recipe.name} is a table of one dataset, not of {', '.join(datasets)}")
    elif datasets:
        runs["dataset"] = datasets[0]
    if quick and isinstance(runs.get(SEED), list):
        runs[SEED] = runs[SEED][:1]
        if SEED not in placed:
            runs[SEED] = runs[SEED][0]
    _check_sources(recipe, sources)
    chosen = list(sources or datasets)
    runs = {
        key: _repeat(value, chosen) if isinstance(value, dict) else value
        for key, value in runs.items()
    }
    if runs:
        document["runs"] = runs
    if isinstance(document.get("improvement"), dict):
        document["improvement"] = _repeat(document["improvement"], chosen)
    if isinstance(document.get("pretrain"), dict):
        document["pretrain"] = _repeat(document["pretrain"], chosen)
    return parse_grid(Path(recipe.name), document)


def _check_sources(recipe: Recipe, sources: Sequence[str]) -> None:
    """Raise a UserError if sources are given twice, or to a recipe without a place for them."""
    for number, source in enumerate(sources):
        if source in sources[:number]:
            raise UserError(f"--source {source} is given twice; give it once")
    pretrainings = recipe.document.get("pretrain")
    if sources and not isinstance(pretrainings, dict):
        raise UserError(f"{recipe.name} has no pre-training; leave --source out")
    if sources and not any(place in str(pretrainings) for place in (_EACH, _ALL)):
        raise UserError(
            f"{recipe.name} names the datasets of its pre-training itself, or pre-trains on the"
            " dataset of each run; leave --source out"
        )


def _names(document: dict[str, Any], key: str) -> list[str]:
    value = document.get(key, [])
    return value if isinstance(value, list) else []


def _repeat(table: dict[str, Any], sources: Sequence[str]) -> dict[str, Any]:
    """Repeat the entries with ``{source}`` in their names, and fill in ``{sources}``."""
    filled: dict[str, Any] = {}
    for name, value in table.items():
        for source in sources if _EACH in name else [""]:
            entry = name.replace(_EACH, source)
            if entry in filled or (entry != name and entry in table):
                raise UserError(
                    f"the source {source!r} has the name of another entry, {entry!r}; prepare it"
                    " under another name: mmrec prepare --name NAME"
                )
            filled[entry] = _fill(value, source, sources)
    return filled


def _fill(value: Any, source: str, sources: Sequence[str]) -> Any:
    if isinstance(value, dict):
        return {key: _fill(inner, source, sources) for key, inner in value.items()}
    if isinstance(value, list):
        entries = [sources if entry == _ALL else [_fill(entry, source, sources)] for entry in value]
        return [inner for group in entries for inner in group]
    return value.replace(_EACH, source) if isinstance(value, str) else value
