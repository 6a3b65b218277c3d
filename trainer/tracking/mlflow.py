"""MLflow: a SQLite store in the warehouse, which holds all tracked runs."""

import logging
import os
import shlex
import time
from collections.abc import Mapping

import mlflow
from mlflow.entities import Metric, Param

from trainer.tracking.base import TrackedRun, Tracker, markdown_table

_EXPERIMENT = "mmrec"
_KEY = "mmrec.key"
_LONGEST = 500  # characters of a parameter in stores of earlier versions


class MLflow(Tracker):
    """Write metrics by epoch, the settings as parameters, the final table as a file and metrics.

    The store is ``.mlflow/mlflow.db`` in the warehouse, unless ``MLFLOW_TRACKING_URI`` names
    another one. MLflow refuses ``@`` in names: ``HR@10`` becomes ``HR_at_10``.
    """

    def __init__(self, run: TrackedRun) -> None:
        logging.getLogger("mlflow").setLevel(logging.ERROR)  # it prints each table that it creates
        folder = run.shared.resolve() / ".mlflow"
        self._uri = os.environ.get("MLFLOW_TRACKING_URI", "")
        artifacts = None
        if not self._uri:
            folder.mkdir(exist_ok=True)
            self._uri = f"sqlite:///{folder / 'mlflow.db'}"
            artifacts = (folder / "artifacts").as_uri()
        self._client = mlflow.MlflowClient(tracking_uri=self._uri)
        experiment = self._client.get_experiment_by_name(_EXPERIMENT)
        number = (
            experiment.experiment_id
            if experiment
            else self._client.create_experiment(_EXPERIMENT, artifact_location=artifacts)
        )
        earlier = self._client.search_runs([number], f"tags.`{_KEY}` = '{run.key}'")
        if earlier:
            self._id = earlier[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        created = self._client.create_run(number, run_name=run.name, tags={_KEY: run.key})
        self._id = created.info.run_id
        settings = [Param(name, str(value)[:_LONGEST]) for name, value in run.settings.items()]
        self._client.log_batch(self._id, params=settings)

    @property
    def view(self) -> str:
        """Command that shows the store; it needs the whole package mlflow."""
        return f"mlflow ui --backend-store-uri {shlex.quote(self._uri)}"

    def log(self, epoch: int, values: Mapping[str, float]) -> None:
        """Write the values at the step of the epoch."""
        now = time.time_ns() // 1_000_000
        metrics = [Metric(_allowed(name), value, now, epoch) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def finish(self, table: Mapping[str, float], *, is_finished: bool) -> None:
        """Write the final table as ``final.md`` and as metrics, and end the run."""
        if table:
            self.log(0, table)
            self._client.log_text(self._id, markdown_table(table), "final.md")
        failure = "KILLED" if table else "FAILED"
        self._client.set_terminated(self._id, "FINISHED" if is_finished else failure)


def _allowed(name: str) -> str:
    return name.replace("@", "_at_")
