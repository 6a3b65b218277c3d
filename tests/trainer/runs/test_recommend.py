"""Recommendations against scores in plain numpy, for users, histories and everybody."""

import gc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from features.errors import UserError
from features.warehouse import Warehouse
from retrieval.indexes import TopItems
from tests.trainer import worlds
from trainer.checkpoint import save_weights
from trainer.data.batches import Sequences
from trainer.data.feature_tables import choose_device
from trainer.runs import recommend
from trainer.runs.recommend import RECOMMENDATIONS, Predictor, write_all
from trainer.runs.run import Run, open_run

N = 12
SMALL = ["dim=8", "heads=2", "hidden=8", "length=5", "device=cpu"]


def begin(warehouse: Warehouse, model: str, name: str) -> Run:
    """A run whose best weights are those it was drawn with."""
    run = worlds.begin(warehouse, model, "world", settings=SMALL, name=name)
    save_weights(run.weights, run.model, run.spec.identity())
    return run


@pytest.fixture
def warehouse(warehouse: Warehouse) -> Warehouse:
    world = worlds.cycles(users=20, n_items=N)
    bounds = zip(world.offsets, world.offsets[1:], strict=False)
    worlds.prepare(warehouse, [world.items[a:b].tolist() for a, b in bounds], N)
    worlds.extract(warehouse, worlds.features(N))
    return warehouse


def brute(run: Run, history: list[int], k: int, keep_seen: bool) -> list[int]:
    """The best items of a history, of which the model reads the end."""
    with torch.no_grad():
        items_ND = run.model.eval().encode_items(run.data.features).detach()
        last = torch.tensor([history[-run.model.history :]])
        rows = Sequences(items_BL=last, lengths_B=torch.tensor([last.shape[1]]))
        query = run.model.encode_sequences(items_ND, rows, run.data.features)[0]
    scores = items_ND.double().numpy() @ query.double().numpy()
    order = np.lexsort((np.arange(N), -scores)).tolist()
    return [item for item in order if keep_seen or item not in history][:k]


@pytest.mark.parametrize("keep_seen", [False, True])
@pytest.mark.parametrize("model", ["sasrec", "mmsrec"])
def test_lists_are_those_of_plain_scores(warehouse: Warehouse, model: str, keep_seen: bool) -> None:
    run = begin(warehouse, model, "r")
    adviser = Predictor(warehouse, open_run(warehouse, run.folder), index="faiss")
    users = np.arange(20)
    _, together = adviser.for_users(users, 4, keep_seen=keep_seen)
    for user in users.tolist():
        history = adviser.history(user).tolist()
        wanted = brute(run, history, 4, keep_seen)
        _, alone = adviser.for_history(history, 4, keep_seen=keep_seen)
        assert alone[0][alone[0] >= 0].tolist() == wanted
        assert together[user][together[user] >= 0].tolist() == wanted
        if not keep_seen:
            assert not set(wanted) & set(history)


def test_similar_items_by_hand(warehouse: Warehouse) -> None:
    run = begin(warehouse, "sasrec", "r")
    adviser = Predictor(warehouse, run, index="torch")
    vectors = run.model.encode_items(run.data.features).detach().double().numpy()
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = unit @ unit[7]
    wanted = [item for item in np.argsort(-cosines).tolist() if item != 7][:3]
    scores, items = adviser.similar(7, 3)
    assert items[0].tolist() == wanted
    assert scores[0] == pytest.approx(cosines[wanted], abs=1e-6)


