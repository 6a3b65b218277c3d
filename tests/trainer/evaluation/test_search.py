"""Models with a sparse correction, or whose score is no inner product, against dense scores."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from features.errors import UserError
from features.warehouse import Warehouse
from retrieval.list_metrics import count_recommended
from retrieval.seen_items import SeenItems
from retrieval.sparse_scores import SparseScores
from tests.trainer import worlds
from trainer.checkpoint import load_weights, save_weights
from trainer.data.batches import Sequences
from trainer.evaluation.encode import histories_of, targets_of
from trainer.evaluation.ranking import build_reference, rank_split
from trainer.evaluation.search import CatalogueSearch
from trainer.models.registry import MODELS, Model
from trainer.models.sasrec import SASRec
from trainer.runs.evaluate import evaluate
from trainer.runs.recommend import Predictor
from trainer.runs.run import open_run

N = 12
WORLD = worlds.cycles(n_items=N)
SETTINGS = ("dim=8", "heads=2", "hidden=8", "length=5", "epochs=1", "device=cpu")


def bias(histories: SeenItems) -> npt.NDArray[np.float64]:
    """A dense correction: -3 on items of the history, +0.5 on the item after the last one."""
    values = np.zeros((len(histories), N))
    for user in range(len(histories)):
        items = histories.items[histories.offsets[user] : histories.offsets[user + 1]]
        values[user, items] = -3.0
        values[user, (items[-1] + 1) % N] += 0.5
    return values


class Biased(SASRec):
    """SASRec with a correction of its inner products."""

    def correction(self, histories: SeenItems) -> SparseScores:
        return SparseScores.from_dense(bias(histories))


class Blocks(SASRec):
    """SASRec that returns its scores in blocks, with the square of each inner product."""

    has_vectors = False

    def score(self, item_vectors_ND: Tensor, sequences: Sequences, first: int, last: int) -> Tensor:
        query_BD = self.encode_sequences(item_vectors_ND, sequences, self.features)
        return (query_BD @ item_vectors_ND[first:last].T) ** 2

    features: Any = None


def dense(model: SASRec, histories: SeenItems) -> npt.NDArray[np.float64]:
    """The scores of all items for each history."""
    data = worlds.training_data(WORLD, worlds.features(N))
    with torch.no_grad():
        items_ND = model.eval().encode_items(data.features)
        rows = []
        for user in range(len(histories)):
            items = histories.items[histories.offsets[user] : histories.offsets[user + 1]]
            last = torch.from_numpy(items[-model.history :].copy())[None]
            sequences = Sequences(items_BL=last, lengths_B=torch.tensor([last.shape[1]]))
            rows.append(model.encode_sequences(items_ND, sequences, data.features)[0])
        scores = (torch.stack(rows).double() @ items_ND.double().T).numpy()
    if isinstance(model, Blocks):
        return np.asarray(scores**2)
    return np.asarray(scores + bias(histories))


@pytest.fixture(autouse=True)
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "biased", Model(f"{__name__}:Biased", "a correction"))
    monkeypatch.setitem(MODELS, "blocks", Model(f"{__name__}:Blocks", "no inner product"))


@pytest.mark.parametrize("name", ["biased", "blocks"])
@pytest.mark.parametrize("index", ["torch", "faiss"])
def test_ranks_equal_those_of_dense_scores(name: str, index: str) -> None:
    model = worlds.build(name, worlds.features(N))
    assert isinstance(model, SASRec)
    data = worlds.training_data(WORLD, worlds.features(N))
    split = rank_split(model, data, "test", 16, index=index)
    histories = histories_of(WORLD, WORLD.eval_split("test"))
    scores = dense(model, histories)
    for user, target in enumerate(split.targets_E):
        seen = histories.items[histories.offsets[user] : histories.offsets[user + 1]]
        above = np.flatnonzero(scores[user] >= scores[user, target] - 1e-9)
        others = set(above.tolist()) - {int(target)}
        assert split.ranks.kept[user] == 1 + len(others)
        assert split.ranks.filtered[user] == 1 + len(others - set(seen.tolist()))


@pytest.mark.parametrize("name", ["biased", "blocks"])
def test_recommendations_and_predictions_are_those_of_dense_scores(
    warehouse: Warehouse, tmp_path: Path, name: str
) -> None:
    bounds = zip(WORLD.offsets, WORLD.offsets[1:], strict=False)
    worlds.prepare(warehouse, [WORLD.items[a:b].tolist() for a, b in bounds], N)
    run = worlds.begin(warehouse, name, settings=SETTINGS, name="r")
    save_weights(run.weights, run.model, run.spec.identity())
    opened = open_run(warehouse, run.folder)
    evaluate(warehouse, opened, index="faiss")
    load_weights(opened.weights, opened.model, opened.spec.identity())
    assert isinstance(opened.model, SASRec)
    scores = dense(opened.model, histories_of(WORLD, WORLD.eval_split("test")))
    table = pq.read_table(run.folder / "predictions.parquet").to_pylist()
    ranks = [row["rank_kept"] for row in table if row["split"] == "test"]
    targets = [row["item"] for row in table if row["split"] == "test"]
    assert ranks == [
        int((row >= row[target] - 1e-9).sum()) for row, target in zip(scores, targets, strict=True)
    ]

    predictor = Predictor(warehouse, opened, index="faiss")
    users = np.arange(10)
    _, together = predictor.for_users(users, 4, keep_seen=True)
    for user in users.tolist():
        history = predictor.history(user)
        whole = SeenItems(items=history, offsets=np.array([0, len(history)]))
        best = np.argsort(-dense(opened.model, whole)[0], kind="stable")[:4]
        _, alone = predictor.for_history(history, 4, keep_seen=True)
        assert alone[0].tolist() == best.tolist()
        assert together[user].tolist() == best.tolist()
        _, fresh = predictor.for_history(history, 4)
        assert not set(fresh[0][fresh[0] >= 0].tolist()) & set(history.tolist())


@pytest.mark.parametrize("name", ["popularity", "transitions", "biased", "blocks"])
def test_counted_lists_are_those_of_recommendations(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Blocks of 5 users; each history is encoded once."""
    monkeypatch.setattr("trainer.evaluation.search._USERS_PER_BLOCK", 5)
    data = worlds.training_data(WORLD, worlds.features(N))
    if name in ("popularity", "transitions"):
        model = build_reference(name, data)
    else:
        model = worlds.build(name, worlds.features(N))
    users = WORLD.eval_split("test")
    targets_E = targets_of(WORLD, users)
    search = CatalogueSearch(model, data, index="torch", batch_size=7)
    encoded = 0
    encode = model.encode_sequences

    def counting(*args: Any) -> Tensor:
        nonlocal encoded
        encoded += len(args[1].lengths_B)
        return encode(*args)

    monkeypatch.setattr(model, "encode_sequences", counting)
    ranks, counts = search.rank_and_count(users, targets_E)
    assert name == "blocks" or encoded == (0 if model.is_sparse else len(users.users))
    alone = search.rank(users, targets_E)
    assert (ranks.kept == alone.kept).all()
    assert (ranks.filtered == alone.filtered).all()
    for seen, counts_N in counts.items():
        lists = search.best_for_users(users, 10, keep_seen=seen == "kept")[1]
        assert (counts_N == count_recommended(lists, N)).all()


@pytest.mark.parametrize("index", ["faiss:ivf,nlist=13", "faiss:ivfpq,M=3,nbits=4"])
def test_an_index_that_does_not_fit_is_refused_before_the_catalogue_is_encoded(
    index: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = worlds.training_data(WORLD, worlds.features(N))
    model = worlds.build("sasrec", data.features)
    monkeypatch.setattr(SASRec, "encode_items", lambda *args: pytest.fail("encoded"))
    with pytest.raises(UserError, match=f"{N} items"):
        CatalogueSearch(model, data, index=index, batch_size=4)


def test_a_width_that_an_index_cannot_have_is_refused_before_histories_are_encoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = worlds.training_data(WORLD, worlds.features(N))
    model = worlds.build("sasrec", data.features)
    monkeypatch.setattr(SASRec, "encode_sequences", lambda *args: pytest.fail("encoded"))
    with pytest.raises(UserError, match="M=3 does not divide"):
        CatalogueSearch(model, data, index="faiss:ivfpq,M=3,nbits=2", batch_size=4)
