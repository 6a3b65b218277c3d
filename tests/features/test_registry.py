"""Registries: own entries, entries of installed packages, and packages that are broken."""

import sys
from pathlib import Path

import pytest

from features.errors import UserError
from features.registry import Registry


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package with four entry points, of which one can be used."""
    (tmp_path / "paint_shop.py").write_text("GREEN = 3\nWORD = 'green'\n")
    about = tmp_path / "paint_shop-1.2.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: paint-shop\nVersion: 1.2\n")
    (about / "entry_points.txt").write_text(
        "[mmrec.colours]\ngreen = paint_shop:GREEN\nblue = paint_shop:BLUE\n"
        "red = paint_shop:GREEN\nword = paint_shop:WORD\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "paint_shop", raising=False)


def test_packages_add_entries_and_broken_ones_are_named(package: None) -> None:
    colours = Registry("colour", {"red": 1}, group="mmrec.colours")
    assert dict(colours) == {"red": 1, "green": 3}
    assert (colours.origin("red"), colours.origin("green")) == ("mmrec", "paint-shop 1.2")
    assert colours.broken.keys() == {"blue", "red", "word"}
    assert all("paint-shop 1.2" in reason for reason in colours.broken.values())
    assert colours.find("green") == 3
    with pytest.raises(UserError, match=r"'blue'.*BLUE"):
        colours.find("blue")


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"'rot'.*red, green"):
        Registry("colour", {"red": 1, "green": 2}).find("rot")


def test_without_a_group_nothing_is_loaded(package: None) -> None:
    assert list(Registry("colour", {"red": 1})) == ["red"]


def test_classes_must_inherit_from_the_base(package: None) -> None:
    kinds: Registry[type] = Registry("kind", {"flag": bool}, group="mmrec.colours", base=int)
    assert list(kinds) == ["flag"]
    assert "a subclass of int" in kinds.broken["green"]