def test_everybody_in_one_file(
    warehouse: Warehouse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks change nothing; a list ends where no item is left; a failure leaves no file."""
    adviser = Predictor(warehouse, begin(warehouse, "sasrec", "r"), index="torch")
    monkeypatch.setattr(recommend, "_BLOCK", 7)
    told: list[tuple[int, int]] = []
    path = tmp_path / "all.parquet"
    rows = write_all(adviser, path, N, on_users=lambda done, total: told.append((done, total)))
    assert told == [(7, 20), (14, 20), (20, 20)]
    table = pq.read_table(path)
    assert table.schema == RECOMMENDATIONS
    assert len(table) == rows == sum(N - len(set(adviser.history(u).tolist())) for u in range(20))
    for user in range(20):
        mine = [row for row in table.to_pylist() if row["user"] == user]
        _, found = adviser.for_history(adviser.history(user), N)
        assert [row["item"] for row in mine] == found[0][found[0] >= 0].tolist()
        assert [row["rank"] for row in mine] == list(range(1, len(mine) + 1))
        assert {row["user_id"] for row in mine} <= {f"u{user}"}
        assert all(row["item_id"] == f"i{row['item']}" for row in mine)

    def fail(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_all(adviser, tmp_path / "torn.parquet", 3, on_users=fail)
    assert list(tmp_path.glob("*torn*")) == []


def test_lists_of_everybody_are_written_in_bounded_blocks(
    warehouse: Warehouse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block has a bounded number of rows for any length, and no block outlives the next."""
    predictor = Predictor(warehouse, begin(warehouse, "sasrec", "r"), index="faiss")
    monkeypatch.setattr(recommend, "_ROWS_PER_BLOCK", 3 * N)
    searched: list[int] = []
    allocated: list[int] = []
    for_users = Predictor.for_users

    def watched(self: Predictor, users: np.ndarray, k: int, **options: bool) -> TopItems:
        gc.collect()
        searched.append(len(users))
        allocated.append(pa.total_allocated_bytes())
        return for_users(self, users, k, **options)

    monkeypatch.setattr(Predictor, "for_users", watched)
    for k, block in ((N, 3), (10**9, 3), (4, 9)):
        searched.clear()
        write_all(predictor, tmp_path / "all.parquet", k)
        assert searched == [block] * (20 // block) + [20 % block]
    write_all(predictor, tmp_path / "one.jsonl", N)
    allocated.clear()
    write_all(predictor, tmp_path / "all.parquet", N)
    assert max(allocated[1:]) - min(allocated[1:]) < 4096


@pytest.mark.parametrize("index", ["faiss", "faiss:ivf,nprobe=1"])
def test_a_table_of_recommendations_names_its_index(
    warehouse: Warehouse, tmp_path: Path, index: str
) -> None:
    predictor = Predictor(warehouse, begin(warehouse, "sasrec", "r"), index=index)
    write_all(predictor, tmp_path / "all.parquet", 3)
    metadata = pq.read_schema(tmp_path / "all.parquet").metadata
    assert metadata[b"index"].decode() == index
    assert (b"recall" in metadata) == (index != "faiss")


def test_an_index_is_trained_again_for_other_weights(warehouse: Warehouse) -> None:
    run = begin(warehouse, "sasrec", "r")

    def search_line() -> str:
        opened = open_run(warehouse, run.folder)
        predictor = Predictor(warehouse, opened, index="faiss:hnsw")
        predictor.for_users(np.arange(3), 3)
        return predictor.search_facts(3).line

    assert "trained now" in search_line()
    assert "read from" in search_line()
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.mul_(1.5)
    save_weights(run.weights, run.model, run.spec.identity())
    assert "trained now" in search_line()


def test_what_cannot_be_asked(warehouse: Warehouse) -> None:
    adviser = Predictor(warehouse, begin(warehouse, "sasrec", "r"), index="torch")
    with pytest.raises(UserError, match=r"no user 'x' \(20 users, such as u0, u1, u2\); for a new"):
        adviser.user("x")
    with pytest.raises(UserError, match=r"no item 'x' \(12 items, such as i0, i1, i2\)"):
        adviser.item("x")
    for unencodable in ("\udcff", "i0\ud800"):
        with pytest.raises(UserError, match="no item"):
            adviser.item(unencodable)
    with pytest.raises(UserError, match="--k 0 is not the length"):
        adviser.for_users(np.arange(2), 0)
    bare = worlds.begin(warehouse, "sasrec", "world", settings=SMALL, name="bare")
    with pytest.raises(UserError, match=r"model\.safetensors .*mmrec train --resume"):
        Predictor(warehouse, bare, index="torch")
    small = [*SMALL, "fusion_heads=2"]
    before = worlds.begin(
        warehouse, "pmmrec", "world", settings=small, name="p", is_pretraining=True
    )
    with pytest.raises(UserError, match="is a pre-training and recommends nothing"):
        Predictor(warehouse, before, index="torch")


def test_a_run_is_opened_on_another_device_than_it_was_trained_on(
    warehouse: Warehouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = begin(warehouse, "mmsrec", "r").folder
    asked: list[str] = []

    def choose(name: str) -> torch.device:
        asked.append(name)
        return choose_device("cpu")

    monkeypatch.setattr("trainer.runs.run.choose_device", choose)
    elsewhere = open_run(warehouse, folder, device="cuda:1")
    assert asked == ["cuda:1"]
    assert elsewhere.config.device == "cpu"  # what it was trained with is part of its identity
    Predictor(warehouse, elsewhere, index="torch")
    with pytest.raises(UserError, match="device='cuda:99' cannot be used here"):
        choose_device("cuda:99")
