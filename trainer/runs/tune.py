"""Search settings with Optuna: each trial is a run that is judged by its validation alone.

The trials are in a SQLite file of the warehouse. Several processes can share it: a process draws
and marks its trial while it holds the lock of the search, and holds the lock of the trial until the
trial ends. A trial without a lock belongs to a process that was killed, and is done again.
"""

import hashlib
import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self, get_type_hints

import filelock
import optuna
import tomli_w
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial, Trial, TrialState

from features.atomic_files import atomic_write, lock
from features.errors import UserError, shorten, unknown
from features.memory import free_memory, memory_errors
from features.warehouse import Warehouse
from trainer.config import TrainConfig
from trainer.loop import EpochRow, TrainProgress
from trainer.models.registry import MODELS
from trainer.runs.folder import check_run_name, delete_runs, stored_metrics
from trainer.runs.grid import Stopped, train_to_end
from trainer.runs.grid_axes import ABOUT
from trainer.runs.grid_cells import Overrides, resolve_combination
from trainer.runs.spec import RunSpec
from trainer.runs.train import TrainReport
from trainer.runs.tune_file import Search, SettingRange

FOLDER = ".tune"
"""Folder of the warehouse with a file for each search."""
_LOCK_SECONDS = 300.0  # the longest wait for another process that draws a trial
_LONGEST_MESSAGE = 1000
_STARTUP_TRIALS = 5  # ended before a trial can be pruned
_WARMUP_EPOCHS = 5  # of each trial, before it can be pruned
_STATES = {
    TrialState.COMPLETE: "finished",
    TrialState.PRUNED: "pruned",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialRow:
    """One trial of a search."""

    number: int
    state: str
    """``finished``, ``pruned``, ``failed``, ``stopped`` (drawn again later), ``running`` or
    ``waiting``."""
    value: float | None
    """Best monitored value on the validation split; ``None`` unless finished."""
    epochs: int
    """Validated epochs."""
    values: dict[str, Any]
    """Name of each axis and range -> value."""
    run: str
    """Name of the run; the runs of pruned trials are deleted."""
    message: str
    """The reason of a failure."""


class Tuner:
    """A search that is open in this process; a context manager.

    Args:
        warehouse: Warehouse with the data; the search and its runs are in it.
        search: The content of the file.
        name: Name of the search; one that exists is continued.

    Raises:
        UserError: A setting is unknown, the name cannot be used, or a search of the name has other
            entries in ``[runs]`` or other data.
    """

    def __init__(self, warehouse: Warehouse, search: Search, name: str) -> None:
        check_run_name(f"tune-{name}-0000")
        self.name, self.search, self._warehouse = name, search, warehouse
        self._folder = warehouse.root / FOLDER
        self._distributions = _distributions(search)
        self._folder.mkdir(exist_ok=True)
        self.path = self._folder / f"{name}.sqlite"
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        with self._locked():
            self._storage = optuna.storages.RDBStorage(
                f"sqlite:///{self.path.resolve()}",
                engine_kwargs={"connect_args": {"timeout": _LOCK_SECONDS}},
            )
            pruner: optuna.pruners.BasePruner = optuna.pruners.NopPruner()
            if search.pruner == "median":
                pruner = optuna.pruners.MedianPruner(_STARTUP_TRIALS, _WARMUP_EPOCHS)
            self._study = optuna.create_study(
                study_name=name,
                storage=self._storage,
                direction="maximize",
                load_if_exists=True,
                pruner=pruner,
            )
            self._check_identity()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._storage.remove_session()
        self._storage.engine.dispose()

    def rows(self) -> list[TrialRow]:
        """Return all trials of all processes, by number."""
        return [_row(trial) for trial in self._study.get_trials(deepcopy=False)]

    def best(self) -> TrialRow | None:
        """Return the finished trial with the best value; the first one of equals."""
        rows = [row for row in self.rows() if row.value is not None]
        return max(rows, key=lambda row: (row.value, -row.number), default=None)

    def run(
        self, on_progress: Callable[[int, TrainProgress], None] = lambda number, progress: None
    ) -> Iterator[TrialRow]:
        """Run trials until the search has enough of them, or its time is over.

        Args:
            on_progress: Called with the number of the trial and the progress of its training.

        Yields:
            Each trial of this process, when it ends.

        Raises:
            Stopped: A training was interrupted. The next process continues it.
        """
        began = time.monotonic()
        limit = self.search.timeout
        while True:
            with ExitStack() as trial_lock:
                trial = self._ask(trial_lock)
                if trial is None:
                    return
                number = trial.number
                self._run(trial, partial(on_progress, number))
            yield self.rows()[number]
            if limit is not None and time.monotonic() - began >= limit:
                return

    def best_spec(self, row: TrialRow) -> RunSpec:
        """Return the description of the run of a trial."""
        return resolve_combination(
            self._warehouse, self.search.combination(row.values), Overrides()
        )

    def write_best(self, path: Path, row: TrialRow) -> list[str]:
        """Write the settings of a trial as a file for ``mmrec train --config``.

        Returns:
            The words of the command that trains with them.
        """
        spec = self.best_spec(row)
        words = ["mmrec", "train", "--model", spec.model, "--dataset", spec.dataset]
        words += [word for label in spec.features for word in ("--features", label)]
        if spec.init is not None:
            words += ["--init", spec.init.run, "--transfer", spec.init.transfer]
        document = {key: table for key, table in spec.document().items() if key != "run"}
        about = f"{spec.train.monitor} {row.value:.4f} on validation, trial {row.number}"
        comment = f"# Best settings of the search {self.name}: {about}.\n\n"
        with atomic_write(path) as temporary:
            temporary.write_text(comment + tomli_w.dumps(document), encoding="utf-8")
        return [*words, "--config", str(path)]

    def _locked(self) -> filelock.BaseFileLock:
        return filelock.FileLock(self._folder / f"{self.name}.lock", timeout=_LOCK_SECONDS)

    def _check_identity(self) -> None:
        """Refuse to continue a search with other entries or other data."""
        dataset, _ = self._warehouse.choose_dataset(
            _text(self.search.fixed.get("dataset")), 'dataset = "NAME" in [runs]'
        )
        info = self._warehouse.info(dataset)
        document = [self.search.runs, info.fingerprint, info.sequences]
        text = json.dumps(document, sort_keys=True, default=str)
        digest = hashlib.sha256(text.encode()).hexdigest()
        if self._study.user_attrs.setdefault("search", digest) != digest:
            raise UserError(
                f"the search {self.name!r} was begun with other entries in [runs], or with other"
                f" data; give another name by --name, or remove {self.path}"
            )
        self._study.set_user_attr("search", digest)

    def _ask(self, trial_lock: ExitStack) -> Trial | None:
        """Draw the next trial and lock it; ``None`` if there are enough."""
        with self._locked():
            for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                self._stop_if_killed(trial)
            rows = self.rows()
            if sum(row.state not in ("stopped", "waiting") for row in rows) >= self.search.trials:
                return None
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                self._study.sampler = _sampler(self.search.sampler, len(rows))
                drawn = self._study.ask(self._distributions)
            trial_lock.enter_context(self._trial_lock(drawn.number))
            return drawn

    def _trial_lock(self, number: int) -> Any:
        return lock(self._folder / f"{self.name}.{number}.lock", f"trial {number} of {self.name}")

    def _stop_if_killed(self, trial: FrozenTrial) -> None:
        try:
            with self._trial_lock(trial.number):
                self._stop(trial.number, trial.params, trial.user_attrs)
        except UserError:
            return  # another process runs it

    def _stop(self, number: int, params: Mapping[str, Any], attrs: Mapping[str, Any]) -> None:
        """End a trial without a result, and have its values drawn again, with the same run."""
        self._study.tell(number, state=TrialState.FAIL)
        kept = {key: attrs[key] for key in ("run",) if key in attrs}
        self._study.enqueue_trial(dict(params), user_attrs=kept)

    def _run(self, trial: Trial, on_progress: Callable[[TrainProgress], None]) -> None:
        """Run one trial to its end, and store its state."""
        is_again = "run" in trial.user_attrs
        run = trial.user_attrs.get("run", f"tune-{self.name}-{trial.number:04d}")
        trial.set_user_attr("run", run)
        try:
            report = self._train(trial, run, on_progress, is_again=is_again)
            self._study.tell(trial, report.best)
        except optuna.TrialPruned:
            delete_runs(self._warehouse, [run])
            self._study.tell(trial, state=TrialState.PRUNED)
        except UserError as error:
            free_memory()  # for the next trial
            trial.set_user_attr("message", shorten(str(error), _LONGEST_MESSAGE))
            self._study.tell(trial, state=TrialState.FAIL)
        except (Stopped, KeyboardInterrupt):
            self._stop(trial.number, trial.params, trial.user_attrs)
            raise
        except BaseException as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            trial.set_user_attr("message", shorten(reason, _LONGEST_MESSAGE))
            self._study.tell(trial, state=TrialState.FAIL)
            raise

    def _train(
        self,
        trial: Trial,
        run: str,
        on_progress: Callable[[TrainProgress], None],
        *,
        is_again: bool,
    ) -> TrainReport:
        combination = self.search.combination(trial.params)
        folder = self._warehouse.runs_dir / run
        remedy = "narrow the ranges, or free memory"
        with memory_errors(f"trial {trial.number} of the search", remedy):
            spec = resolve_combination(self._warehouse, combination, Overrides())
            spec.check_given_weights()
            key = (spec.train.monitor_seen, spec.train.metric)
            if folder.exists() and not is_again:
                raise UserError(
                    f"run {run!r} exists already and is not of this search; give another name by"
                    f" --name, or delete it: mmrec runs --delete {run}"
                )
            for epoch, value in _stored_curve(folder / "metrics.parquet", key):
                trial.report(value, epoch)

            def judge(row: EpochRow) -> None:
                if key in row.metrics:
                    trial.report(row.metrics[key], row.epoch)
                    if not row.is_last and trial.should_prune():
                        raise optuna.TrialPruned

            return train_to_end(
                self._warehouse, spec, folder, on_epoch=judge, on_progress=on_progress
            )[1]


def _stored_curve(path: Path, key: tuple[str, str]) -> list[tuple[int, float]]:
    """Return the epochs and monitored values of a training that is continued."""
    return [
        (row["epoch"], row["value"])
        for row in stored_metrics(path)
        if (row["split"], row["seen"], row["metric"]) == ("validation", *key)
    ]


def _row(trial: FrozenTrial) -> TrialRow:
    message = trial.user_attrs.get("message", "")
    return TrialRow(
        number=trial.number,
        state=_STATES.get(trial.state, "failed" if message else "stopped"),
        value=trial.value if trial.state == TrialState.COMPLETE else None,
        epochs=len(trial.intermediate_values),
        values=dict(trial.params),
        run=trial.user_attrs.get("run", ""),
        message=message,
    )


def _sampler(name: str, n_trials: int) -> optuna.samplers.BaseSampler:
    """Create the sampler of one trial; its seed is the number of the trials before.

    Processes that share a search therefore draw different trials, and one process alone draws the
    same ones again.
    """
    if name == "random":
        return optuna.samplers.RandomSampler(seed=n_trials)
    if name == "gp":
        return optuna.samplers.GPSampler(seed=n_trials)
    return optuna.samplers.TPESampler(seed=n_trials, constant_liar=True)


def _distributions(search: Search) -> dict[str, BaseDistribution]:
    """Return the space of a search in the classes of Optuna.

    Raises:
        UserError: No model of the search has one of the settings, or a range is not of its type.
    """
    models = {_text(search.fixed.get("model"))}
    for values in search.axes.values():
        models |= {_text(sets.get("model")) for sets in values.values()}
    kinds: dict[str, Any] = {}
    for model in models - {None}:
        kinds |= get_type_hints(MODELS.find(str(model)).load().settings_class)
    kinds |= get_type_hints(TrainConfig)
    distributions: dict[str, BaseDistribution] = {
        name: CategoricalDistribution(tuple(values)) for name, values in search.axes.items()
    }
    for name in sorted({*search.fixed, *search.varied_names()} - set(ABOUT)):
        if name not in kinds:
            raise UserError(f"{search.path}: {unknown('setting', name, sorted(kinds))}")
    for name, entry in search.ranges.items():
        try:
            distributions[name] = _number(name, entry, kinds.get(name))
        except UserError as error:
            raise UserError(f"{search.path}: {error}") from None
    return distributions


def _number(name: str, entry: SettingRange, kind: Any) -> BaseDistribution:
    if kind is float:
        low, high = float(entry.low), float(entry.high)
        return FloatDistribution(low, high, log=entry.log, step=entry.step)
    ends = (entry.low, entry.high, entry.step or 1)
    if kind is not int:
        raise UserError(f"{name} is not a number; give a list of its values, not a range")
    if any(type(value) is not int for value in ends):
        raise UserError(f"{name} is a whole number; give low, high and step without a point")
    return IntDistribution(int(ends[0]), int(ends[1]), log=entry.log, step=int(ends[2]))


def _text(value: object) -> str | None:
    return str(value) if value else None
