"""MMSR in all its parts; what every recommender promises is tested in test_recommenders."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from features.errors import UserError
from tests.trainer import worlds
from tests.trainer.models import test_planted as planted
from trainer.data.batches import Batch, ItemFeatures, Sequences
from trainer.data.token_features import TokenFeatures
from trainer.losses import bce
from trainer.losses.base import ItemVectors
from trainer.losses.registry import LOSSES
from trainer.models import causal
from trainer.models.base import Catalogue
from trainer.models.mmsr import IDSR, MMSR, IDSRConfig, MMSRConfig
from trainer.modules.registry import FUSIONS, SEQUENCE_ENCODERS
from trainer.modules.transformer import initialise

N = 12
SMALL: dict[str, Any] = {"dim": 8, "heads": 2, "hidden": 16, "length": 6, "fusion_heads": 2}
ROWS = [[0, 1, 2, 3, 4, 11], [5, 6], [7, 8, 9, 10]]
# Every pair of fusion and encoder, and of encoder and loss, not all of all.
COMBINATIONS = [
    (fusion, encoder, list(LOSSES)[(f + e) % len(LOSSES)])
    for f, fusion in enumerate(FUSIONS)
    for e, encoder in enumerate(SEQUENCE_ENCODERS)
]


def build(features: ItemFeatures, **settings: Any) -> MMSR:
    torch.manual_seed(0)
    catalogue = Catalogue(n_items=features.n_items, n_users=1, widths=features.widths)
    model = MMSR(MMSRConfig(**{**SMALL, **settings}), catalogue).eval()
    initialise(model, std=0.3)
    return model


def batch(features: ItemFeatures, padding: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(2)
    return worlds.batch(worlds.sequences(ROWS, padding), features, generator)


def states(model: IDSR, items: Tensor, sequences: Sequences) -> Tensor:
    states = model.states(ItemVectors(vectors_KD=items), sequences)
    return model.settings.normalise(states)


@pytest.mark.parametrize(
    ("over", "fusion", "encoder", "loss"),
    [
        *(("vectors", *combination) for combination in COMBINATIONS),
        *(("tokens", *combination) for combination in COMBINATIONS[::4]),
    ],
)
def test_all_parts_together(over: str, fusion: str, encoder: str, loss: str) -> None:
    features = worlds.token_features(N) if over == "tokens" else worlds.features(N)
    model = build(features, fusion=fusion, sequence_encoder=encoder, loss=loss)
    with torch.no_grad():
        items = model.encode_items(features)
        together = model.encode_sequences(items, worlds.sequences(ROWS, padding=3), features)
        for row, query in zip(ROWS, together, strict=True):
            alone = model.encode_sequences(items, worlds.sequences([row]), features)
            torch.testing.assert_close(query[None], alone, rtol=1e-4, atol=1e-5)
        longer = states(model, items, worlds.sequences([[1, 2, 3, 4]]))
        changed = states(model, items, worlds.sequences([[1, 2, 3, 9]]))
    torch.testing.assert_close(longer[:, :3], changed[:, :3])
    value = model.loss(batch(features))["loss"]
    assert torch.equal(value, model.loss(batch(features, padding=7))["loss"])
    value.backward()
    without = [key for key, parameter in model.named_parameters() if parameter.grad is None]
    assert without == []


@pytest.mark.parametrize(
    ("score", "debias", "divisor"),
    [("scaled", True, 0.5 * 8**0.5), ("dot", False, 0.5), ("cosine", True, 0.5)],
)
def test_the_in_batch_loss_by_its_formula(score: str, debias: bool, divisor: float) -> None:
    features = worlds.features(N)
    model = build(features, loss="in-batch", score=score, debias=debias, temperature=0.5)
    example = batch(features)
    items = model.encode_items(features)
    shown = [item for row in ROWS for item in row]
    popularity = example.train.counts_N.float() / example.train.counts_N.sum()
    losses = []
    for row in ROWS:
        for end in range(1, len(row)):
            # Positions count from the window's end, so the window is encoded as a whole.
            query = states(model, items, worlds.sequences([row[:-1]]))[0, end - 1]
            scores = items @ query / divisor
            if debias:
                scores = scores - popularity.clamp_min(1e-9).log()
            negatives = [scores[item] for item in shown if item not in row]
            column = torch.stack([scores[row[end]], *negatives])
            losses.append(-column.log_softmax(0)[0])
    expected = torch.stack(losses).mean()
    torch.testing.assert_close(model.loss(example)["loss"], expected, rtol=1e-4, atol=1e-5)


def test_the_binary_loss_by_its_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    features = worlds.features(N)
    model = build(features, loss="bce", score="dot", temperature=1.0)
    drawn = torch.tensor([6, 7, 8, 9, 10, 0, 1, 2, 3])
    monkeypatch.setattr(bce, "sample_unseen", lambda *_: (drawn, torch.ones(9).bool()))
    items = model.encode_items(features)
    terms: list[Tensor] = []
    for row in ROWS:
        for state, target in zip(
            states(model, items, worlds.sequences([row[:-1]]))[0], row[1:], strict=True
        ):
            negative = items[drawn[len(terms)]]
            terms.append(
                -functional.logsigmoid(state @ items[target])
                - functional.logsigmoid(-state @ negative)
            )
    expected = torch.stack(terms).mean()
    torch.testing.assert_close(model.loss(batch(features))["loss"], expected)


def test_the_softmax_loss_by_its_formula() -> None:
    features = worlds.token_features(N)
    model = build(features, loss="softmax", score="cosine", temperature=2.0)
    items = model.encode_items(features)
    terms: list[Tensor] = []
    for row in ROWS:
        logits = states(model, items, worlds.sequences([row[:-1]]))[0] @ items.T / 2.0
        terms.extend(functional.cross_entropy(logits, torch.tensor(row[1:]), reduction="none"))
    torch.testing.assert_close(model.loss(batch(features))["loss"], torch.stack(terms).mean())


def test_every_item_of_a_batch_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    features = worlds.features(N)
    for loss in ("bce", "in-batch"):
        model = build(features, loss=loss)
        seen: list[Tensor] = []
        encode = model.encode_some
        monkeypatch.setattr(
            model,
            "encode_some",
            lambda items, given, e=encode, s=seen: (s.append(items), e(items, given))[1],
        )
        twice = [[1, 2, 1, 2, 3], [2, 3, 1]]
        generator = torch.Generator().manual_seed(2)
        model.loss(worlds.batch(worlds.sequences(twice, padding=9), features, generator))
        (items,) = seen
        assert len(items.unique()) == len(items)
        if loss == "in-batch":
            assert items.tolist() == [1, 2, 3]


def test_an_item_without_a_modality_is_not_read_there() -> None:
    features = worlds.features(N)
    garbage = {
        key: torch.where(features.present[key][:, None], value, torch.full_like(value, 99.0))
        for key, value in features.vectors.items()
    }
    for fusion in FUSIONS:
        model = build(features, fusion=fusion)
        other = model.encode_items(replace(features, vectors=garbage))
        torch.testing.assert_close(model.encode_items(features), other)


def test_a_vector_is_a_modality_of_one_token() -> None:
    pooled = worlds.features(N)
    present = pooled.present["text"].numpy()
    tokens = TokenFeatures(
        values=pooled.vectors["text"][pooled.present["text"]].numpy(),
        offsets=np.concatenate([[0], np.cumsum(present)]),
        device=torch.device("cpu"),
    )
    as_tokens = replace(pooled, vectors={"image": pooled.vectors["image"]}, tokens={"text": tokens})
    for fusion in ("sum", "merge-attention"):
        model = build(pooled, fusion=fusion)
        torch.testing.assert_close(model.encode_items(pooled), model.encode_items(as_tokens))


def test_the_catalogue_in_pieces_is_the_catalogue(monkeypatch: pytest.MonkeyPatch) -> None:
    features = worlds.token_features(N)
    model = build(features)
    with torch.no_grad():
        whole = model.encode_items(features)
        monkeypatch.setattr(causal, "_TOKENS_PER_CHUNK", 9)
        torch.testing.assert_close(model.encode_items(features), whole)
    assert len(whole) == N


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fusion": "add"}, "'add'.*known: sum,"),
        ({"sequence_encoder": "lstm"}, "'lstm'.*nextitnet"),
        ({"loss": "ce"}, "'ce'.*in-batch"),
        ({"score": "sine"}, "'sine'.*dot, scaled, cosine"),
        ({"pool": "max"}, "pool 'max'"),
        ({"fusion_heads": 3}, "fusion_heads=3"),
        ({"temperature": 0.0}, "temperature=0.0"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        MMSRConfig(**settings)


def test_without_features_there_is_nothing_to_fuse() -> None:
    with pytest.raises(UserError, match=r"mmsr .*features"):
        MMSR(MMSRConfig(**SMALL), Catalogue(n_items=N, n_users=1, widths={}))


@pytest.mark.parametrize("encoder", list(SEQUENCE_ENCODERS))
def test_ids_in_place_of_modalities(encoder: str) -> None:
    features = ItemFeatures(n_items=N, vectors={}, present={})
    small = {key: value for key, value in SMALL.items() if key != "fusion_heads"}
    model = IDSR(
        IDSRConfig(**small, sequence_encoder=encoder), Catalogue(n_items=N, n_users=1, widths={})
    )
    assert model.encode_items(features).shape == (N, 8)
    model.loss(batch(features))["loss"].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fusion", "encoder", "loss"),
    [
        ("sum", "sasrec", "bce"),
        ("merge-attention", "gru", "in-batch"),
        ("film", "nextitnet", "softmax"),
    ],
)
def test_taste_in_the_texts_is_learned_from_the_texts_alone(
    fusion: str, encoder: str, loss: str
) -> None:
    """The targets are items that nobody has clicked; pictures are noise."""
    dataset, texts = planted.world()
    noise = torch.randn(planted.N, 6, generator=torch.Generator().manual_seed(3))
    present = texts.present["text"]
    both = ItemFeatures(
        n_items=planted.N,
        vectors={"image": noise, **texts.vectors},
        present={"image": present, "text": present},
    )
    images = replace(both, vectors={"image": noise}, present={"image": present})
    small = {**SMALL, "dim": 16, "hidden": 32, "length": 8}
    means = []
    for features in (both, images):
        torch.manual_seed(0)
        form: dict[str, Any] = {"fusion": fusion, "sequence_encoder": encoder, "loss": loss}
        config = MMSRConfig(**small, **form, score="scaled", temperature=1.0)
        model = MMSR(config, Catalogue(n_items=planted.N, n_users=1, widths=features.widths))
        data = worlds.training_data(dataset, features)
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        for epoch in range(12):
            _, batches = data.epoch(model.window_sampling, batch_size=16, seed=1, epoch=epoch)
            for training_batch in batches:
                optimizer.zero_grad()
                model.loss(training_batch)["loss"].backward()
                optimizer.step()
        means.append(worlds.ranks(model, dataset, features).filtered.mean())
    by_text, by_image = means
    assert by_text < 10  # chance is 21: half of the 42 items that are left
    assert by_image > 14  # six unseen items: luck is not far from chance
