"""The evaluation of a pre-training on the datasets that it was trained on (PMMRec, Table III).

The held-out interactions of a dataset are never in the training data of a pre-training. Each
dataset is ranked in its own catalogue, with the weights of the pre-training.

Legend: N items of a dataset, B users of a batch, L sequence length, D width.
"""

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from features.memory import memory_errors
from features.warehouse import Warehouse
from trainer.checkpoint import load_weights
from trainer.data.batches import Batch, ItemFeatures, Sequences, TrainingData
from trainer.data.multi_dataset import LoadedData, load_data
from trainer.data.windows import WindowSampling
from trainer.models.base import Catalogue, Recommender
from trainer.runs.evaluate import EvalReport, Sample, rank_run, report_of
from trainer.runs.folder import run_lock
from trainer.runs.run import Run


def evaluate_sources(
    warehouse: Warehouse,
    run: Run,
    *,
    index: str,
    sample: Sample | None = None,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> list[EvalReport]:
    """Evaluate the best weights of a pre-training on each of its datasets. Nothing is stored.

    Args:
        warehouse: Warehouse with the datasets.
        run: A pre-training on histories; its weights are loaded here.
        index: Kind and parameters, see :func:`retrieval.registry.make_index`.
        sample: The test users of each dataset to rank for; all users of both splits by default.
        on_stage: Called with the name of each stage.

    Returns:
        A report for each dataset, in the order of ``run.spec.datasets``.

    Raises:
        UserError: The pre-training learns no histories, or its checkpoint cannot be used.
    """
    if run.task.pools:
        run.check_recommends()
    batch = f"evaluation of run {run.name} (eval_batch={run.config.eval_batch})"
    reports = []
    first_item, first_user = 0, 0
    with run_lock(run.folder), memory_errors(batch, "free memory"):
        load_weights(run.weights, run.model, run.spec.identity())
        for name in run.spec.datasets:
            on_stage(f"loading {name}")
            source = _load_source(run, name)
            info = source.dataset.info
            view = _SourceModel(run, info.items, first_item, first_user)
            on_source = replace(
                run,
                model=view,
                data=TrainingData(
                    source.dataset,
                    source.features,
                    run.data.device,
                    hold_out_cold=run.config.hold_out_cold,
                ),
                spec=replace(run.spec, datasets=(name,)),
            )
            report = report_of(on_source, rank_run(on_source, index, sample, on_stage), index)
            report.protocol.append(
                "results of a pre-training on its own datasets are not stored: mmrec compare and"
                " report do not use them"
            )
            reports.append(report)
            first_item, first_user = first_item + info.items, first_user + info.users
    return reports


def _load_source(run: Run, name: str) -> LoadedData:
    """Load one of the datasets of a pre-training."""
    return load_data(
        run.warehouse,
        [name],
        run.spec.features,
        run.data.device,
        with_times=run.model.reads_times,
        control=run.spec.control,
    )


class _SourceModel(Recommender):
    """A pre-trained model over the items of one of its datasets.

    Args:
        run: The pre-training, with its weights loaded.
        n_items: Number of items N of the dataset.
        first_item: Number of the dataset's first item among the items of all datasets.
        first_user: Number of its first user.
    """

    def __init__(self, run: Run, n_items: int, first_item: int, first_user: int) -> None:
        super().__init__(run.model.settings, Catalogue(n_items=n_items, n_users=1, widths={}))
        self.model = run.model
        self._features = run.data.features
        self._items = slice(first_item, first_item + n_items)
        self._first_user = first_user
        self._all_items: Tensor | None = None

    @property
    def window_sampling(self) -> WindowSampling:
        """Windows of the pre-training."""
        return self.model.window_sampling

    @property
    def history(self) -> int:
        """Largest number of items of a history that the model reads."""
        return self.model.history

    def encode_items(self, features: ItemFeatures) -> Tensor:
        """Return the vectors of the items of the dataset: (N, D)."""
        if self._all_items is None:
            self._all_items = self.model.encode_items(self._features)
        return self._all_items[self._items]

    def encode_sequences(
        self, item_vectors_ND: Tensor, sequences: Sequences, features: ItemFeatures
    ) -> Tensor:
        """Encode histories of items of the dataset: (B, D)."""
        assert self._all_items is not None
        users_B = sequences.users_B
        among_all = replace(
            sequences,
            items_BL=sequences.items_BL + self._items.start,
            users_B=None if users_B is None else users_B + self._first_user,
        )
        return self.model.encode_sequences(self._all_items, among_all, self._features)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Raise: the model is only evaluated."""
        raise NotImplementedError("a pre-trained model is not trained on one of its datasets")
