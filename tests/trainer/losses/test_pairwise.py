"""The pairwise losses against float64 loops that are written as the papers' formulas."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.trainer import worlds
from tests.trainer.losses.test_in_batch import EXACT, close, directions, leaves, small_blocks
from tests.trainer.models.test_recommenders import sequences
from trainer.data.batches import Batch
from trainer.losses.base import ItemVectors, LossSettings, Targets
from trainer.losses.in_batch import ExcludedLabels
from trainer.losses.pairwise import bpr, bpr_max, pairwise, top1, top1_max
from trainer.losses.registry import LOSSES

FUNCTIONS = {"bpr": bpr, "top1": top1, "bpr-max": bpr_max, "top1-max": top1_max}


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def reference(name: str, target: Tensor, negatives: list[Tensor], penalty: float = 1.0) -> Tensor:
    """Return the loss of one row: Hidasi et al. 2016, section 3.1.3; 2018, Eq. 4, 6, 7."""
    if not negatives:
        return 0 * target
    n = len(negatives)
    total = torch.stack([torch.exp(s) for s in negatives]).sum()
    weights = [torch.exp(s) / total for s in negatives]
    if name == "bpr":
        return -torch.stack([torch.log(sigmoid(target - s)) for s in negatives]).sum() / n
    if name == "top1":
        return torch.stack([sigmoid(s - target) + sigmoid(s**2) for s in negatives]).sum() / n
    pairs = list(zip(weights, negatives, strict=True))
    if name == "bpr-max":
        wins = torch.stack([w * sigmoid(target - s) for w, s in pairs]).sum()
        return -torch.log(wins) + penalty * torch.stack([w * s**2 for w, s in pairs]).sum()
    return torch.stack([w * (sigmoid(s - target) + sigmoid(s**2)) for w, s in pairs]).sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_operator_equals_the_formula(
    name: str, seed: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_blocks(monkeypatch, 2)
    generator = torch.Generator().manual_seed(seed)
    query, key = directions(7, 3, generator).to(dtype), directions(5, 3, generator).to(dtype)
    positive = torch.randint(5, (7,), generator=generator)
    counts = torch.tensor([1, 3, 0, 2, 1])
    labels = torch.tensor([4, 0, 1, 4, 2])
    own = torch.tensor([[4, -1], [0, 2], [-1, -1]])
    owner = torch.tensor([0, 0, 1, 1, 2, 2, 2])
    query_leaf, key_leaf = mine = leaves(query, key)
    loss = pairwise(
        query_leaf,
        key_leaf,
        positive,
        FUNCTIONS[name],
        scale=3.0,
        count_C=counts,
        label_C=labels,
        excluded=ExcludedLabels(own_UJ=own, owner_M=owner),
    )
    loss.backward()
    theirs = leaves(query.double(), key.double())
    rows = []
    for m in range(7):
        scores = 3.0 * theirs[1] @ theirs[0][m]
        negatives = [
            scores[c]
            for c in range(5)
            if c != int(positive[m]) and int(labels[c]) not in own[owner[m]].tolist()
            for _ in range(int(counts[c]))
        ]
        rows.append(reference(name, scores[positive[m]], negatives))
    expected = torch.stack(rows).mean()
    expected.backward()
    close(loss, expected, dtype)
    for a, b in zip(mine, theirs, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        close(a.grad, b.grad, dtype, size=3.0)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_rows_without_negatives_and_no_rows_cost_nothing(name: str) -> None:
    query, key = leaves(torch.randn(2, 3), torch.randn(2, 3))
    loss = pairwise(query, key, torch.tensor([0, 1]), FUNCTIONS[name], label_C=torch.ones(2).long(),
                    excluded=ExcludedLabels(own_UJ=torch.ones(2, 1).long()))  # fmt: skip
    loss.backward()
    assert loss.item() == 0
    assert query.grad is not None
    assert not query.grad.any()
    assert pairwise(query[:0], key, torch.zeros(0, dtype=torch.int64), FUNCTIONS[name]).item() == 0


@pytest.mark.parametrize("name", FUNCTIONS)
def test_large_scores_stay_finite(name: str) -> None:
    query, key = leaves(torch.tensor([[1.0], [-1.0]]), torch.tensor([[1.0], [-1.0], [0.5]]))
    loss = pairwise(query, key, torch.tensor([0, 0]), FUNCTIONS[name], scale=1e4)
    loss.backward()
    assert math.isfinite(loss.item())
    assert query.grad is not None
    assert query.grad.isfinite().all()


@pytest.mark.parametrize("exclude", ["history", "window"])
@pytest.mark.parametrize("drawn", [0, 6])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_registered_loss_pairs_targets_with_the_items_of_the_batch(
    name: str, drawn: int, exclude: str
) -> None:
    rows = [[0, 1, 2], [3, 1], [4, 5, 6, 3]]
    features = worlds.features(12)
    batch = worlds.batch(sequences(rows), features, torch.Generator().manual_seed(0))
    settings = LossSettings(
        dim=4, negatives=drawn, exclude=exclude, temperature=0.5, score_penalty=0.3
    )
    loss = LOSSES.find(name)(settings)
    generator = torch.Generator().manual_seed(1)
    item_ND = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    targets = Targets(
        item_M=torch.tensor([1, 2, 1, 5, 6, 3]), row_M=torch.tensor([0, 0, 1, 2, 2, 2])
    )
    query_MD = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    items = loss.draw(targets, batch)
    mine = loss(query_MD, ItemVectors(vectors_KD=item_ND), targets, batch, items)
    others = [] if items is None else items.items_X.tolist()
    assert len(others) == drawn
    # A user's training items are those of its row in this world, in both forms of `exclude`.
    expected = [
        reference(
            name,
            2 * query @ item_ND[target],
            [
                2 * query @ item_ND[i]
                for i in [*itertools.chain(*rows), *others]
                if i not in rows[row]
            ],
            0.3,
        )
        for query, target, row in zip(query_MD, targets.item_M, targets.row_M, strict=True)
    ]
    torch.testing.assert_close(mine, torch.stack(expected).mean(), rtol=EXACT[torch.float64],
                               atol=1e-12)  # fmt: skip


@pytest.mark.parametrize(("power", "share"), [(0.0, 1 / 4), (0.5, 2 / 3), (1.0, 4 / 5)])
def test_drawn_items_follow_the_power_of_their_counts(power: float, share: float) -> None:
    batch: Batch = worlds.batch(
        sequences([[0, 1], [1], [1], [1]]), worlds.features(4), torch.Generator().manual_seed(0)
    )
    loss = LOSSES.find("top1")(LossSettings(negatives=20_000, negatives_power=power))
    targets = Targets(item_M=torch.tensor([1]), row_M=torch.tensor([0]))
    drawn: Any = loss.draw(targets, batch)
    assert abs(float((drawn.items_X == 1).float().mean()) - share) < 0.02
    assert set(drawn.items_X.tolist()) == ({0, 1, 2, 3} if power == 0 else {0, 1})
