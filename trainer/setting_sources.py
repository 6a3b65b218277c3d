"""From words to settings: presets, TOML files and ``key=value`` pairs."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from features.documents import read_user_toml
from features.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class SettingSources:
    """The settings that a user gives: a preset of the model, a TOML file, and ``key=value`` pairs.

    The file wins over the preset, and the pairs win over both.
    """

    preset: str | None = None
    """Name of a preset of the model."""
    file: Path | None = None
    pairs: Sequence[str] = field(default=())

    def parsed_pairs(self) -> dict[str, str]:
        """Return the pairs as a dictionary of texts.

        Raises:
            UserError: A pair has no ``=``, or two pairs have the same key.
        """
        values: dict[str, str] = {}
        for pair in self.pairs:
            key, equals, value = pair.partition("=")
            if not equals or not key.strip():
                raise UserError(
                    f"--set {pair!r} has no {'name' if equals else '='}; give NAME=VALUE, such as"
                    " --set dim=64"
                )
            if key in values:
                raise UserError(f"--set gives {key!r} twice; give it once")
            values[key] = value
        return values

    def names(self) -> set[str]:
        """Return the names of the settings in the file and in the pairs."""
        in_file = set() if self.file is None else set(read_flat(self.file))
        return in_file | set(self.parsed_pairs())


def build_settings(
    classes: Sequence[type[Any]], sources: SettingSources, defaults: Mapping[str, Any]
) -> tuple[Any, ...]:
    """Create settings from defaults, a TOML file and ``--set``; the last one wins.

    The keys of all classes share one flat space, in the file (under any table) and in ``--set``.

    Args:
        classes: Subclasses of :class:`Settings`; no two have a key in common.
        sources: The file, such as the ``config.toml`` of a run, and the pairs.
        defaults: Values that replace the defaults of the classes.

    Raises:
        UserError: A key is unknown, or a value has the wrong type or is outside its limits; the
            line names the file, if there is one.
    """
    values = dict(defaults)
    try:
        if sources.file is not None:
            values |= read_flat(sources.file)
        return _create(classes, values, sources.parsed_pairs())
    except UserError as error:
        if sources.file is None or str(sources.file) in str(error):
            raise
        place = f"{sources.file} with --set" if sources.pairs else str(sources.file)
        raise UserError(f"{place}: {error}") from None


def settings_tables(train: Any, model: Any, task: Any = None) -> dict[str, Any]:
    """Return the tables ``[train]``, ``[model]`` and ``[task]`` of a run's ``config.toml``."""
    tables = {"train": asdict(train), "model": asdict(model)}
    return tables if task is None else tables | {"task": asdict(task)}


_RENAMED = {"tower": "sequence_encoder", "cosine": "score=cosine"}
"""Settings of mmrec 0.1, and what replaces them."""
_KINDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    int | str: "a whole number or a word",
}


def _create(
    classes: Sequence[type[Any]], values: dict[str, Any], pairs: Mapping[str, str]
) -> tuple[Any, ...]:
    kinds: dict[str, Any] = {}
    for settings_class in classes:
        kinds |= get_type_hints(settings_class)
    for key in (*values, *pairs):
        if key not in kinds and key in _RENAMED:
            raise UserError(f"setting {key!r} has a new name; give {_RENAMED[key]}")
        if key not in kinds:
            raise UserError(f"unknown setting {key!r}; known: {', '.join(sorted(kinds))}")
    values |= {key: _convert(key, text, kinds[key]) for key, text in pairs.items()}
    for key, value in values.items():
        if kinds[key] is float and type(value) is int:
            values[key] = float(value) if abs(value) < 2**53 else math.inf  # refused by its limit
        elif type(value) not in (get_args(kinds[key]) or (kinds[key],)):
            raise UserError(f"{key}={value!r} must be {_KINDS[kinds[key]]}")
    return tuple(
        kind(**{f.name: values[f.name] for f in fields(kind) if f.name in values})
        for kind in classes
    )


def _convert(key: str, text: str, kind: Any) -> Any:
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise UserError(f"{key}={text!r} must be true or false")
        return text.lower() == "true"
    if kind == int | str:
        return int(text) if re.fullmatch(r"[+-]?\d{1,20}", text) else text
    try:
        return kind(text)
    except ValueError:
        raise UserError(f"{key}={text!r} must be {_KINDS[kind]}") from None


def read_flat(file: Path) -> dict[str, Any]:
    """Read the settings of a TOML file, without its tables; ``[run]`` holds no settings.

    Raises:
        UserError: The file cannot be read, or sets a key twice.
    """
    document = read_user_toml(file)
    document.pop("run", None)
    values: dict[str, Any] = {}
    for key, value in document.items():
        table = value if isinstance(value, dict) else {key: value}
        for name in table.keys() & values.keys():
            raise UserError(f"{file} sets {name} twice; tables do not separate settings")
        values.update(table)
    return values
