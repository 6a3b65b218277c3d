"""Train a run, and record its epochs."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from features.errors import UserError
from features.memory import memory_errors
from features.store import FeatureStore
from trainer.checkpoint import load_weights
from trainer.data.control import NONE
from trainer.data.feature_tables import choose_tables
from trainer.distributed import held_by_rank_zero, process_rank
from trainer.evaluation.transition_prior import PriorChoice, choose_prior
from trainer.loop import EpochRow, TrainProgress, fit
from trainer.runs.folder import record, recorded_seconds, run_lock
from trainer.runs.prior import add_prior, read_prior, write_prior
from trainer.runs.run import Run
from trainer.tasks.next_item import validation_users


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainReport:
    """Result of a training, printed as text or with ``--json``."""

    run: str
    dataset: str
    model: str
    features: list[str]
    """Labels of the feature tables."""
    parameters: int
    """Number of parameters."""
    device: str
    epochs: int
    """Finished epochs."""
    best_epoch: int
    """Epoch with the best validation, from 1; -1 before the first validation."""
    monitor: str
    """The monitored metric and the split that it is measured on."""
    best: float
    """Best value of the monitored metric."""
    seconds: float
    """Wall time of the training: of this call, and after a resume of the epochs before it."""
    finished: bool
    """False after an interrupt."""
    control: str = NONE
    """Control of the features, see :mod:`trainer.data.control`."""
    prior: PriorChoice | None = None
    """The prior that was chosen on validation; ``None`` without ``prior``."""


def train_run(
    run: Run,
    *,
    resume: bool = False,
    on_epoch: Callable[[EpochRow], None] = lambda row: None,
    on_progress: Callable[[TrainProgress], None] = lambda progress: None,
) -> TrainReport:
    """Train a run until its end or an interrupt, and add each epoch to the metrics table.

    The first epoch removes the rows of an evaluation, which belong to older weights. A finished run
    is not trained and keeps the rows. With ``resume``, a run that was stopped before its first save
    starts again and gives the same weights, bit for bit. With ``prior``, the end of the training
    chooses the prior on validation.

    Args:
        run: The run, as :func:`create_run` or :func:`open_run` returns it.
        resume: Continue from the last saved state.
        on_epoch: Called with each finished epoch; an exception in it ends the training.
        on_progress: Called after each step.

    Raises:
        UserError: Another process trains the run, its checkpoint cannot be used, or it diverges.
            The folder of the run, of its dataset or of a feature table was removed meanwhile.
        OutOfMemoryError: A step or a validation does not fit into memory.
    """
    resume = resume and _has_resume_state(run)
    run.model.prior = None
    began = time.monotonic()
    if resume:
        began -= recorded_seconds(run.folder / "metrics.parquet")
    lock = held_by_rank_zero(lambda: run_lock(run.folder))
    with lock, memory_errors(*_out_of_memory(run)):
        state = fit(
            run.task,
            run.config,
            run.folder,
            run.spec.identity(),
            resume=resume,
            on_epoch=_record_first(run, on_epoch),
            on_progress=on_progress,
        )
        prior = _prior(run) if state.finished else None
    _check_sources(run)
    return TrainReport(
        run=run.name,
        dataset=run.spec.dataset,
        model=run.spec.model,
        features=[*run.spec.features],
        parameters=run.parameters,
        device=str(run.data.device),
        epochs=state.epoch,
        best_epoch=state.best_epoch,
        monitor=f"{run.config.monitor} on {run.task.split(run.config)}",
        best=state.best,
        seconds=time.monotonic() - began,
        finished=state.finished,
        control=run.config.control,
        prior=prior,
    )


def _out_of_memory(run: Run) -> tuple[str, str]:
    """Return the place and the remedy of a training that does not fit into memory."""
    return (
        f"training of {run.spec.model} on {run.spec.dataset}"
        f" (batch_size={run.config.batch_size}, {run.parameters:,} parameters)"
        f" on {run.data.device}",
        f"train again with a smaller batch_size or model: mmrec models {run.spec.model}",
    )


def _prior(run: Run) -> PriorChoice | None:
    """Add the prior of a trained run to its model, and return it.

    If the run has no prior yet, it is chosen with the best weights.
    """
    if run.config.prior == "none" or process_rank() != 0:
        return None
    choice = read_prior(run.folder)
    if choice is None:
        load_weights(run.weights, run.model, run.spec.identity())
        choice = choose_prior(
            run.model,
            run.data,
            validation_users(run.data.dataset, run.config),
            with_transitions=run.config.prior == "transitions",
            metric=run.config.metric,
            seen=run.config.monitor_seen,
            batch_size=run.config.eval_batch,
        )
        write_prior(run.folder, choice)
    add_prior(run.folder, run.model, run.data)
    return choice


def _record_first(run: Run, on_epoch: Callable[[EpochRow], None]) -> Callable[[EpochRow], None]:
    """Return a callback that adds an epoch to the metrics table, and then calls ``on_epoch``."""

    def record_epoch(row: EpochRow) -> None:
        record(run.folder / "metrics.parquet", run.spec.model, row)
        on_epoch(row)

    return record_epoch


def _has_resume_state(run: Run) -> bool:
    """Return whether the run has a state to continue from; False before its first save.

    A model without parameters has no state: resuming fits it again.

    Raises:
        UserError: The state is gone, and the best weights are not.
    """
    if (run.folder / "resume.safetensors").exists():
        return True
    if run.weights.exists() and run.parameters:
        raise UserError(
            f"{run.folder}/resume.safetensors is gone, so the run cannot be resumed; its best"
            f" weights are intact: mmrec eval --run {run.name}, or train from them by --init"
        )
    return False


def _check_sources(run: Run) -> None:
    """Raise a UserError if a dataset or feature table of a trained run was removed."""
    store = FeatureStore(run.warehouse)
    try:
        for dataset in run.spec.datasets:
            run.warehouse.info(dataset)
            if run.spec.features:
                choose_tables(store, dataset, run.spec.features)
    except UserError as error:
        raise UserError(
            f"run {run.name} is saved, but its data were removed during the training, and without"
            f" them it cannot be evaluated: {error}"
        ) from None
