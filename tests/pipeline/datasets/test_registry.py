"""The contract of every dataset in the registry."""

import pytest

from features.errors import UserError
from pipeline.datasets.raw_files import raw_format
from pipeline.datasets.registry import DATASETS, KnownDataset


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
