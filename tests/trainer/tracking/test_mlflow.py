"""The local store of MLflow, read back."""

from pathlib import Path

import pytest

from features.warehouse import Warehouse
from tests.trainer.tracking.tracked import stored, train

pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
pytestmark = pytest.mark.slow


@pytest.mark.filterwarnings("ignore")
def test_the_local_store_holds_losses_rates_metrics_settings_and_the_final_table(
    warehouse: Warehouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run, report, lines = train(warehouse, ["mlflow"])
    assert len(lines) == 1, lines
    store = warehouse.root.resolve() / ".mlflow"
    assert f"sqlite:///{store}/mlflow.db" in lines[0]
    client = MlflowClient(tracking_uri=f"sqlite:///{store}/mlflow.db")
    experiment = client.get_experiment_by_name("mmrec")
    assert experiment is not None
    (record,) = client.search_runs([experiment.experiment_id])
    assert (record.info.run_name, record.info.status) == ("r", "FINISHED")
    assert (record.data.params["model"], record.data.params["dim"]) == ("sasrec", "8")
    for name, values in {
        "train/loss": stored(run, "train", "loss", "none"),
        "validation/filtered/HR_at_10": stored(run, "validation", "HR@10", "filtered"),
        "rate/lr": [1e-3 * steps / 100 for steps in (3, 6, 9)],
    }.items():
        history = client.get_metric_history(record.info.run_id, name)
        assert [metric.step for metric in history] == [1, 2, 3], name
        assert [metric.value for metric in history] == pytest.approx(values), name
    assert record.data.metrics["best/epoch"] == report.best_epoch
    (table,) = Path(store).glob("artifacts/*/artifacts/final.md")
    assert f"| best/epoch | {report.best_epoch} |" in table.read_text()
