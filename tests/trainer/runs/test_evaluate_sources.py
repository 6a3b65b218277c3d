"""A pre-training is evaluated on each of its datasets, whose held-out items it never saw."""

from typing import Any

import numpy as np
import pytest
import torch

from features.dataset import load_dataset
from features.warehouse import Warehouse
from tests.cli.test_pretrain import three_datasets
from tests.marks import heavy_after
from tests.trainer import worlds
from trainer.data.batches import Sequences, Shard
from trainer.runs.evaluate import Sample
from trainer.runs.evaluate_sources import evaluate_sources
from trainer.runs.run import Run, open_run
from trainer.runs.train import train_run

SMALL = ["dim=8", "heads=2", "hidden=8", "length=5", "epochs=1", "batch_size=64", "device=cpu"]
OWN = {
    "morec": [],
    "pmmrec": ["fusion_heads=2"],
    "unisrec": ["experts=2"],
    "vqrec": ["codes=2", "code_bits=2"],
}


def pretrained(warehouse: Warehouse, model: str) -> Run:
    three_datasets(warehouse)
    run = worlds.begin(
        warehouse, model, ["a", "b"], settings=[*SMALL, *OWN[model]], is_pretraining=True, name="p"
    )
    train_run(run)
    return open_run(warehouse, run.folder)


@pytest.mark.parametrize("model", heavy_after(2, OWN))
def test_each_source_is_ranked_in_its_own_catalogue(warehouse: Warehouse, model: str) -> None:
    run = pretrained(warehouse, model)
    before = sorted(path.name for path in run.folder.iterdir())
    metrics = (run.folder / "metrics.parquet").read_bytes()
    reports = evaluate_sources(warehouse, run, index="torch")
    assert [report.dataset for report in reports] == ["a", "b"]
    assert sorted(path.name for path in run.folder.iterdir()) == before
    assert (run.folder / "metrics.parquet").read_bytes() == metrics
    built: Any = run.model.eval()
    first = 0
    for report in reports:
        world = load_dataset(warehouse, report.dataset)
        n_items = world.info.items
        with torch.no_grad():
            all_ND = built.encode_items(run.data.features)
            own_ND = all_ND[first : first + n_items].double()
            for split in ("validation", "test"):
                users, hits = world.eval_split(split), []
                for begin, end in zip(users.starts, users.targets, strict=True):
                    history = torch.from_numpy(world.items[begin:end][-built.history :]).long()
                    query = built.encode_sequences(
                        all_ND,
                        Sequences(
                            items_BL=history[None] + first, lengths_B=torch.tensor([len(history)])
                        ),
                        run.data.features,
                    )[0]
                    scores = own_ND @ query.double()
                    better = scores > scores[int(world.items[end])] + 1e-5
                    hits.append(int(better.sum()) < 5)
                (value,) = [
                    row["value"]
                    for row in report.rows
                    if (row["split"], row["targets"], row["ranker"], row["seen"], row["metric"])
                    == (split, "all", model, "kept", "HR@5")
                ]
                assert abs(value - float(np.mean(hits))) < 0.05
        first += n_items
    sampled = evaluate_sources(warehouse, run, index="torch", sample=Sample(users=5))
    assert {row["split"] for report in sampled for row in report.rows} == {"test"}


def test_held_out_items_of_the_sources_are_never_in_pretraining_data(warehouse: Warehouse) -> None:
    """The last two items of every user occur nowhere else, and in no batch of the pre-training."""
    rows = [[0, 1, 2, 3, 6 + 2 * user, 7 + 2 * user] for user in range(4)]
    worlds.prepare(warehouse, rows, 14)
    worlds.extract(warehouse, worlds.features(14))
    run = worlds.begin(warehouse, "pmmrec", settings=[*SMALL, *OWN["pmmrec"]], is_pretraining=True)
    held_out = set(range(6, 14))
    for epoch in range(3):
        _, batches = run.task.epoch(run.config, epoch, skip=0, shard=Shard())
        for batch in batches:
            sequences = batch.sequences
            assert not held_out & set(sequences.items_BL[sequences.mask_BL].tolist())
    assert not run.data.train.counts_N[6:].any()
    assert not held_out & set((run.data.train.keys_J % 14).tolist())


@pytest.mark.parametrize("setting", ["whiten", "centre"])
def test_held_out_items_of_an_alignment_take_no_part_in_fitted_maps(
    warehouse: Warehouse, setting: str
) -> None:
    """The mean of a map is that of the training items with training interactions."""
    n_items = 60
    worlds.prepare(warehouse, [[*range(user, n_items), *range(user)] for user in range(4)], n_items)
    features = worlds.features(n_items, missing=False)
    worlds.extract(warehouse, features)
    run = worlds.begin(
        warehouse, "mmsrec", settings=[*SMALL, f"{setting}=true"], is_pretraining=True
    )
    takes_part_N = run.data.train.counts_N > 0
    for pool_K in run.task.pools.values():
        takes_part_N[pool_K] = False
    attribute = {"whiten": "whitening", "centre": "centring"}[setting]
    for opened in (run, open_run(warehouse, run.folder)):
        for name, vectors_ND in features.vectors.items():
            mean_W = getattr(opened.model, attribute)[name].mean_W
            torch.testing.assert_close(mean_W, vectors_ND[takes_part_N].mean(0))
