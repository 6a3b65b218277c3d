"""The evaluation of a run on a later preparation of its dataset, or on another dataset.

It is not the strict evaluation: training had other data. The targets that the run has trained on or
chosen its epoch by are left out, and the results are stored in a folder of their own, so that no
table mixes both.

The references are fitted on the training interactions of the evaluated preparation, also on those
that the run has never read.

Legend: U items of the training and of the evaluated preparation, E evaluated users.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from features.atomic_files import write_table
from features.dataset import Dataset, EvalSplit, Ints, load_user_ids
from features.errors import UserError
from features.memory import memory_errors
from features.result_tables import PROTOCOL_KEY
from features.schema import LATER_PREDICTIONS_SCHEMA, METRICS_SCHEMA
from features.warehouse import Warehouse
from retrieval.list_metrics import LIST_LENGTH
from retrieval.listed_items import ListedItems
from retrieval.metrics import UNRANKED
from retrieval.ranking import Ranks
from retrieval.registry import parse_index
from trainer.data.batches import TrainingData
from trainer.evaluation.encode import histories_of, targets_of
from trainer.evaluation.protocol import (
    KNOWN_ITEM,
    NEW_ITEM,
    PROTOCOL,
    REFERENCES,
    protocol_lines,
)
from trainer.evaluation.ranking import SplitRanks, build_reference
from trainer.evaluation.saved_indexes import INDEXES, SavedIndexes
from trainer.evaluation.search import CatalogueSearch
from trainer.runs.evaluate import (
    SPLITS,
    EvalReport,
    LaterFacts,
    Sample,
    approximate_lines,
    exact_name,
    prior_lines,
    references,
)
from trainer.runs.evaluation_rows import list_rows, metric_rows, prediction_columns, subsets
from trainer.runs.folder import LATER, run_lock
from trainer.runs.later import joint_and_later, open_later, readable_histories
from trainer.runs.learned_interactions import hash_ids, hash_pairs, read_learned
from trainer.runs.read import read_record
from trainer.runs.run import Run

PHASE = "later"
"""Value of ``phase`` in the metrics table, where the strict evaluation has ``eval``."""
LATER_KEY = "later"
"""Key of the facts in the file metadata of metrics and predictions."""
_DATA = ("items", "interactions", "features")  # entries of an identity that belong to the data


@dataclass(frozen=True, kw_only=True, slots=True)
class _Targets:
    """The targets of one split that the run has neither trained on nor chosen its epoch by."""

    users: EvalSplit
    """The evaluated users, with positions in ``run.later``."""
    items_E: Ints
    is_repeated_E: npt.NDArray[np.bool_]
    trained: int
    """Number of targets left out because the run has trained on them."""
    validation: int
    """Number of targets left out because they were validation targets of the training."""


@dataclass(kw_only=True, slots=True)
class _Evaluation:
    """The results of all splits."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    """Rows of the metrics table."""
    predictions: list[pa.Table] = field(default_factory=list)
    """Predictions without ids, whose items are numbered as in ``run.joint``."""
    unranked: dict[str, int] = field(default_factory=dict)
    """Split -> number of targets that the model cannot rank."""


def evaluate_later(
    warehouse: Warehouse,
    folder: Path,
    dataset: str,
    *,
    index: str,
    sample: Sample | None = None,
    device: str | None = None,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> EvalReport:
    """Evaluate the best weights of a run on a prepared dataset without training.

    The results are written into the folder ``later`` of the run's folder; those of a sample are not
    stored.

    Args:
        warehouse: Warehouse with the run and the dataset.
        folder: Folder of the run.
        dataset: The dataset; its feature tables have the provenance of the run's.
        index: Kind and parameters; every exact index gives the same ranks. Results of an
            approximate one are not written.
        sample: The test users to rank for; all users of both splits by default.
        device: Device of model and data; by default the device that it was trained on.
        on_stage: Called with the name of each stage.

    Raises:
        UserError: The run cannot be opened on the dataset, has stored no learned interactions, or
            has read all targets; or another process trains or evaluates it.
        OutOfMemoryError: The ranking does not fit into memory.
    """
    place = f"evaluation of run {folder.name} on {dataset}"
    with run_lock(folder), memory_errors(place, "free memory, or give --users"):
        on_stage("loading")
        run = open_later(warehouse, folder, dataset, device=device)
        targets = _targets_left(run, SPLITS if sample is None else ("test",), sample)
        searches = _searches(run, index, SavedIndexes(run.folder / INDEXES, on_stage))
        evaluation = _rank_run(run, searches, targets, on_stage)
        search = searches[run.spec.model].facts(LIST_LENGTH)
        facts = _facts(run, dataset, targets, evaluation.unranked)
        if sample is None and parse_index(index).is_exact:
            _write(run, dataset, facts, evaluation)
    return EvalReport(
        run=run.name,
        dataset=dataset,
        model=run.spec.model,
        features=list(run.spec.features),
        index=index,
        search=search,
        protocol=protocol_lines(run.data.dataset.info)
        + prior_lines(run)
        + later_lines(run, facts, sample)
        + approximate_lines(index),
        references=references(run),
        rows=evaluation.rows,
        sample=sample,
        later=facts,
    )


# -- targets ---------------------------------------------------------------------------------------


def _targets_left(run: Run, splits: Sequence[str], sample: Sample | None) -> dict[str, _Targets]:
    """Return the targets of each split that the run has not read.

    Raises:
        UserError: No target is left.
    """
    joint, later = joint_and_later(run)
    learned = read_learned(run.folder)
    users_U = hash_ids(load_user_ids(run.warehouse, later.info.name).to_pylist())
    items_U = hash_ids(joint.ids.to_pylist())
    targets = {}
    for split in splits:
        users = later.eval_split(split)
        items_E = targets_of(later, users)
        occurrence_E = _earlier_occurrences(later, users, items_E)
        counts = learned.counts(hash_pairs(users_U[users.users], items_U[items_E]))
        is_trained_E, is_read_E = (occurrence_E < count_E for count_E in counts)
        left = users.take(np.flatnonzero(~is_read_E))
        if sample is not None:
            left = left.sample(sample.users, sample.seed)
        left_items = targets_of(later, left)
        targets[split] = _Targets(
            users=left,
            items_E=left_items,
            is_repeated_E=histories_of(later, left).contain(left_items),
            trained=int(is_trained_E.sum()),
            validation=int((is_read_E & ~is_trained_E).sum()),
        )
    if not any(len(part.items_E) for part in targets.values()):
        trained = sum(part.trained for part in targets.values())
        validation = sum(part.validation for part in targets.values())
        raise UserError(
            f"no target of {later.info.name!r} is left to measure run {run.name!r} by: it has"
            f" trained on {trained:,} of them, and {validation:,} were its validation targets;"
            " prepare the dataset with later interactions, or name another one by --dataset"
        )
    return targets


def _earlier_occurrences(dataset: Dataset, users: EvalSplit, items_E: Ints) -> Ints:
    """Return how often the target's item is in each history before the target: (E,)."""
    histories = histories_of(dataset, users)
    row = np.repeat(np.arange(len(items_E)), np.diff(histories.offsets))
    return np.bincount(row[histories.items == items_E[row]], minlength=len(items_E))


