"""Samples of users, and a least number of interactions of users alone."""

from pathlib import Path
from typing import Any

import pytest

from features.errors import UserError
from features.warehouse import Warehouse
from tests.pipeline.datasets.raws import prepared, sequences_of

RAW = {
    "sequences.txt": "".join(
        f"u{user} " + " ".join(f"i{(user + step) % 7}" for step in range(user % 5 + 1)) + "\n"
        for user in range(40)
    )
}


@pytest.mark.parametrize("seed", [0, 1])
def test_a_sample_depends_on_the_seed_alone(
    warehouse: Warehouse, tmp_path: Path, seed: int
) -> None:
    prepared(warehouse, tmp_path / "raw", RAW, format="sequences")
    whole = sequences_of(warehouse)
    options: dict[str, Any] = {"format": "sequences", "users": 10, "seed": seed}
    info = prepared(warehouse, tmp_path / "raw", RAW, **options)
    sample = sequences_of(warehouse)
    assert (info.users, info.sampled_users, info.seed) == (10, 10, seed)
    assert sample.items() <= whole.items()
    reversed_lines = {"sequences.txt": "\n".join(RAW["sequences.txt"].splitlines()[::-1]) + "\n"}
    prepared(warehouse, tmp_path / "reversed", reversed_lines, **options)
    assert sequences_of(warehouse) == sample
    prepared(warehouse, tmp_path / "raw", RAW, **options | {"seed": seed + 5})
    assert sequences_of(warehouse).keys() != sample.keys()


def test_a_sample_comes_before_the_core(warehouse: Warehouse, tmp_path: Path) -> None:
    info = prepared(warehouse, tmp_path / "raw", RAW, format="sequences", users=30, k_core=3)
    assert 0 < info.users < 30


def test_users_alone_are_filtered(warehouse: Warehouse, tmp_path: Path) -> None:
    rare = RAW["sequences.txt"] + "w rare rare rare rare\n"
    info = prepared(
        warehouse, tmp_path / "raw", {"sequences.txt": rare}, format="sequences", min_user=4
    )
    sequences = sequences_of(warehouse)
    assert min(map(len, sequences.values())) == 4
    assert "w" in sequences
    assert (info.users, info.k_core, info.min_user) == (17, 0, 4)


@pytest.mark.parametrize("name", ["users", "min_user"])
def test_counts_below_one_are_refused(warehouse: Warehouse, tmp_path: Path, name: str) -> None:
    options: dict[str, Any] = {name: 0}
    with pytest.raises(UserError, match="at least 1"):
        prepared(warehouse, tmp_path / "raw", RAW, format="sequences", **options)
