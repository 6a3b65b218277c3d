"""A prepared warehouse of a few rows for the tests of commands."""

import pytest

from features.warehouse import Warehouse
from tests.trainer import worlds


@pytest.fixture
def root(warehouse: Warehouse) -> str:
    """Return the path of a warehouse with 12 items and features of them."""
    world = worlds.cycles(n_items=12)
    bounds = zip(world.offsets, world.offsets[1:], strict=False)
    worlds.prepare(warehouse, [world.items[a:b].tolist() for a, b in bounds], 12)
    worlds.extract(warehouse, worlds.features(12))
    return str(warehouse.root)