# -- ranks -----------------------------------------------------------------------------------------


def _rank_run(
    run: Run,
    searches: Mapping[str, CatalogueSearch],
    targets: Mapping[str, _Targets],
    on_stage: Callable[[str], None],
) -> _Evaluation:
    """Rank the targets with the model and with each reference."""
    joint, later = joint_and_later(run)
    is_current_U, is_learned_U = joint.is_current_U, joint.is_learned_U
    evaluation = _Evaluation()
    for split, part in targets.items():
        if not len(part.items_E):
            continue
        on_stage(f"ranking {split}")
        by_ranker = {}
        for name, search in searches.items():
            is_own = name == run.spec.model
            histories = readable_histories(run, part.users) if is_own else part.users
            by_ranker[name] = _rank(search, part, histories, int(is_current_U.sum()))
        own, evaluation.unranked[split] = by_ranker[run.spec.model]
        on_stage(f"intervals of {split}")
        is_known_E = is_learned_U[part.items_E]
        others = {NEW_ITEM: ~is_known_E, KNOWN_ITEM: is_known_E}
        for subset, rows in subsets(own.ranks, others).items():
            for name, (ranked, _) in by_ranker.items():
                evaluation.rows += metric_rows(split, subset, name, ranked.ranks, rows)
                if subset == "all":
                    evaluation.rows += list_rows(later, split, name, ranked, is_current_U)
        columns = prediction_columns(later, split, own, later.cold[part.items_E])
        columns = columns.append_column("new_item", pa.array(~is_known_E))
        evaluation.predictions.append(columns)
    for row in evaluation.rows:
        row["phase"] = PHASE
    return evaluation


def _searches(run: Run, index: str, store: SavedIndexes) -> dict[str, CatalogueSearch]:
    """Return a search of the items that the model can rank, and of all items for each reference.

    Raises:
        UserError: The model can rank no item of the dataset.
    """
    joint, later = joint_and_later(run)
    is_listed_U = run.is_listed()
    if not is_listed_U.any():
        name = later.info.name
        raise UserError(
            f"run {run.name!r} ({run.spec.model}) can rank no item of {name!r}: it has learned none"
            f" of their ids, or they have no features; train on {name!r}, or name another dataset"
        )
    data = run.data
    if later is not data.dataset:
        data = TrainingData(later, data.features, data.device)
    rankers = {run.spec.model: (run.model, run.data, is_listed_U)} | {
        name: (build_reference(name, data), data, joint.is_current_U) for name in references(run)
    }
    return {
        name: CatalogueSearch(
            model,
            source,
            index=index if model is run.model else exact_name(index),
            batch_size=run.config.eval_batch,
            listed=ListedItems.of(is_ranked_U),
            store=store,
        )
        for name, (model, source, is_ranked_U) in rankers.items()
    }


