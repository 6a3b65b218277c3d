"""The registry of recommenders, with models of an installed package that cannot be loaded."""

import sys
from pathlib import Path

import pytest

from features.errors import UserError
from trainer.models.registry import MODELS, Model, names_of


@pytest.mark.parametrize("target", ["own_models:Absent", "own_models:Other", "own_missing:Model"])
def test_a_model_that_cannot_be_loaded_is_named_and_left_out(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_models.py").write_text("class Other: ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_models", raising=False)
    monkeypatch.setitem(MODELS, "own", Model(target, "a model of a package"))
    with pytest.raises(UserError, match=f"{target}.*package") as refused:
        MODELS.find("own").load()
    assert "\n" not in str(refused.value)
    assert "own" not in names_of(lambda recommender: True)


def test_names_are_those_of_the_models_that_meet_a_condition() -> None:
    assert "sasrec" in names_of(lambda recommender: not recommender.needs_features)
    assert "mmsrec" not in names_of(lambda recommender: not recommender.needs_features)
