"""Own columns of items: the keys of ``attributes`` as typed columns of the SQL view ``items``.

``attributes`` is one JSON object for each item. A key becomes a column of the type that holds all
of its values: text of numbers alone, as CSV has it, is a number.
"""

import json
from collections import Counter
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

import duckdb

from features.sql_text import pointer_sql

_TEXT = "VARCHAR"
_MOST_COLUMNS = 500  # keys that are data, such as dates, are no columns
_MOST_SHAPES = 100  # of lists; lists of more forms are lists of text
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
    kinds: dict[str, dict[str, tuple[bool, bool]]] = {}
    for key, kind, is_integer, is_number in db.sql(_keys_sql(source)).fetchall():
        kinds.setdefault(key, {})[kind] = (is_integer, is_number)
    if len(kinds) > _MOST_COLUMNS:
        return {}
    columns = {}
    for key in sorted(kinds):
        of_key = {kind: tests for kind, tests in kinds[key].items() if kind != "NULL"}
        is_list = set(of_key) == {"ARRAY"}
        columns[key] = _list_type(db, source, key) if is_list else _scalar_type(of_key)
    return columns


def _keys_sql(source: str) -> str:
    """Return a query of each key and kind of value, and whether all of them read as numbers."""
    # The pointer of pointer_sql, for keys that are not known yet.
    pointer = "'/' || replace(replace(key, '~', '~0'), '/', '~1')"
    tests = ", ".join(
        f"coalesce(bool_and(regexp_full_match(nullif(text, ''), '{pattern}')), false)"
        for pattern in (_INTEGER, _DECIMAL)
    )
    return (
        f"SELECT key, kind, {tests} FROM (SELECT key, json_type(attributes, {pointer}) AS kind,"
        f" json_extract_string(attributes, {pointer}) AS text FROM"
        f" (SELECT attributes, unnest(json_keys(attributes)) AS key FROM ({source})"
        " WHERE attributes IS NOT NULL)) GROUP BY key, kind"
    )


def _scalar_type(kinds: Mapping[str, tuple[bool, bool]]) -> str:
    """Return the SQL type of a key.

    Args:
        kinds: Each kind of its values, as ``json_type`` names it, to whether all values of the kind
            are integers of 64 bits and whether all are numbers.
    """
    if set(kinds) == {"BOOLEAN"}:
        return "BOOLEAN"
    if set(kinds) == {_TEXT}:
        ((is_integer, is_number),) = kinds.values()
        return "BIGINT" if is_integer else "DOUBLE" if is_number else _TEXT
    if kinds and kinds.keys() <= {"UBIGINT", "BIGINT", "DOUBLE"}:
        if "DOUBLE" in kinds:
            return "DOUBLE"
        # Integers beyond 64 bits are exact as text alone.
        return "BIGINT" if all(is_integer for is_integer, _ in kinds.values()) else _TEXT
    return _TEXT


def _list_type(db: duckdb.DuckDBPyConnection, source: str, key: str) -> str:
    """Return the SQL type of a key whose values are lists, also nested."""
    shapes = db.sql(
        f"SELECT DISTINCT json_structure(json_extract(attributes, {pointer_sql(key)}))::VARCHAR"
        f" FROM ({source}) WHERE json_type(attributes, {pointer_sql(key)}) = 'ARRAY'"
        f" LIMIT {_MOST_SHAPES}"
    ).fetchall()
    types = {_shape_type(json.loads(shape)) for (shape,) in shapes} - {"[]"}
    numbers = {f"{kind}[]" for kind in ("BIGINT", "DOUBLE")}
    if types == numbers:
        return "DOUBLE[]"
    if len(types) != 1 or len(shapes) == _MOST_SHAPES:
        return f"{_TEXT}[]"
    return types.pop()


def _shape_type(shape: Any) -> str:
    """Return the SQL type of a list of ``json_structure``; ``[]`` for a list without values."""
    depth = 0
    while isinstance(shape, list) and len(shape) == 1:
        shape, depth = shape[0], depth + 1
    if not isinstance(shape, str):  # an object, or an empty list
        return f"{_TEXT}[]" if shape else "[]"
    leaf = {"UBIGINT": "BIGINT", "NULL": ""}.get(shape, shape)
    known = ("BIGINT", "DOUBLE", "BOOLEAN", "")
    return "[]" if not leaf else (leaf if leaf in known else _TEXT) + "[]" * depth


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
            # SQL ends a name at the null character.
            lowered = key.lower().replace("\0", "\N{REPLACEMENT CHARACTER}")
            slots.setdefault((lowered, repeats[lowered]), {})[dataset] = key
            repeats[lowered] += 1
    plain, prefixed = [], []
    for (lowered, repeat), keys in sorted(slots.items()):
        kinds = {datasets[dataset][key] for dataset, key in keys.items()}
        is_clash = len(kinds) > 1 and kinds != {"BIGINT", "DOUBLE"}
        kind = _TEXT if is_clash else max(kinds)  # DOUBLE holds BIGINT
        name = next(iter(keys.values())).replace("\0", "\N{REPLACEMENT CHARACTER}")
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
