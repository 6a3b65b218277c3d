"""Starting from another run: what comes over, to the bit, and what is said of the rest."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from features.documents import read_json, write_json
from features.errors import UserError
from features.warehouse import Warehouse
from tests.trainer import worlds
from trainer.checkpoint import load_weights, read_tensors
from trainer.data.batches import ItemFeatures
from trainer.runs.run import Run, open_run
from trainer.runs.train import train_run
from trainer.runs.transfer import copy_weights

N = 12
SMALL = {
    "dim": "8", "heads": "2", "hidden": "8", "length": "5", "epochs": "1", "batch_size": "64",
    "device": "cpu",
}  # fmt: skip


@pytest.fixture
def warehouse(warehouse: Warehouse) -> Warehouse:
    prepare(warehouse, N)
    worlds.extract(warehouse, worlds.features(N))
    return warehouse


def prepare(warehouse: Warehouse, n_items: int) -> None:
    world = worlds.cycles(n_items=n_items, users=20)
    bounds = zip(world.offsets, world.offsets[1:], strict=False)
    worlds.prepare(warehouse, [world.items[a:b].tolist() for a, b in bounds], n_items)


def begin(
    warehouse: Warehouse,
    model: str,
    name: str,
    *settings: str,
    init: str | None = None,
    transfer: str = "full",
    features: list[str] | None = None,
) -> Run:
    given = [setting.split("=") for setting in settings]
    return worlds.begin(
        warehouse,
        model,
        "world",
        features=features,
        settings=[f"{key}={value}" for key, value in {**SMALL, **dict(given)}.items()],
        name=name,
        init=init,
        transfer=transfer,
    )


def weights(folder: Path) -> dict[str, Tensor]:
    return read_tensors(folder / "model.safetensors", "")[0]


def equal(run: Run, held: dict[str, Tensor]) -> set[str]:
    mine = run.model.state_dict()
    return {n for n in mine if n in held and torch.equal(mine[n], held[n])}


@pytest.mark.parametrize(
    "words",
    [
        *("sasrec", "mmsrec", "mmsrec ids=true whiten=true candidates=3"),
        *("mmsrec objective=next ids=true", "sasrec average=0.9"),
    ],
)
def test_everything_comes_over(warehouse: Warehouse, words: str) -> None:
    model, *settings = words.split()
    source = begin(warehouse, model, "source", "lr=0.1", *settings)
    train_run(source)
    held = weights(source.folder)
    run = begin(warehouse, model, "r", "seed=7", *settings, init="source")
    assert equal(run, held) == set(held)  # of the same interactions, known_N is too
    assert run.copied_weights is not None
    assert run.copied_weights.share == 1
    assert run.copied_weights.fresh == run.copied_weights.unused == []
    assert run.copied_weights.lines()[0].startswith("from run source (full): ")


def test_what_training_has_seen_is_never_taken_from_another_run(warehouse: Warehouse) -> None:
    """The other run's interactions may be fewer, or reach into what is held out here."""
    train_run(begin(warehouse, "mmsrec", "source", "ids=true"))
    run = begin(warehouse, "mmsrec", "r", "ids=true")
    known_N = run.model.get_buffer("known_N")
    known_N.copy_(torch.arange(N) % 2 == 0)
    taken = copy_weights(warehouse.runs_dir / "source", "mmsrec", run.model, run.spec.identity())
    assert known_N.tolist() == [i % 2 == 0 for i in range(N)]
    assert taken.share == 1
    assert taken.fresh == taken.unused == []


def test_the_origin_is_part_of_what_a_checkpoint_is_for(warehouse: Warehouse) -> None:
    train_run(begin(warehouse, "sasrec", "source"))
    run = begin(warehouse, "sasrec", "r", init="source")
    train_run(run)
    again = open_run(warehouse, run.folder)
    assert again.spec.identity() == run.spec.identity()
    assert again.spec.identity()["init"]["run"] == "source"
    assert train_run(again, resume=True).finished
    path = run.folder / "config.toml"
    digest = again.spec.identity()["init"]["weights"]
    text = path.read_text().split("\n", 1)[1]  # without the checksum
    path.write_text(text.replace(digest, "0" * 16))
    with pytest.raises(UserError, match=r"init\.weights="):
        train_run(open_run(warehouse, run.folder), resume=True)


