"""The retrieval protocol of a run: from an item's text to its image or video, and back."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from features.dataset import Ints
from features.errors import UserError
from features.warehouse import Warehouse
from trainer.checkpoint import load_weights
from trainer.data.batches import ItemFeatures
from trainer.data.control import NONE, control_line
from trainer.data.multi_dataset import load_data
from trainer.evaluation.cross_modal import (
    TO_TEXT,
    TO_VISION,
    Sides,
    both_ways,
    raw_sides,
    retrieval_rows,
    retrieve,
    same_vision,
    without_vision_of,
)
from trainer.evaluation.ridge import LEAST_PAIRS, RidgeRetrieval
from trainer.runs.folder import replace_metrics, run_lock
from trainer.runs.run import Run
from trainer.tasks.alignment import Aligned

_ALL = "all items"


@dataclass(frozen=True, kw_only=True, slots=True)
class RetrievalReport:
    """The result of ``mmrec eval --protocol retrieval``."""

    run: str
    dataset: str
    """Dataset whose items are retrieved."""
    model: str
    features: list[str]
    protocol: list[str]
    rows: list[dict[str, Any]]
    """Rows of the metrics table, see :data:`features.schema.METRICS_SCHEMA`."""
    control: str = NONE
    """Control of the features of the run, see :mod:`trainer.data.control`."""


def evaluate_retrieval(
    warehouse: Warehouse,
    run: Run,
    *,
    dataset: str | None = None,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> RetrievalReport:
    """Rank a pool of items across modalities by the run's best weights.

    References are ridge regression, fitted on the training items of a pre-training; the model with
    random weights; and the features themselves if both sides have vectors of one width. Results on
    the run's own items are stored in its metrics.

    Args:
        warehouse: Warehouse with the dataset.
        run: The run; its weights are loaded here.
        dataset: Another prepared dataset, with features of the same backbones; ``None``: the
            run's own dataset, and for a pre-training the items that it holds out.
        on_stage: Called with the name of each stage.

    Raises:
        UserError: The recommender cannot encode one modality alone, the features differ, no item
            has both sides, or the checkpoint cannot be used.
    """
    if not isinstance(run.model, Aligned):
        raise UserError(
            f"{run.spec.model} does not encode one modality alone, so nothing can be retrieved"
            " across them; mmsrec does"
        )
    rows: list[dict[str, Any]] = []
    features, pools = _pools(warehouse, run, dataset)
    ridge = _fit_ridge(run, features, pools, on_stage)
    with run_lock(run.folder):
        on_stage("ranking by the untrained model")
        drawn = _rank_untrained(run, features, pools)
        load_weights(run.weights, run.model, run.spec.identity())
        for split, pool_K in pools.items():
            on_stage(f"ranking {len(pool_K):,} items of {split} by {run.spec.model}")
            by_ranker = {run.spec.model: retrieve(run.model, features, pool_K)}
            by_ranker |= {} if ridge is None else {"ridge": ridge.retrieve(features, pool_K)}
            by_ranker["untrained"] = drawn[split]
            if (sides := raw_sides(features, pool_K)) is not None:
                by_ranker["features"] = both_ways(*sides, same_vision(features, pool_K))
            for ranker, ranks in by_ranker.items():
                rows += retrieval_rows(split, ranker, ranks)
        if dataset is None:
            replace_metrics(
                run.folder / "metrics.parquet",
                rows,
                lambda row: row["phase"] == "eval" and row["targets"] in (TO_VISION, TO_TEXT),
            )
    return RetrievalReport(
        run=run.name,
        dataset=dataset or run.spec.dataset,
        model=run.spec.model,
        features=list(run.spec.features),
        protocol=_protocol(list(pools), ridge, rows, run.config.control),
        rows=rows,
        control=run.config.control,
    )


def _pools(
    warehouse: Warehouse, run: Run, dataset: str | None
) -> tuple[ItemFeatures, dict[str, Tensor]]:
    features = run.data.features
    if dataset is not None:
        device, control = run.data.device, run.spec.control
        source = load_data(warehouse, [dataset], run.spec.features, device, control=control)
        features = source.features
        pairs = zip(run.spec.data.features, source.identity.features, strict=True)
        for mine, other in pairs:
            for key in mine.keys() - {"content"}:
                if mine[key] != other[key]:
                    raise UserError(
                        f"the {mine['modality']} features of {dataset!r} differ from those of"
                        f" run {run.name!r}: {key} {other[key]!r}, not {mine[key]!r};"
                        " extract them with the same backbone"
                    )
    elif run.task.pools:
        return features, dict(run.task.pools)
    seen_N, written_N = Sides.of(features).present(features)
    pool_K = (seen_N & written_N).nonzero()[:, 0]
    if not len(pool_K):
        raise UserError(f"no item of {dataset or run.spec.dataset!r} has both text and vision")
    return features, {_ALL: pool_K}


def _rank_untrained(
    run: Run, features: ItemFeatures, pools: Mapping[str, Tensor]
) -> dict[str, dict[str, Ints]]:
    """Rank each pool by the model with its random weights and its fitted buffers."""
    # A run with saved weights is opened without fitted buffers.
    run.model.fit_buffers(run.task.features_to_fit(run.data.features), run.data.train)
    return {split: retrieve(run.model, features, pool_K) for split, pool_K in pools.items()}


def _fit_ridge(
    run: Run,
    features: ItemFeatures,
    pools: Mapping[str, Tensor],
    on_stage: Callable[[str], None],
) -> RidgeRetrieval | None:
    """Fit ridge regression on the training items of a pre-training that are in no pool.

    Returns:
        The regressions; ``None`` if the run aligns no items, or if too few are left.
    """
    pairs_P = run.task.training_pairs
    if pairs_P is None:
        return None
    for pool_K in pools.values():
        pairs_P = without_vision_of(pairs_P, run.data.features, pool_K, features)
    if len(pairs_P) < LEAST_PAIRS:
        return None
    on_stage(f"fitting ridge regression on {len(pairs_P):,} items")
    return RidgeRetrieval.fit(run.data.features, pairs_P)


def _protocol(
    splits: list[str], ridge: RidgeRetrieval | None, rows: list[dict[str, Any]], control: str
) -> list[str]:
    if splits == [_ALL]:
        pool = "pool: all items with text and vision"
    else:
        pool = (
            "validation and test: items with text and vision that training never saw, each ranked"
            " among its own; the best epoch was chosen on validation"
        )
    lines = [] if control == NONE else [control_line(control)]
    lines += [
        f"{pool}; each is a query in both directions",
        "exact ranks, ties against the model; 95% intervals: bootstrap over queries",
    ]
    if ridge is not None:
        strengths = ", ".join(f"{name} {value:.3g}" for name, value in ridge.strengths.items())
        lines.append(
            f"ridge: ridge regression between the features, fitted on {ridge.pairs:,} training"
            " items, of which none is ranked; penalty by generalised cross-validation on these"
            f" items: {strengths}"
        )
    lines.append("untrained: the same model with random weights")
    if any(row["ranker"] == "features" for row in rows):
        lines.append("features: cosine of the backbones' own vectors, which have one width")
    return lines
