"""The contract of every recommender in the registry."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.trainer import worlds
from trainer.data.batches import ItemFeatures, Sequences, TrainSet
from trainer.losses.base import ItemVectors
from trainer.losses.registry import LOSSES
from trainer.losses.softmax import Softmax
from trainer.models import mmsrec
from trainer.models.base import Recommender
from trainer.models.registry import MODELS
from trainer.modules.transformer import initialise

N = 12
# Named options under which a recommender must keep the same contract.
OPTIONS: dict[str, dict[str, Any]] = {
    "sasrec, candidates": {"candidates": 8},
    "sasrec, cosine": {"score": "cosine", "temperature": 0.1},
    "sasrec, published": {"block": "pre-ln", "loss": "bce"},
    "sasrec, released": {"block": "released", "loss": "bce"},
    "gru4rec, TOP1": {"loss": "top1", "tied": False, "negatives": 3},
    "gru4rec, BPR-max": {"loss": "bpr-max", "negatives": 3, "negatives_power": 0.5},
    "mmsrec, ids": {"ids": True},
    "mmsrec, whiten, candidates": {"whiten": True, "candidates": 8},
    "mmsrec, ids, mask": {"ids": True, "missing": "mask"},
    "mmsrec, next": {"objective": "next"},
    "mmsrec, mixed negatives": {"loss": "in-batch", "negatives": 3, "debias_target": False},
    "mmsrec, next, ids, mask": {"objective": "next", "ids": True, "missing": "mask"},
}


def build(name: str, features: ItemFeatures, **settings: Any) -> Recommender:
    settings = OPTIONS.get(name, {}) | settings
    name = name.split(",")[0]
    return worlds.build(name, features, **settings).eval()


def sequences(rows: list[list[int]], padding: int = 0, width: int = 0) -> Sequences:
    width = max(width, *(len(row) for row in rows))
    items = [row + [padding] * (width - len(row)) for row in rows]
    return Sequences(
        items_BL=torch.tensor(items), lengths_B=torch.tensor([len(row) for row in rows])
    )


def encode(model: Recommender, rows: Sequences, features: ItemFeatures) -> Tensor:
    with torch.no_grad():
        return model.encode_sequences(model.encode_items(features), rows, features)


@contextmanager
def queries_of_the_loss() -> Iterator[list[Tensor]]:
    """Collect the queries (M, D) that a model passes to its softmax."""
    queries: list[Tensor] = []
    softmax = Softmax.forward

    def spy(self: Softmax, query_MD: Tensor, *args: Any) -> Tensor:
        queries.append(query_MD)
        return softmax(self, query_MD, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Softmax, "forward", spy)
        yield queries


@pytest.fixture(params=[*MODELS, *OPTIONS])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_shapes(name: str) -> None:
    features = worlds.features(N)
    model = build(name, features)
    items = model.encode_items(features)
    queries = encode(model, sequences([[1, 2], [3]]), features)
    assert items.shape == (N, queries.shape[1])
    assert len(queries) == 2
    assert torch.isfinite(items).all()
    assert torch.isfinite(queries).all()


def test_padding_changes_nothing(name: str) -> None:
    features = worlds.features(N)
    model = build(name, features)
    rows = [[1, 2, 3], [4]]
    alone = torch.cat([encode(model, sequences([row]), features) for row in rows])
    together = encode(model, sequences(rows), features)
    other_padding = encode(model, sequences(rows, padding=N - 1, width=model.history), features)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(other_padding, alone, rtol=1e-4, atol=1e-5)


def learns(name: str) -> bool:
    """Models without parameters may ignore histories."""
    return any(True for _ in build(name, worlds.features(N)).parameters())


def test_order_matters(name: str) -> None:
    features = worlds.features(N, missing=False)
    model = build(name, features)
    if not learns(name):
        pytest.skip("it has no parameters")
    initialise(model, std=0.5)  # the usual start is so small that order hardly shows in it
    # The order before the last item tells nothing to a model that reads one item.
    rows = [[1, 2, 3], [2, 1, 3]] if model.history > 1 else [[1, 2, 3], [1, 3, 2]]
    query = encode(model, sequences(rows), features)
    assert not torch.allclose(query[0], query[1], atol=1e-4)


def test_the_longest_history_and_one_item_are_read(name: str) -> None:
    features = worlds.features(N)
    model = build(name, features)
    longest = list(range(model.history))
    assert torch.isfinite(encode(model, sequences([longest, [0]]), features)).all()


def test_the_loss_is_deterministic_and_reaches_every_parameter(name: str) -> None:
    features = worlds.features(N)
    model = build(name, features).train()
    if not learns(name):
        pytest.skip("it has no parameters")
    rows = sequences([[0, 1, 2, 3, 4, 11], [5, 6], [7, 8, 9, 10]])
    values = []
    for _ in range(2):
        torch.manual_seed(1)
        generator = torch.Generator().manual_seed(2)
        batch = worlds.batch(rows, features, generator)
        values.append(model.loss(batch)["loss"])
    assert values[0].item() == values[1].item()
    values[0].backward()
    without = [key for key, value in model.named_parameters() if value.grad is None]
    assert without == []


def test_padding_never_reaches_the_loss(name: str) -> None:
    features = worlds.features(N)
    model = build(name, features)
    losses = []
    for padding in (0, 7):
        rows = sequences([[0, 1, 2, 3], [5, 6]], padding=padding)
        generator = torch.Generator().manual_seed(2)
        batch = worlds.batch(rows, features, generator)
        losses.append(model.loss(batch)["loss"])
    torch.testing.assert_close(losses[0], losses[1])


def test_a_causal_encoder_never_looks_ahead() -> None:
    features = worlds.features(N)
    model: Any = build("sasrec", features)
    items = ItemVectors(vectors_KD=model.encode_items(features))
    states = model.states(items, sequences([[1, 2, 3, 4]]))
    changed = model.states(items, sequences([[1, 2, 3, 9]]))
    # Positions count from the end, so both rows have the same length.
    torch.testing.assert_close(states[:, :3], changed[:, :3])
    assert not torch.allclose(states[:, 3], changed[:, 3], atol=1e-4)


def test_what_predicts_the_next_item_never_looks_ahead() -> None:
    features = worlds.features(N)
    model: Any = build("mmsrec, next", features)

    def predicted(row: list[int]) -> Tensor:
        with queries_of_the_loss() as queries:
            model.loss(worlds.batch(sequences([row]), features, torch.Generator()))
        return queries[0]

    queries, changed = predicted([1, 2, 3, 4, 5]), predicted([1, 2, 3, 9, 5])
    assert len(queries) == 4
    torch.testing.assert_close(queries[:3], changed[:3])
    assert not torch.allclose(queries[3], changed[3], atol=1e-4)
    torch.testing.assert_close(queries[3:], encode(model, sequences([[1, 2, 3, 4]]), features))


def test_the_hidden_item_does_not_leak_into_its_prediction() -> None:
    features = worlds.features(N, missing=False)
    model: Any = build("mmsrec", features, mask_ratio=0.0)  # only the last item is predicted
    with queries_of_the_loss() as queries:
        for last in (4, 9):
            rows = sequences([[1, 2, 3, last]])
            model.loss(worlds.batch(rows, features, torch.Generator().manual_seed(2)))
    torch.testing.assert_close(queries[0], queries[1])


def test_training_query_equals_evaluation_query() -> None:
    features = worlds.features(N)
    model: Any = build("mmsrec", features, mask_ratio=0.0)
    with queries_of_the_loss() as queries:
        rows = sequences([[1, 2, 3, 4]])
        model.loss(worlds.batch(rows, features, torch.Generator().manual_seed(2)))
    torch.testing.assert_close(queries[0], encode(model, sequences([[1, 2, 3]]), features))


@pytest.mark.parametrize("missing", ["drop", "mask"])
def test_a_missing_modality_is_not_read(missing: str) -> None:
    features = worlds.features(N)
    model = build("mmsrec", features, missing=missing)
    garbage = {
        key: torch.where(features.present[key][:, None], value, torch.full_like(value, 99.0))
        for key, value in features.vectors.items()
    }
    other = replace(features, vectors=garbage)
    torch.testing.assert_close(model.encode_items(features), model.encode_items(other))
    rows = sequences([list(range(5)), [N - 1, 4]])
    torch.testing.assert_close(encode(model, rows, features), encode(model, rows, other))


def test_the_two_readings_of_a_missing_modality_differ() -> None:
    features = worlds.features(N)
    drop, mask = (build("mmsrec", features, missing=m) for m in ("drop", "mask"))
    complete = features.present["image"] & features.present["text"]
    a, b = drop.encode_items(features), mask.encode_items(features)
    torch.testing.assert_close(a[complete], b[complete])
    assert not torch.allclose(a[~complete], b[~complete], atol=1e-4)


def test_the_catalogue_in_pieces_is_the_catalogue(monkeypatch: pytest.MonkeyPatch) -> None:
    features = worlds.features(N)
    model = build("mmsrec", features)
    with torch.no_grad():
        whole = model.encode_items(features)
        monkeypatch.setattr(mmsrec, "_ITEMS_PER_BLOCK", 5)
        pieces = model.encode_items(features)
    torch.testing.assert_close(pieces, whole, rtol=1e-6, atol=1e-6)
    assert len(whole) == N


@pytest.mark.parametrize("modality", ["image", "text"])
def test_one_modality_alone_is_enough(modality: str) -> None:
    both = worlds.features(N)
    alone = ItemFeatures(
        n_items=N,
        vectors={modality: both.vectors[modality]},
        present={modality: both.present[modality]},
    )
    model = build("mmsrec", alone)
    assert torch.isfinite(encode(model, sequences([[1, 2], [N - 1]]), alone)).all()


def test_the_same_gradients_every_time(name: str) -> None:
    """Threads that add up in an order of their own would make two equal trainings differ."""
    many = 200
    model = build(name, worlds.features(many)).train()
    if not learns(name):
        pytest.skip("it has no parameters")
    generator = torch.Generator().manual_seed(1)
    rows = Sequences(
        items_BL=torch.randint(many, (2048, 6), generator=generator),
        lengths_B=torch.full((2048,), 6),
    )

    def gradients() -> list[Tensor]:
        torch.manual_seed(2)
        model.zero_grad(set_to_none=True)
        draw = torch.Generator().manual_seed(3)
        batch = worlds.batch(rows, worlds.features(many), draw)
        model.loss(batch)["loss"].backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    first = gradients()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, gradients(), strict=True))


@pytest.mark.parametrize("objective", ["masked", "next"])
def test_without_item_dropout_the_loss_scores_the_items_of_an_evaluation(objective: str) -> None:
    """The items are those of evaluation mode with gradients; the histories still have dropout."""
    features = worlds.features(N)
    settings = {"dropout": 0.5, "objective": objective, "ids": True}
    rows = sequences([[0, 1, 2, 3], [4, 5, 6]])
    for item_dropout in (True, False):
        model: Any = build("mmsrec", features, item_dropout=item_dropout, **settings)
        expected = model.eval().encode_items(features)
        items = model.train().encode_items(features)
        assert torch.allclose(items, expected) is not item_dropout
        assert all(part.training for part in model.modules())
        # Both batches predict the same items, so that only dropout can make a difference.
        batches = [worlds.batch(rows, features, torch.Generator().manual_seed(0)) for _ in range(2)]
        losses = [float(model.loss(batch)["loss"].detach()) for batch in batches]
        assert losses[0] != losses[1]
    items.sum().backward()
    assert all(weight.grad is not None for weight in model.inputs.parameters())


def test_an_item_without_training_interactions_is_known_by_its_features_alone() -> None:
    features = worlds.features(N, missing=False)
    model: Any = build("mmsrec", features, ids=True)
    counts = torch.ones(N, dtype=torch.int64)
    counts[3] = 0
    model.fit_buffers(features, TrainSet(counts_N=counts, keys_J=torch.arange(N)))
    rows = sequences([[1, 3], [3]])
    before = model.encode_items(features), encode(model, rows, features)
    torch.nn.init.normal_(model.id.weight[3:4])
    after = model.encode_items(features), encode(model, rows, features)
    assert all(map(torch.equal, before, after))
    torch.nn.init.normal_(model.id.weight[1:2])
    assert not torch.equal(model.encode_items(features)[1], before[0][1])


@pytest.mark.parametrize("missing", ["drop", "mask"])
def test_ids_take_no_part_in_the_alignment_of_modalities(missing: str) -> None:
    features = worlds.features(N, missing=False)
    model: Any = build("mmsrec", features, ids=True, missing=missing)
    views = [(view, torch.arange(N)) for view in (["image"], ["image", "text"])]
    encoded = model.encode_views(torch.arange(N), views, features)
    sum(view.sum() for view in encoded).backward()
    without = {name for name, value in model.named_parameters() if value.grad is None}
    assert without == {*model.unaligned}
    assert "id.weight" in without


def losses_by_model() -> list[tuple[str, str]]:
    """Every model that has the setting ``loss``, with every loss."""
    chosen = []
    for model, entry in MODELS.items():
        if "loss" in {field.name for field in fields(entry.load().settings_class)}:
            chosen += [(model, loss) for loss in LOSSES]
    return chosen


@pytest.mark.parametrize(("model", "loss"), losses_by_model())
def test_every_loss_fits_every_model(model: str, loss: str) -> None:
    features = worlds.features(N)
    recommender = worlds.build(model, features, loss=loss).eval()
    values = []
    for padding in (0, 7):
        rows = sequences([[0, 1, 2, 3, 4, 11], [5, 6], [7, 8, 9, 10]], padding=padding)
        batch = worlds.batch(rows, features, torch.Generator().manual_seed(2))
        values.append(recommender.loss(batch)["loss"])
    torch.testing.assert_close(values[0], values[1])
    values[0].backward()
    without = [key for key, value in recommender.named_parameters() if value.grad is None]
    assert without == []