def test_a_part_of_sasrec(warehouse: Warehouse) -> None:
    source = begin(warehouse, "sasrec", "source", "lr=0.1")
    train_run(source)
    held = weights(source.folder)
    users = begin(warehouse, "sasrec", "users", "seed=7", init="source", transfer="users")
    assert {name for name in held if name not in equal(users, held)} == {"item_encoder.weight"}
    assert users.copied_weights is not None
    assert users.copied_weights.loaded == ["sequence_encoder"]
    assert users.copied_weights.fresh == [("item_encoder", "not part of the transfer 'users'")]
    with pytest.raises(UserError, match=r"unknown transfer 'text'; known: full, items, users"):
        begin(warehouse, "sasrec", "r", init="source", transfer="text")


def test_ids_stay_with_their_catalogue_and_positions_keep_their_meaning(
    warehouse: Warehouse,
) -> None:
    source = begin(warehouse, "sasrec", "source", "lr=0.1")
    train_run(source)
    held = weights(source.folder)
    prepare(warehouse, N + 1)
    path = warehouse.dataset_dir("world") / "dataset.json"
    write_json(path, {**read_json(path, "write it again"), "fingerprint": "g"})
    run = begin(warehouse, "sasrec", "r", "length=7", "seed=7", init="source")
    assert run.copied_weights is not None
    reasons = dict(run.copied_weights.fresh)
    assert reasons["item_encoder"] == "a row for each item, and the catalogue is another one"
    assert reasons["sequence_encoder.position"] == "2 of 7 rows: 5 there"
    name = "sequence_encoder.position.weight"
    assert torch.equal(run.model.state_dict()[name][:5], held[name])


def test_one_modality_of_two(warehouse: Warehouse) -> None:
    """Figure 3 of MMSRec: pre-trained on both, trained without one of them."""
    source = begin(warehouse, "mmsrec", "source", "lr=0.1")
    train_run(source)
    held = weights(source.folder)
    run = begin(warehouse, "mmsrec", "r", "seed=7", init="source", features=["text"])
    assert run.copied_weights is not None
    assert run.copied_weights.share == 1
    assert torch.equal(run.model.state_dict()["modality.weight"][0], held["modality.weight"][1])
    assert {name for name, _ in run.copied_weights.unused} == {"inputs.image", "outputs.image"}


def test_other_vectors_under_the_same_name_are_refused(warehouse: Warehouse) -> None:
    source = begin(warehouse, "mmsrec", "source")
    train_run(source)
    worlds.extract(warehouse, worlds.features(N, seed=1), backbone="other")
    wanted = ["image=other", "text=toy"]
    run = begin(warehouse, "mmsrec", "r", init="source", features=wanted)
    assert run.copied_weights is not None
    why = "image: backbone toy there, other here"
    assert run.copied_weights.fresh == [("inputs.image", why), ("outputs.image", why)]


def test_a_clip_is_known_by_the_head_of_pictures(warehouse: Warehouse) -> None:
    source = begin(warehouse, "mmsrec", "source", "lr=0.1")
    train_run(source)
    features = worlds.features(N)
    clips = {"video": features.vectors["image"]}
    there = {"video": features.present["image"]}
    worlds.extract(warehouse, ItemFeatures(n_items=N, vectors=clips, present=there))
    run = begin(warehouse, "mmsrec", "r", "seed=7", init="source", features=["video", "text"])
    assert run.copied_weights is not None
    assert run.copied_weights.share == 1
    held = weights(source.folder)
    mine = run.model.state_dict()
    assert torch.equal(mine["inputs.video.0.weight"], held["inputs.image.0.weight"])
    assert torch.equal(mine["modality.weight"], held["modality.weight"].flip(0))


