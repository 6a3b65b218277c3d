"""The references of the retrieval protocol."""

import pytest

from features.warehouse import Warehouse
from tests.cli.test_pretrain import prepare
from tests.trainer import worlds
from trainer.evaluation.cross_modal import retrieval_rows, retrieve
from trainer.runs.evaluate_cross_modal import evaluate_retrieval
from trainer.runs.run import open_run
from trainer.runs.train import train_run

SMALL = ["dim=8", "heads=2", "hidden=8", "length=5", "epochs=1", "batch_size=16", "device=cpu"]


@pytest.mark.parametrize("setting", ["centre", "whiten"])
def test_the_untrained_model_has_the_fitted_maps_of_the_run(
    warehouse: Warehouse, setting: str
) -> None:
    """Its results are those of the run before its training, with the same random weights."""
    prepare(warehouse, 60)
    run = worlds.begin(
        warehouse,
        "mmsrec",
        settings=[*SMALL, "holdout=0.2", f"{setting}=true"],
        is_pretraining=True,
    )
    expected = [
        row
        for split, pool_K in run.task.pools.items()
        for row in retrieval_rows(
            split, "untrained", retrieve(run.model, run.data.features, pool_K)
        )
    ]
    train_run(run)
    report = evaluate_retrieval(warehouse, open_run(warehouse, run.folder))
    assert [row for row in report.rows if row["ranker"] == "untrained"] == expected
