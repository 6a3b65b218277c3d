"""The contract of registered datasets and importers: every entry of the registries."""

from pathlib import Path

import pytest

from features.errors import UserError
from pipeline.datasets.importers.base import Importer
from pipeline.datasets.importers.registry import IMPORTERS
from pipeline.datasets.raw_files import locate_files, raw_format
from pipeline.datasets.registry import DATASETS, KnownDataset
from tests.pipeline.datasets.raws import folder


@pytest.mark.parametrize("name", list(DATASETS))
def test_a_dataset_can_be_read_by_its_importer(name: str) -> None:
    known = DATASETS[name]
    format = raw_format(name)
    assert known.source
    assert known.k_core >= 0
    assert format.name == known.importer
    assert set(known.files) <= set(format.importer.files)
    for role, patterns in known.files.items():
        assert format.files[role] == patterns


def test_a_dataset_cannot_have_a_role_that_its_importer_lacks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broken = KnownDataset(importer="table", source="x", files={"sounds": ("*.wav",)})
    monkeypatch.setitem(DATASETS, "broken", broken)
    with pytest.raises(UserError, match=r"'sounds'.*interactions, items"):
        raw_format("broken")


@pytest.mark.parametrize("name", list(IMPORTERS))
def test_an_importer_names_its_files(name: str, tmp_path: Path) -> None:
    importer = IMPORTERS[name]
    assert importer.summary
    assert "\n" not in importer.summary
    assert "interactions" in importer.required
    assert set(importer.required) <= set(importer.files)
    assert all(importer.files.values())
    raw = folder(tmp_path, {_file_name(importer, role): "" for role in importer.required})
    files = locate_files("x", raw_format("x", name), raw, {})
    assert files.keys() == importer.files.keys()
    assert all(len(files[role]) == 1 for role in importer.required)
    for role in importer.required:
        (raw / _file_name(importer, role)).unlink()
        with pytest.raises(UserError, match=rf"{role} of x.*--file {role}=PATH"):
            locate_files("x", raw_format("x", name), raw, {})
        (raw / _file_name(importer, role)).touch()


def _file_name(importer: Importer, role: str) -> str:
    return importer.files[role][-1].replace("*", "x")
