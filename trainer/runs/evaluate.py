"""The evaluation of a run: every held-out target ranked in the full catalogue, with intervals.

Both rankings of the protocol, with and without the items a user has seen, come from one scoring
pass; the popularity of the training interactions stands beside the model as the reference.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from features.atomic_files import write_table
from features.dataset import Dataset, EvalSplit, load_items, load_user_ids
from features.errors import UserError
from features.schema import PREDICTIONS_SCHEMA
from features.warehouse import Warehouse
from retrieval.index_ranking import rank_with
from retrieval.metrics import per_user
from retrieval.ranking import Ranks
from retrieval.significance import bootstrap
from trainer.checkpoint import load_weights
from trainer.evaluation.encode import encode, popularity_ranks, seen_by, targets_of
from trainer.evaluation.protocol import protocol_lines
from trainer.runs.folder import held_metrics, replace_metrics, run_lock
from trainer.runs.run import OpenRun
from trainer.tasks.alignment import Alignment
from trainer.tasks.pretrain import STAGE

SPLITS = ("validation", "test")
TARGETS = ("all", "cold")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalReport:
    """What ``mmrec eval`` prints."""

    run: str
    dataset: str
    model: str
    features: list[str]
    index: str
    protocol: list[str]
    """The protocol, a statement a line."""
    rows: list[dict[str, Any]]
    """Rows of the metrics table, see :data:`features.schema.METRICS_SCHEMA`."""


def evaluate(
    warehouse: Warehouse,
    run: OpenRun,
    *,
    index: str,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> EvalReport:
    """Evaluate the best checkpoint of a run and write its metrics and predictions.

    The two files belong together, and to the weights: ``predictions.parquet`` goes before the
    metrics change and comes back after them, so that a killed evaluation leaves none, never
    another's; training on drops what an evaluation wrote. Both hold the run's lock.

    Args:
        warehouse: Holds the run's dataset.
        run: Its weights are loaded here.
        index: Name in ``retrieval.indexes.INDEXES``; every exact one gives the same ranks.
        on_stage: Told what is being done.

    Raises:
        UserError: The checkpoint is absent or was written for something else, or the run is being
            trained or evaluated by another process, or it is a pre-training.
        ValueError: The index is not known.
    """
    check_recommends(run)
    with run_lock(run.folder):
        return _evaluate(warehouse, run, index, on_stage)


def _evaluate(
    warehouse: Warehouse, run: OpenRun, index: str, on_stage: Callable[[str], None]
) -> EvalReport:
    load_weights(run.folder / "model.safetensors", run.model, run.identity)
    held_metrics(run.folder / "metrics.parquet")  # a damaged one is told before anything goes
    dataset = run.data.dataset
    rows: list[dict[str, Any]] = []
    predictions: list[pa.Table] = []
    for split in SPLITS:
        on_stage(f"encoding {split}")
        encoded = encode(run.model, run.data, split, run.config.eval_batch)
        held = encoded.held
        targets, seen = targets_of(dataset, held), seen_by(dataset, held)
        on_stage(f"ranking {split}")
        ranks = rank_with(index, encoded.queries_ED, encoded.items_ND, targets, seen)
        popular = popularity_ranks(dataset, held)
        cold = dataset.cold[targets]
        on_stage(f"intervals of {split}")
        for name, subset in zip(TARGETS, (np.ones_like(cold), cold), strict=True):
            if not subset.any():
                continue
            for ranker, found in ((run.model_name, ranks), ("popularity", popular)):
                rows += metric_rows(split, name, ranker, found, subset)
        predictions.append(_predictions(dataset, held, split, ranks, cold))
    table = _with_ids(warehouse, run.dataset, pa.concat_tables(predictions))
    path = run.folder / "predictions.parquet"
    path.unlink(missing_ok=True)
    replace_metrics(
        run.folder / "metrics.parquet",
        rows,
        lambda held: held["phase"] == "eval" and held["targets"] in TARGETS,
    )
    write_table(path, table, compression="zstd")
    return EvalReport(
        run=run.folder.name,
        dataset=run.dataset,
        model=run.model_name,
        features=run.tables,
        index=index,
        protocol=protocol_lines(dataset.info),
        rows=rows,
    )


def check_recommends(run: OpenRun) -> None:
    """Refuse a pre-training.

    Raises:
        UserError: Says what can be done with one.
    """
    if run.stage == STAGE:
        aligned = isinstance(run.task, Alignment)
        also = ", or see mmrec eval --protocol retrieval" if aligned else ""
        raise UserError(
            f"run {run.folder.name!r} is a pre-training and recommends nothing; start one from it:"
            f" mmrec train --model {run.model_name} --init {run.folder.name}{also}"
        )


def metric_rows(
    split: str, targets: str, ranker: str, ranks: Ranks, subset: npt.NDArray[np.bool_]
) -> list[dict[str, Any]]:
    """Rows of the metrics table for some users of one split.

    Args:
        split: ``validation`` or ``test``.
        targets: Name of the subset.
        ranker: Who ranked.
        ranks: (E,) of all evaluated users.
        subset: (E,) bool, the users to average over; at least one.
    """
    rows = []
    for seen, found in (("filtered", ranks.filtered), ("kept", ranks.kept)):
        values = per_user(found[subset])
        matrix = np.stack(list(values.values()), axis=1)
        low, high = bootstrap(matrix)
        rows += [
            {
                "phase": "eval", "epoch": 0, "split": split, "targets": targets, "ranker": ranker,
                "seen": seen, "metric": metric, "value": float(matrix[:, i].mean()),
                "low": float(low[i]), "high": float(high[i]), "users": len(matrix),
            }
            for i, metric in enumerate(values)
        ]  # fmt: skip
    return rows


def _predictions(
    dataset: Dataset, held: EvalSplit, split: str, ranks: Ranks, cold: npt.NDArray[np.bool_]
) -> pa.Table:
    return pa.table(
        {
            "split": pa.array([split]).take(pa.array(np.zeros(len(held.users), np.int64))),
            "user": pa.array(held.users, pa.int32()),
            "item": pa.array(dataset.items[held.targets]),
            "history": pa.array(held.targets - held.starts, pa.int32()),
            "cold": pa.array(cold),
            "rank_kept": pa.array(ranks.kept, pa.int32()),
            "rank_filtered": pa.array(ranks.filtered, pa.int32()),
        }
    )


def _with_ids(warehouse: Warehouse, name: str, table: pa.Table) -> pa.Table:
    items = load_items(warehouse, name, ["item_id"]).column("item_id")
    users = load_user_ids(warehouse, name)
    table = table.append_column("item_id", items.take(table.column("item")))
    table = table.append_column("user_id", users.take(table.column("user")))
    return table.select(PREDICTIONS_SCHEMA.names).cast(PREDICTIONS_SCHEMA)