def _rank(
    search: CatalogueSearch, targets: _Targets, histories: EvalSplit, last: int
) -> tuple[SplitRanks, int]:
    """Rank the targets that a model can rank, and give the others the last place.

    Args:
        search: The search of the model.
        targets: The targets.
        histories: The histories that the model reads; it ranks nothing for an empty one.
        last: The last place of the catalogue.

    Returns:
        The ranks, and the number of targets that the model cannot rank.
    """
    is_ranked_E = search.listed.numbers(targets.items_E) >= 0
    is_ranked_E &= histories.targets > histories.starts
    rows = np.flatnonzero(is_ranked_E)
    kept_E = np.full(len(is_ranked_E), last)
    filtered_E = np.where(targets.is_repeated_E, UNRANKED, last)
    recommended = dict.fromkeys(("filtered", "kept"), np.zeros(len(search.items_ND), np.int64))
    if len(rows):
        ranks, recommended = search.rank_and_count(histories.take(rows), targets.items_E[rows])
        kept_E[rows], filtered_E[rows] = ranks.kept, ranks.filtered
    ranked = SplitRanks(
        users=targets.users,
        targets_E=targets.items_E,
        ranks=Ranks(kept=kept_E, filtered=filtered_E),
        recommended=recommended,
    )
    return ranked, int((~is_ranked_E).sum())


# -- results ---------------------------------------------------------------------------------------


def _facts(
    run: Run, dataset: str, targets: Mapping[str, _Targets], unranked: dict[str, int]
) -> LaterFacts:
    joint, _ = joint_and_later(run)
    record, now = read_record(run.warehouse, run.name), run.spec.identity()
    kind = "other dataset"
    if dataset == record.about["dataset"]:
        is_same = all(record.identity.get(key) == now[key] for key in _DATA)
        kind = "same preparation" if is_same else "later preparation"
    is_current_U = joint.is_current_U
    return LaterFacts(
        kind=kind,
        trained_on=record.about["dataset"],
        fingerprint=run.spec.data.items,
        interactions=run.spec.data.interactions,
        items=int(is_current_U.sum()),
        new_items=int((is_current_U & ~joint.is_learned_U).sum()),
        trained_targets={split: part.trained for split, part in targets.items()},
        validation_targets={split: part.validation for split, part in targets.items()},
        unranked_targets=unranked,
    )


def later_lines(run: Run, facts: LaterFacts, sample: Sample | None) -> list[str]:
    """Return the description of an evaluation on a later preparation, one statement a line."""

    def counted(counts: Mapping[str, int]) -> str:
        return ", ".join(f"{split} {count:,}" for split, count in counts.items())

    lines = [
        f"{facts.kind}: the run was trained on {facts.trained_on!r} as it was then; mmrec compare,"
        " report and grid do not use these results",
        *run.catalogue_lines(),
        f"left out: targets that the run has trained on ({counted(facts.trained_targets)}), and"
        " validation targets of its training, by which early stopping chooses the epoch"
        f" ({counted(facts.validation_targets)})",
        f"{NEW_ITEM}: targets that the training did not have; {KNOWN_ITEM}: all others",
        f"{' and '.join(REFERENCES)}: fitted on the training interactions of this preparation, also"
        " on those that the run has never read",
    ]
    if any(facts.unranked_targets.values()):
        lines.append(
            f"last place: targets that {run.spec.model} cannot rank"
            f" ({counted(facts.unranked_targets)}), because it has learned neither the item nor an"
            " encoder of its features, or no item of the history"
        )
    if sample is not None:
        lines.append("results of a sample are not stored")
    return lines


def _write(run: Run, dataset: str, facts: LaterFacts, evaluation: _Evaluation) -> None:
    """Write metrics and predictions into a folder apart from those of the strict evaluation."""
    joint, _ = joint_and_later(run)
    folder = run.folder / LATER / dataset
    metadata = {PROTOCOL_KEY: PROTOCOL, LATER_KEY: json.dumps(asdict(facts))}
    table = pa.concat_tables(evaluation.predictions)
    columns = {name: table.column(name) for name in table.column_names} | {
        "user_id": load_user_ids(run.warehouse, dataset).take(table.column("user")),
        "item_id": joint.ids.take(table.column("item")),
        "item": joint.rows_of_later().take(table.column("item")),
    }
    predictions = pa.table(columns).select(LATER_PREDICTIONS_SCHEMA.names)
    tables = {
        "metrics": pa.Table.from_pylist(evaluation.rows, METRICS_SCHEMA),
        "predictions": predictions.cast(LATER_PREDICTIONS_SCHEMA),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "predictions.parquet").unlink(missing_ok=True)
    for name, content in tables.items():
        path = folder / f"{name}.parquet"
        write_table(path, content.replace_schema_metadata(metadata), compression="zstd")