def test_what_cannot_be_a_beginning(warehouse: Warehouse) -> None:
    source = begin(warehouse, "sasrec", "source")
    with pytest.raises(UserError, match=r"train it first: mmrec train --resume --run source"):
        begin(warehouse, "sasrec", "r", init="source")
    train_run(source)
    with pytest.raises(UserError, match=r"is of 'sasrec', its weights have no place in 'mmsrec'"):
        begin(warehouse, "mmsrec", "r", init="source")
    with pytest.raises(UserError, match=r"nothing of run 'source' fits: .*12 x 8 there, 12 x 4"):
        begin(warehouse, "sasrec", "r", "dim=4", "hidden=4", init="source")
    with pytest.raises(UserError, match=r"unknown run 'nope'"):
        begin(warehouse, "sasrec", "r", init="nope")
    assert warehouse.runs() == ["source"]


def test_a_run_of_another_version_is_refused(warehouse: Warehouse) -> None:
    """A run folder of version 0.1 has no format."""
    train_run(begin(warehouse, "sasrec", "old"))
    path = warehouse.runs_dir / "old" / "config.toml"
    text = path.read_text().split("\n", 1)[1]  # without the checksum
    path.write_text(text.replace("format = 2\n", ""))
    with pytest.raises(UserError, match=r"'old' .* train again"):
        open_run(warehouse, path.parent)
    with pytest.raises(UserError, match=r"'old' .* train again"):
        begin(warehouse, "sasrec", "new", init="old")
    assert not (warehouse.runs_dir / "new").exists()


@pytest.mark.parametrize(
    ("before", "after", "remedy"),
    [
        ("whiten=true", "whiten=false", "set whiten=true"),
        ("whiten=true", "centre=true", "set whiten=true"),
        ("whiten=false", "whiten=true", "set whiten=false"),
        ("centre=true", "whiten=true", "set centre=true"),
        ("whiten=false", "centre=true", "set centre=false"),
    ],
)
def test_first_layers_of_other_features_are_refused(
    warehouse: Warehouse, before: str, after: str, remedy: str
) -> None:
    """The layers after the features are still copied by the transfer of users."""
    train_run(begin(warehouse, "mmsrec", "before", before))
    with pytest.raises(UserError, match=remedy):
        begin(warehouse, "mmsrec", "refused", after, init="before")
    assert not (warehouse.runs_dir / "refused").exists()
    assert begin(warehouse, "mmsrec", "users", after, init="before", transfer="users")
    assert begin(warehouse, "mmsrec", "same", before, init="before")


@pytest.mark.parametrize("model", ["mmsr", "pmmrec"])
def test_a_model_without_centring_takes_the_function_of_a_centred_run(
    warehouse: Warehouse, model: str
) -> None:
    source = begin(warehouse, model, "centred", "centre=true", "fusion_heads=2")
    train_run(source)
    run = begin(warehouse, model, "plain", "centre=false", "fusion_heads=2", init="centred")
    load_weights(source.weights, source.model, source.spec.identity())
    vectors = []
    for opened in (source, run):
        with torch.no_grad():
            vectors.append(opened.model.eval().encode_items(opened.data.features))
    torch.testing.assert_close(vectors[1], vectors[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", ["mmsr", "pmmrec"])
def test_a_centred_model_refuses_the_layers_of_raw_features(
    warehouse: Warehouse, model: str
) -> None:
    train_run(begin(warehouse, model, "source", "centre=false", "fusion_heads=2"))
    for transfer in ("full", "text"):
        with pytest.raises(UserError, match="set centre=false"):
            begin(warehouse, model, "refused", "fusion_heads=2", init="source", transfer=transfer)
    assert begin(warehouse, model, "users", "fusion_heads=2", init="source", transfer="users")
