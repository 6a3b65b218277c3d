"""A run on a later preparation: weights meet items by their ids, and nothing is trained."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor

from features.atomic_files import write_table
from features.errors import UserError
from features.schema import ITEMS_SCHEMA
from features.warehouse import Warehouse
from tests.trainer import worlds
from trainer.checkpoint import save_weights
from trainer.data.batches import ItemFeatures
from trainer.models.registry import MODELS
from trainer.runs.choice import Choice
from trainer.runs.later import open_current
from trainer.runs.recommend import Predictor
from trainer.runs.run import open_run

N = 12
IDS = [f"i{item}" for item in range(N)]
LATER = ["new1", *reversed([name for name in IDS if name != "i3"]), "new2"]
"""The later catalogue: in another order, without i3, with two new items."""
HISTORY = ["i4", "i5", "i7"]
SKIPPED = {"s3rec"}  # needs columns of attributes


def vectors_of(ids: Sequence[str]) -> ItemFeatures:
    """Return features that depend on the id of an item alone."""
    rows: dict[str, list[Tensor]] = {"image": [], "text": []}
    for name in ids:
        seed = sum(map(ord, name))
        for number, (modality, width) in enumerate((("image", 6), ("text", 5))):
            generator = torch.Generator().manual_seed(100 * seed + number)
            rows[modality].append(torch.randn(width, generator=generator))
    present = dict.fromkeys(rows, torch.ones(len(ids), dtype=torch.bool))
    vectors = {name: torch.stack(parts) for name, parts in rows.items()}
    return ItemFeatures(n_items=len(ids), vectors=vectors, present=present)


def prepare(warehouse: Warehouse, ids: Sequence[str], histories: Sequence[Sequence[str]]) -> None:
    """Prepare and extract the world anew."""
    shutil.rmtree(warehouse.dataset_dir("world"), ignore_errors=True)
    number = {name: item for item, name in enumerate(ids)}
    kept = [[number[name] for name in row if name in number] for row in histories]
    worlds.prepare(warehouse, kept, len(ids), ids)
    worlds.extract(warehouse, vectors_of(ids), fingerprint=" ".join(ids))


def histories() -> list[list[str]]:
    world = worlds.cycles(users=30, n_items=N)
    bounds = zip(world.offsets, world.offsets[1:], strict=False)
    return [[IDS[item] for item in world.items[a:b]] for a, b in bounds]


def begin(warehouse: Warehouse, model: str) -> Path:
    """Create a run whose best weights are those that it was drawn with."""
    prepare(warehouse, IDS, histories())
    settings = [f"{key}={value}" for key, value in worlds.small_pairs(model).items()]
    run = worlds.begin(warehouse, model, settings=[*settings, "device=cpu"], name=f"{model}-1")
    save_weights(run.weights, run.model, run.spec.identity())
    return run.folder


def scores(predictor: Predictor, history: Sequence[str]) -> dict[str, float]:
    """Return the score of each listed item, by its id."""
    items = [predictor.item(name) for name in history]
    values, listed = predictor.for_history(items, 100, keep_seen=True)
    names = predictor.item_ids.take(listed[0][listed[0] >= 0]).to_pylist()
    return dict(zip(names, values[0].tolist(), strict=False))


@pytest.mark.parametrize("model", [name for name in worlds.trained_models() if name not in SKIPPED])
def test_items_keep_their_scores_under_new_numbers(warehouse: Warehouse, model: str) -> None:
    folder = begin(warehouse, model)
    before = scores(Predictor(warehouse, open_run(warehouse, folder), index="torch"), HISTORY)
    weights = (folder / "model.safetensors").read_bytes()
    prepare(warehouse, LATER, histories())
    run = open_current(warehouse, folder)
    after = scores(Predictor(warehouse, run, index="torch"), HISTORY)
    known = set(IDS) - {"i3"}
    assert {name: after[name] for name in known} == pytest.approx(
        {name: before[name] for name in known}, abs=1e-5
    )
    assert set(after) - known == ({"new1", "new2"} if run.model.encodes_new_items else set())
    assert run.catalogue_lines()[0] == "catalogue: 13 items, 2 of them new since training"
    assert (folder / "model.safetensors").read_bytes() == weights


def describe(warehouse: Warehouse, ids: Sequence[str], genres: Sequence[str]) -> None:
    """Give each item a genre."""
    rows = [
        {"item": item, "item_id": name, "attributes": json.dumps({"genre": genre})}
        for item, (name, genre) in enumerate(zip(ids, genres, strict=True))
    ]
    path = warehouse.dataset_dir("world") / "items" / "part-00000.parquet"
    write_table(path, pa.Table.from_pylist(rows, ITEMS_SCHEMA))


@pytest.mark.parametrize(("model", "settings"), [("fdsa", ["fields=both"]), ("s3rec", [])])
def test_attributes_keep_their_vectors(
    warehouse: Warehouse, model: str, settings: list[str]
) -> None:
    """In the later preparation the genres have other numbers, and unknown ones are ignored."""
    genre = {name: f"g{number % 4}" for number, name in enumerate(IDS)}
    prepare(warehouse, IDS, histories())
    describe(warehouse, IDS, [genre[name] for name in IDS])
    small = [f"{key}={value}" for key, value in worlds.small_pairs(model).items()]
    settings = [*small, *settings, "device=cpu", "attributes=genre"]
    run = worlds.begin(warehouse, model, settings=settings, name="a")
    save_weights(run.weights, run.model, run.spec.identity())
    before = scores(Predictor(warehouse, open_run(warehouse, run.folder), index="torch"), HISTORY)
    prepare(warehouse, LATER, histories())
    describe(warehouse, LATER, [f"unknown|a0|{genre.get(name, 'g9')}" for name in LATER])
    later = open_current(warehouse, run.folder)
    after = scores(Predictor(warehouse, later, index="torch"), HISTORY)
    del before["i3"]
    assert after == pytest.approx(before, abs=1e-5)
    (run.folder / "attributes.parquet").unlink()
    with pytest.raises(UserError, match="train again"):
        open_current(warehouse, run.folder)


@pytest.mark.parametrize("model", ["sasrec", "mmsrec"])
def test_an_item_that_left_counts_in_a_history(warehouse: Warehouse, model: str) -> None:
    folder = begin(warehouse, model)
    history = ["i2", "i3"]
    predictor = Predictor(warehouse, open_run(warehouse, folder), index="faiss")
    before = scores(predictor, history)
    prepare(warehouse, LATER, histories())
    predictor = Predictor(warehouse, open_current(warehouse, folder), index="faiss")
    after = scores(predictor, history)
    assert "i3" not in after
    assert after != scores(predictor, ["i2"])
    if model == "sasrec":
        assert after == pytest.approx({k: v for k, v in before.items() if k != "i3"}, abs=1e-5)


def test_a_copy_of_a_known_item_gets_its_codes(warehouse: Warehouse) -> None:
    """The sum of the characters decides the features, so "5i" has those of "i5"."""
    folder = begin(warehouse, "vqrec")
    prepare(warehouse, ["5i", *IDS], histories())
    after = scores(Predictor(warehouse, open_current(warehouse, folder), index="torch"), HISTORY)
    assert after["5i"] == pytest.approx(after["i5"], abs=1e-6)


@pytest.mark.parametrize("model", ["popularity", "transitions", "itemknn", "ease"])
def test_references_count_the_later_interactions(warehouse: Warehouse, model: str) -> None:
    folder = begin(warehouse, model)
    longer = [[*row, "new1", "i0", "i1"] for row in histories()]
    prepare(warehouse, LATER, longer)
    run = open_current(warehouse, folder)
    assert "new1" in scores(Predictor(warehouse, run, index="torch"), ["i4"])
    assert run.data.train.counts_N[run.joint.ids.to_pylist().index("new1")] == 30  # type: ignore[union-attr]


def test_new_users_and_users_without_known_items(warehouse: Warehouse) -> None:
    folder = begin(warehouse, "sasrec")
    prepare(warehouse, LATER, [*histories(), ["new1", "new2", "new1"], ["i1", "new1", "i2"]])
    predictor = Predictor(warehouse, open_current(warehouse, folder), index="torch")
    assert predictor.history(30).tolist() == []
    assert predictor.item_ids.take(predictor.history(31)).to_pylist() == ["i1", "i2"]


def test_what_cannot_be_served_is_refused(warehouse: Warehouse) -> None:
    folder = begin(warehouse, "mmsrec")
    prepare(warehouse, LATER, histories())
    worlds.extract(warehouse, vectors_of(LATER), "other", fingerprint=" ".join(LATER))
    shutil.rmtree(warehouse.dataset_dir("world") / "features" / "toy")
    with pytest.raises(UserError, match="toy"):
        open_current(warehouse, folder)
    (folder / "items.parquet").unlink()
    prepare(warehouse, LATER, histories())
    with pytest.raises(UserError, match="train again"):
        open_current(warehouse, folder)


@pytest.mark.parametrize("model", ["mmsrec", "carca", "transitions"])
def test_a_choice_of_items_against_brute_force(
    warehouse: Warehouse, tmp_path: Path, model: str
) -> None:
    folder = begin(warehouse, model)
    run = open_run(warehouse, folder)
    everything = scores(Predictor(warehouse, run, index="torch"), HISTORY)
    allowed = ["i1", "i2", "i6", "i9", "i11"]
    (tmp_path / "only.txt").write_text("\n".join([*allowed, "unknown", ""]))
    (tmp_path / "exclude.txt").write_text("i9\n")
    choice = Choice(only=tmp_path / "only.txt", exclude=tmp_path / "exclude.txt")
    some = scores(Predictor(warehouse, run, index="faiss", choice=choice), HISTORY)
    expected = {name: everything[name] for name in allowed if name != "i9"}
    assert some == pytest.approx(expected, abs=1e-6)


def test_a_share_of_new_items_against_brute_force(warehouse: Warehouse) -> None:
    folder = begin(warehouse, "mmsrec")
    prepare(warehouse, LATER, histories())
    run = open_current(warehouse, folder)
    plain = Predictor(warehouse, run, index="torch")
    every = scores(plain, HISTORY)
    counts = dict(zip(plain.item_ids.to_pylist(), plain.dataset.train_counts, strict=True))
    choice = Choice(new_share=0.4, new_below=1)
    predictor = Predictor(warehouse, run, index="torch", choice=choice)
    items = np.array([predictor.item(name) for name in HISTORY])
    values, listed = predictor.for_history(items, 5, keep_seen=True)
    names = predictor.item_ids.take(listed[0]).to_pylist()
    order = sorted(every, key=lambda name: -every[name])
    rare = [name for name in order if counts[name] < 1][:2]
    top = order[:5]
    wanted = [name for name in rare if name not in top]
    common = [name for name in top if counts[name] >= 1]
    expected = set(top) - set(common[len(common) - len(wanted) :]) | set(wanted)
    assert set(names) == expected
    assert sum(counts[name] < 1 for name in names) >= 2
    assert values[0].tolist() == sorted(values[0].tolist(), reverse=True)


@pytest.mark.parametrize("text", ["", "nothing\n"])
def test_a_file_that_names_no_item_is_refused(
    warehouse: Warehouse, tmp_path: Path, text: str
) -> None:
    folder = begin(warehouse, "popularity")
    (tmp_path / "only.txt").write_text(text)
    run = open_run(warehouse, folder)
    with pytest.raises(UserError, match=r"only\.txt"):
        Predictor(warehouse, run, index="torch", choice=Choice(only=tmp_path / "only.txt"))


def test_every_model_says_whether_it_encodes_new_items() -> None:
    ranked = {
        name
        for name in MODELS
        if name not in SKIPPED and worlds.build(name, worlds.features(4)).encodes_new_items
    }
    assert ranked == {"mmsrec", "mmsr", "pmmrec", "unisrec", "vqrec", "morec", "fmrlrec"}


def test_items_that_are_not_extracted_are_counted_with_one_command(warehouse: Warehouse) -> None:
    folder = begin(warehouse, "mmsrec")
    number = {name: item for item, name in enumerate(LATER)}
    kept = [[number[name] for name in row if name in number] for row in histories()]
    parts = sorted((warehouse.dataset_dir("world") / "features").rglob("*"))
    copies = {path: path.read_bytes() for path in parts if path.is_file()}
    prepare(warehouse, IDS, histories())
    worlds.prepare(warehouse, kept, len(LATER), LATER)
    for path, content in copies.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"2 of 13 items .*--image \S+ --text \S+ ") as caught:
        open_current(warehouse, folder)
    assert "\n" not in str(caught.value)
