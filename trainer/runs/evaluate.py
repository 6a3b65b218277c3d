"""The evaluation of a run: every held-out target ranked in the full catalogue, with intervals.

One scoring pass gives both rankings of the protocol, seen items filtered and kept. The reference
models of :data:`trainer.evaluation.protocol.REFERENCES` are ranked in the same way.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from features.atomic_files import write_table
from features.dataset import EvalSplit, load_items, load_user_ids
from features.memory import memory_errors
from features.result_tables import PROTOCOL_KEY
from features.schema import PREDICTIONS_SCHEMA
from features.warehouse import Warehouse
from retrieval.listed_ranks import LIST_LENGTH
from retrieval.ranking import Ranks
from retrieval.registry import parse_index
from trainer.data.batches import Shard
from trainer.data.control import NONE, control_line
from trainer.distributed import (
    check_single_process,
    held_by_rank_zero,
    on_all_ranks,
    on_rank_zero,
    process_rank,
    world_size,
)
from trainer.evaluation.encode import targets_of
from trainer.evaluation.protocol import (
    HIDDEN,
    OCCURRENCES,
    PROTOCOL,
    REFERENCES,
    TARGETS,
    TRAIN,
    protocol_lines,
)
from trainer.evaluation.ranking import (
    RankShare,
    SplitRanks,
    build_reference,
    join_shares,
    rank_split,
    share_of_users,
)
from trainer.evaluation.saved_indexes import INDEXES, SavedIndexes
from trainer.evaluation.search_facts import SearchFacts, unusable_index
from trainer.models.base import Recommender
from trainer.runs.evaluation_rows import metric_rows, prediction_columns, split_rows, subsets
from trainer.runs.folder import replace_metrics, run_lock, stored_metrics
from trainer.runs.later import load_as_trained
from trainer.runs.prior import read_prior
from trainer.runs.run import Run

SPLITS = ("validation", "test")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """A random sample of test users."""

    users: int
    """Number of users; all of them if the split has fewer."""
    seed: int = 0
    """Equal seeds give equal samples."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LaterFacts:
    """The preparation of an evaluation that is not the strict one, and the targets left out."""

    kind: str
    """``later preparation`` of the dataset of the training, ``other dataset``, or
    ``same preparation``."""
    trained_on: str
    """Name of the dataset of the training."""
    fingerprint: str
    """Fingerprint of the item ids of the evaluated preparation."""
    interactions: str
    """Digest of its interactions."""
    items: int
    """Number of its items."""
    new_items: int
    """Number of its items that the training did not have."""
    trained_targets: dict[str, int]
    """Split -> number of targets left out because the run has trained on them."""
    validation_targets: dict[str, int]
    """Split -> number of targets left out because they were validation targets of the training."""
    unranked_targets: dict[str, int]
    """Split -> number of targets that the model cannot rank; they have the last place."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalReport:
    """The result of ``mmrec eval``."""

    run: str
    dataset: str
    model: str
    features: list[str]
    index: str
    """Kind and parameters of the index."""
    search: SearchFacts
    """The way in which the index searched, with the recall of an approximate one."""
    protocol: list[str]
    """The protocol, one statement a line."""
    references: list[str]
    """Names of the reference models in the rows."""
    rows: list[dict[str, Any]]
    """Rows of the metrics table, see :data:`features.schema.METRICS_SCHEMA`."""
    sample: Sample | None
    """The sample of test users that was ranked; ``None``: all users."""
    control: str = NONE
    """Control of the features of the run, see :mod:`trainer.data.control`."""
    later: LaterFacts | None = None
    """The facts of an evaluation on a preparation that is not that of the training."""


def evaluate(
    warehouse: Warehouse,
    run: Run,
    *,
    index: str,
    sample: Sample | None = None,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> EvalReport:
    """Evaluate the best checkpoint of a run, and write its metrics and predictions.

    The two files belong together and to the weights. ``predictions.parquet`` is removed before the
    metrics change and written after them, so that a killed evaluation leaves no predictions, never
    those of other weights. Training on removes the results of an evaluation. Both hold the run's
    lock. With a sample, only the test targets of these users are ranked, and nothing is written.
    Several processes share the users; process 0 writes.

    Args:
        warehouse: Warehouse with the run's dataset.
        run: The run; its weights are loaded here.
        index: Kind and parameters; every exact index gives the same ranks. Results of an
            approximate one are not written.
        sample: The test users to rank for; all users of both splits by default.
        on_stage: Called with the name of each stage.

    Raises:
        UserError: The run is a pre-training, its checkpoint is absent or was written for something
            else, or another process trains or evaluates it. Several processes have an approximate
            index.
        OutOfMemoryError: The ranking does not fit into memory.
        ValueError: The index is not known.
    """
    run.check_recommends()
    with unusable_index():
        is_exact = parse_index(index).is_exact
    if not is_exact:
        check_single_process(f"--index {index}, which is approximate,")
    batch = f"evaluation of run {run.name} (eval_batch={run.config.eval_batch})"
    remedy = "free memory, or train again with a smaller eval_batch"
    with held_by_rank_zero(lambda: run_lock(run.folder)), memory_errors(batch, remedy):
        load_as_trained(run)
        stored_metrics(run.folder / "metrics.parquet")  # report a damaged table first
        evaluation = rank_run(run, index, sample, on_stage)
        if sample is None and is_exact and process_rank() == 0:
            _write(warehouse, run, evaluation)
    report = report_of(run, evaluation, index)
    if sample is not None:
        report.protocol.append(
            "results of a sample are not stored: mmrec compare and report do not use them"
        )
    return report


def report_of(run: Run, evaluation: "Evaluation", index: str) -> EvalReport:
    """Return the report of an evaluation."""
    sample = evaluation.sample
    if sample is not None and sample.users >= len(run.data.dataset.eval_split("test").users):
        sample = None
    protocol = protocol_lines(run.data.dataset.info, hold_out_cold=run.config.hold_out_cold)
    protocol += prior_lines(run)
    control = run.config.control
    if control != NONE:
        protocol.insert(0, control_line(control))
    return EvalReport(
        run=run.name,
        dataset=run.spec.dataset,
        model=run.spec.model,
        features=list(run.spec.features),
        index=index,
        search=evaluation.search,
        protocol=protocol + approximate_lines(index),
        references=references(run),
        rows=evaluation.rows,
        sample=sample,
        control=control,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """The result of :func:`rank_run`."""

    rows: list[dict[str, Any]]
    """Rows of the metrics table, see :data:`features.schema.METRICS_SCHEMA`."""
    predictions: pa.Table
    """Predictions without the ids of users and items."""
    sample: Sample | None
    """The sample of test users that was ranked; ``None``: all users."""
    search: SearchFacts
    """How the index searched for the model of the run."""


def prior_lines(run: Run) -> list[str]:
    """Return the line about the prior of a run; no line without one."""
    if run.config.prior == "none":
        return []
    choice = read_prior(run.folder)
    if choice is None:
        return [f"prior: none yet; mmrec train --resume --run {run.name} chooses it"]
    return [f"{choice.line}; figures on validation are fitted ones"]


def approximate_lines(index: str) -> list[str]:
    """Return what the ranks of an approximate index mean; no lines for an exact one."""
    if parse_index(index).is_exact:
        return []
    return [
        f"approximate index {index}: a target that is not among the first {LIST_LENGTH} items that"
        " it finds has the last place",
        "results of an approximate index are not stored: mmrec compare, report and grid use exact"
        " ranks alone",
    ]


def exact_name(index: str) -> str:
    """Return the index that ranks the reference models: the given one if it is exact."""
    return index if parse_index(index).is_exact else "faiss"


def references(run: Run) -> list[str]:
    """Return the names of the reference models that are ranked next to the model of a run."""
    return [name for name in REFERENCES if name != run.spec.model]


def rank_run(
    run: Run, index: str, sample: Sample | None, on_stage: Callable[[str], None]
) -> Evaluation:
    """Rank the held-out targets of a run whose weights are loaded; nothing is written.

    Several processes call it together, and all of them return the same.

    Args:
        run: The run.
        index: Kind and parameters.
        sample: The test users to rank for; ``None``: all users of both splits.
        on_stage: Called with the name of each stage.
    """
    dataset = run.data.dataset
    rows: list[dict[str, Any]] = []
    predictions: list[pa.Table] = []
    facts: list[SearchFacts] = []
    store = SavedIndexes(run.folder / INDEXES, on_stage)
    rankers: dict[str, Recommender] = {run.spec.model: run.model}
    rankers |= {name: build_reference(name, run.data) for name in references(run)}
    for split in SPLITS if sample is None else ("test",):
        on_stage(f"ranking {split}")
        users = dataset.eval_split(split)
        if sample is not None:
            users = users.sample(sample.users, sample.seed)
        by_ranker = _rank_by_all(run, rankers, split, users, index, store, count_lists=True)
        own = by_ranker[run.spec.model]
        facts += [] if own.facts is None else [own.facts]
        is_cold = dataset.cold[own.targets_E]
        on_stage(f"intervals of {split}")
        others = {"cold": is_cold, HIDDEN: dataset.hidden[own.targets_E]}
        by_subset = subsets(own.ranks, others)
        rows += on_rank_zero(partial(split_rows, dataset, split, by_ranker, by_subset))
        predictions.append(prediction_columns(dataset, split, own, is_cold))
    if run.config.hold_out_cold:
        on_stage("ranking occurrences of cold items")
        occurrences = dataset.cold_occurrences()
        if sample is not None:
            occurrences = occurrences.take(np.flatnonzero(np.isin(occurrences.users, users.users)))
        in_train = _rank_by_all(run, rankers, TRAIN, occurrences, index, store)
        rows += on_rank_zero(partial(_occurrence_rows, by_ranker, in_train, is_cold))
        own = in_train[run.spec.model]
        all_cold = np.ones(len(occurrences.users), bool)
        predictions.append(prediction_columns(dataset, TRAIN, own, all_cold))
    return Evaluation(
        rows=rows,
        predictions=pa.concat_tables(predictions),
        sample=sample,
        search=facts[0] if facts else SearchFacts(line=""),  # no facts: nobody was ranked for
    )


def _rank_by_all(
    run: Run,
    rankers: Mapping[str, Recommender],
    split: str,
    users: EvalSplit,
    index: str,
    store: SavedIndexes,
    *,
    count_lists: bool = False,
) -> dict[str, SplitRanks]:
    """Rank the same targets with the model and with each reference."""
    batch_size, targets_E = run.config.eval_batch, targets_of(run.data.dataset, users)
    shard = Shard(process_rank=process_rank(), world_size=world_size())

    def rank_share(model: Recommender) -> RankShare:
        return RankShare.of(
            users,
            share_of_users(model, users, batch_size, shard),
            lambda part: rank_split(
                model,
                run.data,
                split,
                batch_size,
                index=index if model is run.model else exact_name(index),
                users=part,
                count_lists=count_lists,
                store=store,
            ),
        )

    join = partial(join_shares, users, targets_E)
    return {name: on_all_ranks(partial(rank_share, model), join) for name, model in rankers.items()}


def _occurrence_rows(
    test: Mapping[str, SplitRanks],
    in_train: Mapping[str, SplitRanks],
    is_cold: npt.NDArray[np.bool_],
) -> list[dict[str, Any]]:
    """Return the rows of ``cold-occurrences``, which belong to the split ``test``.

    The cold validation targets are left out, because early stopping has used them.

    Args:
        test: Ranker -> ranks of the test targets.
        in_train: Ranker -> ranks of the occurrences at training positions.
        is_cold: (E,) bool, the cold test targets.
    """
    rows = []
    for name, ranked in test.items():
        others = in_train[name]
        users = np.concatenate([ranked.users.users[is_cold], others.users.users])
        ranks = Ranks(
            kept=np.concatenate([ranked.ranks.kept[is_cold], others.ranks.kept]),
            filtered=np.concatenate([ranked.ranks.filtered[is_cold], others.ranks.filtered]),
        )
        if len(users):
            everyone = np.ones(len(users), bool)
            rows += metric_rows("test", OCCURRENCES, name, ranks, everyone, users=users)
    return rows


def _write(warehouse: Warehouse, run: Run, evaluation: Evaluation) -> None:
    """Write the metrics and the predictions of all users into the run's folder."""
    table = _with_ids(warehouse, run.spec.dataset, evaluation.predictions)
    path = run.folder / "predictions.parquet"
    path.unlink(missing_ok=True)
    replace_metrics(
        run.folder / "metrics.parquet",
        evaluation.rows,
        lambda row: row["phase"] == "eval" and row["targets"] in TARGETS,
    )
    table = table.replace_schema_metadata({PROTOCOL_KEY: PROTOCOL})
    write_table(path, table, compression="zstd")


def _with_ids(warehouse: Warehouse, name: str, table: pa.Table) -> pa.Table:
    items = load_items(warehouse, name, ["item_id"]).column("item_id")
    users = load_user_ids(warehouse, name)
    table = table.append_column("item_id", items.take(table.column("item")))
    table = table.append_column("user_id", users.take(table.column("user")))
    return table.select(PREDICTIONS_SCHEMA.names).cast(PREDICTIONS_SCHEMA)
