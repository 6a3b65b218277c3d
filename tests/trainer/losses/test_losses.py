"""Whole losses against slow float64 references, one sequence and one position at a time.

The references are written from the papers' descriptions and read nothing of a model but its
parameters and hyper-parameters.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.trainer import worlds
from tests.trainer.models.test_recommenders import build, queries_of_the_loss, sequences
from trainer.data.batches import ItemFeatures
from trainer.modules.transformer import initialise

N = 12
ROWS = [[0, 1, 2, 3, 11, 7], [5, 6], [7, 8, 9, 10]]


def norm(part: Any, x: Tensor) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:], part.weight, part.bias, part.eps)


def block(part: Any, x_TD: Tensor, causal: bool) -> Tensor:
    T, D = x_TD.shape
    E = D // part.config.heads
    q, k, v = (x_TD @ part.qkv.weight.T + part.qkv.bias).split(D, dim=1)
    mixed = torch.zeros_like(x_TD)
    for head in range(part.config.heads):
        s = slice(head * E, (head + 1) * E)
        for t in range(T):
            last = t + 1 if causal else T
            weights = torch.softmax(k[:last, s] @ q[t, s] / E**0.5, dim=0)
            mixed[t, s] = weights @ v[:last, s]
    x_TD = norm(part.norm_attention, x_TD + mixed @ part.out.weight.T + part.out.bias)
    inner = functional.gelu(x_TD @ part.up.weight.T + part.up.bias)
    return norm(part.norm_feed, x_TD + inner @ part.down.weight.T + part.down.bias)


def transformer(part: Any, x_TD: Tensor, causal: bool) -> Tensor:
    for layer in part.blocks:
        x_TD = block(layer, x_TD, causal)
    return norm(part.norm, x_TD)


def mean_cross_entropy(pairs: list[tuple[Tensor, int]], item_ND: Tensor, scale: float) -> Tensor:
    losses = []
    for query_D, target in pairs:
        scores = torch.stack([scale * (query_D @ item_D) for item_D in item_ND])
        losses.append(-torch.log(torch.exp(scores[target]) / torch.exp(scores).sum()))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("score", ["dot", "cosine"])
def test_sasrec_is_the_next_items_cross_entropy_at_every_position(score: str) -> None:
    features = worlds.features(N)
    model: Any = build("sasrec", features, score=score, temperature=0.5)
    initialise(model, std=0.3)
    generator = torch.Generator().manual_seed(1)
    batch = worlds.batch(sequences(ROWS), features, generator)
    mine = model.loss(batch)["loss"]
    mine.backward()
    gradient = model.item_encoder.weight.grad.clone()

    model.zero_grad()
    model.double()
    encoder = model.sequence_encoder
    pairs = []
    for row in ROWS:
        inputs, targets = row[:-1], row[1:]
        x_TD = torch.stack(
            [
                model.item_encoder.weight[item] + encoder.position.weight[len(inputs) - 1 - slot]
                for slot, item in enumerate(inputs)
            ]
        )
        hidden = transformer(encoder.transformer, norm(encoder.norm, x_TD), causal=True)
        pairs += list(zip(hidden, targets, strict=True))
    item_ND = model.item_encoder.weight
    if score == "cosine":
        item_ND = item_ND / item_ND.norm(dim=1, keepdim=True)
        pairs = [(query / query.norm(), target) for query, target in pairs]
    expected = mean_cross_entropy(pairs, item_ND, 1 / 0.5)
    expected.backward()
    torch.testing.assert_close(mine.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        gradient.double(), model.item_encoder.weight.grad, rtol=1e-3, atol=1e-6
    )


def mmsrec_tokens(
    model: Any, features: ItemFeatures, shown: list[int | None], missing: str
) -> tuple[Tensor, list[tuple[int, str]]]:
    """Tokens of one sequence (None: hidden) and the slot and modality of each."""
    tokens, owners = [], []
    for slot, item in enumerate(shown):
        names = list(features.vectors)
        known = item is not None and any(bool(features.present[name][item]) for name in names)
        for c, name in enumerate(names):
            if item is not None and known and bool(features.present[name][item]):
                linear, after = model.inputs[name]
                x = features.vectors[name][item] @ linear.weight.T + linear.bias
                token = norm(after, x)
            elif not known or missing == "mask":
                stranger = item is not None and missing == "drop"  # nothing is known of it
                token = model.instead.weight[int(stranger)]
            else:
                continue
            token = token + model.position.weight[len(shown) - 1 - slot] + model.modality.weight[c]
            if item is not None and model.settings.ids:
                token = token + model.settings.dim**0.5 * model.id.weight[item]
            tokens.append(norm(model.norm, token))
            owners.append((slot, name))
    return torch.stack(tokens), owners


def mmsrec_vector(
    model: Any, features: ItemFeatures, shown: list[int | None], slot: int, missing: str
) -> Tensor:
    """The vector of a slot that attends to the whole sequence."""
    tokens, owners = mmsrec_tokens(model, features, shown, missing)
    hidden = transformer(model.transformer, tokens, causal=False)
    heads = []
    for row, (where, name) in zip(hidden, owners, strict=True):
        if where == slot:
            linear, after = model.outputs[name]
            heads.append(norm(after, row @ linear.weight.T + linear.bias))
    largest = torch.stack(heads).max(0).values
    vector: Tensor = largest / largest.norm()
    return vector


def mmsrec_items(model: Any, features: ItemFeatures, missing: str) -> Tensor:
    """Each item as a sequence of its own, with ``ids`` plus what is learned of it alone."""
    vectors = []
    for item in range(N):
        vector = mmsrec_vector(model, features, [item], 0, missing)
        if model.settings.ids:
            vector = vector + model.id.weight[item]
        vectors.append(vector / vector.norm())
    return torch.stack(vectors)


@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize(
    ("missing", "corruption", "below", "others"),
    [("drop", "80-10-10", 0.8, N), ("mask", "80-10-10", 0.8, N), ("drop", "81-9-10", 0.81, N - 1)],
)
def test_mmsrec_is_the_cloze_task_over_the_catalogue(
    missing: str, corruption: str, below: float, others: int, ids: bool
) -> None:
    features = worlds.features(N)
    options = {"missing": missing, "corruption": corruption, "ids": ids}
    model: Any = build("mmsrec", features, mask_ratio=0.7, temperature=0.5, **options)
    initialise(model, std=0.3)
    batch = worlds.batch(sequences(ROWS), features, torch.Generator().manual_seed(1))
    mine = model.loss(batch)["loss"]

    draw = torch.Generator().manual_seed(1)  # the same three draws, in the same order
    shape = (len(ROWS), max(map(len, ROWS)))
    chosen, fate = torch.rand(shape, generator=draw), torch.rand(shape, generator=draw)
    other = torch.randint(others, shape, generator=draw)
    model.double()
    features = replace(
        features, vectors={name: value.double() for name, value in features.vectors.items()}
    )
    item_ND = mmsrec_items(model, features, missing)
    pairs, fates = [], set()
    for b, row in enumerate(ROWS):
        last = len(row) - 1
        shown: list[int | None] = list(row)
        predicted = [last]
        for slot in range(last):
            if chosen[b, slot] < 0.7:
                predicted.append(slot)
                where = fate[b, slot]
                kind = "mask" if where < below else "swap" if where < 0.9 else "keep"
                fates.add(kind)
                if kind == "mask":
                    shown[slot] = None
                elif kind == "swap":
                    shown[slot] = int(other[b, slot])
        shown[last] = None
        pairs += [
            (mmsrec_vector(model, features, shown, slot, missing), row[slot]) for slot in predicted
        ]
    assert fates == {"mask", "swap", "keep"}  # this seed shows all three
    expected = mean_cross_entropy(pairs, item_ND, 1 / 0.5)
    torch.testing.assert_close(mine.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("missing", ["drop", "mask"])
def test_mmsrec_predicts_the_next_item_from_each_prefix(missing: str, ids: bool) -> None:
    """In a stack of one block, the state of a causal encoder is that of the prefix alone."""
    features = worlds.features(N)
    options = {"objective": "next", "missing": missing, "layers": 1, "ids": ids}
    model: Any = build("mmsrec", features, temperature=0.5, **options)
    initialise(model, std=0.3)
    mine = model.loss(worlds.batch(sequences(ROWS), features, torch.Generator()))["loss"]
    model.double()
    features = replace(
        features, vectors={name: value.double() for name, value in features.vectors.items()}
    )
    item_ND = mmsrec_items(model, features, missing)
    pairs = []
    position = model.position.weight.data.clone()
    for row in ROWS:
        for slot in range(len(row) - 1):
            # Positions count from the end of the window, not of the prefix.
            model.position.weight.data = position.roll(-(len(row) - 2 - slot), 0)
            prefix: list[int | None] = list(row[: slot + 1])
            pairs.append((mmsrec_vector(model, features, prefix, slot, missing), row[slot + 1]))
    expected = mean_cross_entropy(pairs, item_ND, 1 / 0.5)
    torch.testing.assert_close(mine.double(), expected, rtol=1e-5, atol=1e-6)


def test_the_share_of_predicted_positions_is_what_was_asked_for() -> None:
    features = worlds.features(N, missing=False)
    model: Any = build("mmsrec", features, mask_ratio=0.2)
    rows = sequences([[1, 2, 3, 4, 5, 6]] * 400)
    with queries_of_the_loss() as queries:
        model.loss(worlds.batch(rows, features, torch.Generator().manual_seed(0)))
    assert len(queries[0]) == pytest.approx(400 * (1 + 0.2 * 5), rel=0.1)


@pytest.mark.parametrize("name", worlds.models_with("length"))
def test_a_length_counts_the_items_of_a_history(name: str) -> None:
    """A window of the training holds the predicted item as well."""
    model = build(name, worlds.features(N), length=6)
    assert model.history == 6
    assert model.window_sampling.length == 7
