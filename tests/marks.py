"""Marks of tests."""

from collections.abc import Iterable
from typing import Any

import pytest


def heavy_after(count: int, cases: Iterable[Any]) -> list[Any]:
    """Return cases of a parametrized test, and mark those after the first ``count`` as heavy.

    `make test` runs the first ones, `make heavy` the others.

    Args:
        count: Number of cases that are not heavy.
        cases: The cases: a value or a tuple of values each.
    """
    return [
        case
        if number < count
        else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.heavy)
        for number, case in enumerate(cases)
    ]
