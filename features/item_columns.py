"""Own columns of items: the keys of ``attributes`` as typed columns of the SQL view ``items``.

``attributes`` is one JSON object for each item. A key becomes a column of the type that holds all
of its values: text of numbers alone, as CSV has it, is a number.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any

import duckdb

from features.sql_text import pointer_sql

_TEXT = "VARCHAR"
_MOST_COLUMNS = 500  # keys that are data, such as dates, are no columns
# A number as programs write it: text such as 007 or +1 is a code, and stays text.
_INTEGER = "-?(0|[1-9][0-9]{0,17})"
_DECIMAL = _INTEGER + r"(\.[0-9]+)?([eE][+-]?[0-9]+)?"
PREFIX = "raw_"
"""Prefix of an own column whose name is taken, or whose type differs between datasets."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ItemColumn:
    """An own column in the view of several datasets."""

    name: str
    kind: str
    """SQL type."""
    keys: Mapping[str, str]
    """Dataset to its key of ``attributes``; a dataset without the column is absent."""

    def value_sql(self, dataset: str) -> str:
        """Return SQL of the value in a row of a dataset that has the column."""
        function = "json_extract" if self.kind.endswith("[]") else "json_extract_string"
        return f"TRY_CAST({function}(attributes, {pointer_sql(self.keys[dataset])}) AS {self.kind})"


def own_columns(db: duckdb.DuckDBPyConnection, source: str) -> dict[str, str]:
    """Return the keys of ``attributes`` in alphabetical order, with the SQL type of each.

    The types are ``BIGINT``, ``DOUBLE``, ``BOOLEAN``, ``VARCHAR`` and lists of these. An object, or
    a key whose values have several types, is its JSON as ``VARCHAR``. Of more than 500 keys, none
    is a column.

    Args:
        db: A connection.
        source: A query with the column ``attributes``.
    """
    rows = f"(SELECT attributes FROM ({source}) WHERE attributes IS NOT NULL)"
    ((structure,),) = db.sql(
        f"SELECT json_group_structure(attributes::JSON) FROM {rows}"
    ).fetchall()
    shapes = json.loads(structure) if structure else {}
    if not isinstance(shapes, dict) or len(shapes) > _MOST_COLUMNS:
        return {}
    columns = {key: _type_of(shape) for key, shape in sorted(shapes.items())}
    tested = [key for key, shape in shapes.items() if shape in (_TEXT, "UBIGINT", "BIGINT")]
    for key, (is_integer, is_decimal) in zip(tested, _test_numbers(db, rows, tested), strict=True):
        if is_integer:
            columns[key] = "BIGINT"
        elif is_decimal and shapes[key] == _TEXT:
            columns[key] = "DOUBLE"
    return columns


def _test_numbers(
    db: duckdb.DuckDBPyConnection, rows: str, keys: list[str]
) -> Iterator[tuple[bool, bool]]:
    """Yield whether all values of each key are integers, and whether all are numbers."""
    if not keys:
        return
    # One list of pointers parses each object once.
    pointers = ", ".join(map(pointer_sql, keys))
    tests = ", ".join(
        f"coalesce(bool_and(regexp_full_match(nullif(part[{number}], ''), '{pattern}')), false)"
        for number in range(1, len(keys) + 1)
        for pattern in (_INTEGER, _DECIMAL)
    )
    (results,) = db.sql(
        f"SELECT {tests} FROM (SELECT json_extract_string(attributes, [{pointers}]) AS part"
        f" FROM {rows})"
    ).fetchall()
    yield from zip(results[::2], results[1::2], strict=True)


def _type_of(shape: Any) -> str:
    """Return the SQL type of a shape of ``json_group_structure``."""
    if isinstance(shape, list):
        return f"{_type_of(shape[0]) if len(shape) == 1 else _TEXT}[]"
    return shape if shape in ("DOUBLE", "BOOLEAN") else _TEXT


def view_columns(datasets: Mapping[str, Mapping[str, str]], taken: Set[str]) -> list[ItemColumn]:
    """Return the own columns in the view of several datasets.

    Case does not matter in SQL, so keys of two datasets that differ by case alone are one column.
    A key whose name is taken gets the prefix ``raw_``, and so does a key whose types differ between
    the datasets: its column is text. Integers and other numbers are one type.

    Args:
        datasets: Dataset to its own columns and their types.
        taken: Names of the other columns of the view, in lower case.
    """
    slots: dict[tuple[str, int], dict[str, str]] = {}
    for dataset, columns in datasets.items():
        repeats: Counter[str] = Counter()
        for key in columns:
            lowered = key.lower()
            slots.setdefault((lowered, repeats[lowered]), {})[dataset] = key
            repeats[lowered] += 1
    plain, prefixed = [], []
    for (lowered, repeat), keys in sorted(slots.items()):
        kinds = {datasets[dataset][key] for dataset, key in keys.items()}
        is_clash = len(kinds) > 1 and kinds != {"BIGINT", "DOUBLE"}
        kind = _TEXT if is_clash else max(kinds)  # DOUBLE holds BIGINT
        name = next(iter(keys.values()))
        if is_clash or lowered in taken or repeat or not name:
            prefixed.append((name, kind, keys))
        else:
            plain.append(ItemColumn(name=name, kind=kind, keys=keys))
    names = set(taken) | {column.name.lower() for column in plain}
    for name, kind, keys in prefixed:
        while name.lower() in names or not name.startswith(PREFIX):
            name = PREFIX + name
        names.add(name.lower())
        plain.append(ItemColumn(name=name, kind=kind, keys=keys))
    return plain
