import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.losses import softmax
from trainer.losses.base import HistoryPairs
from trainer.losses.softmax import (
    Candidates,
    HistoryBias,
    cross_entropy_reference,
    draw_candidates,
    full_softmax,
    part_softmax,
)


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 40),
    items=st.integers(1, 30),
    dim=st.integers(1, 8),
    scale=st.sampled_from([1.0, 20.0, 0.1]),
    block=st.integers(1, 7),
    seed=st.integers(0, 2**16),
)
def test_full_softmax_equals_the_formula_in_float64(
    rows: int, items: int, dim: int, scale: float, block: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(rows, dim, generator=generator)
    item = torch.randn(items, dim, generator=generator)
    target = torch.randint(items, (rows,), generator=generator)
    mine = [query.clone().requires_grad_(), item.clone().requires_grad_()]
    theirs = [query.double().requires_grad_(), item.double().requires_grad_()]

    with pytest.MonkeyPatch.context() as patch:  # many blocks, even for small inputs
        patch.setattr(softmax, "_BLOCK_BYTES", 4 * items * block)
        patch.setattr(softmax, "_FEWEST_ROWS", 1)
        loss = full_softmax(mine[0], mine[1], target, scale)
    (3 * loss).backward()
    expected = cross_entropy_reference(theirs[0], theirs[1], target, scale)
    (3 * expected).backward()

    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    for tensor, other in zip(mine, theirs, strict=True):
        assert tensor.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(tensor.grad.double(), other.grad, rtol=1e-4, atol=1e-5 * scale)


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 30),
    items=st.integers(2, 20),
    block=st.integers(1, 7),
    everything=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_a_history_bias_equals_the_formula_in_float64(
    rows: int, items: int, block: int, everything: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    query, item = (torch.randn(n, 4, generator=generator) for n in (rows, items))
    target = torch.randint(items, (rows,), generator=generator)
    is_history = torch.rand(rows, items, generator=generator) < 0.3
    row, column = is_history.nonzero(as_tuple=True)
    pairs = HistoryPairs(row_P=row, item_P=column)
    inputs = [query, item, torch.tensor(-1.5)]
    mine = [x.clone().requires_grad_() for x in inputs]
    theirs = [x.double().requires_grad_() for x in inputs]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(softmax, "_BLOCK_BYTES", 4 * items * block)
        patch.setattr(softmax, "_FEWEST_ROWS", 1)
        if everything:
            history = HistoryBias(bias=mine[2], pairs=pairs)
            loss = full_softmax(mine[0], mine[1], target, 2.0, history)
        else:  # all items are candidates, in another order
            part = draw_candidates(target, items, items, generator)
            history = HistoryBias(bias=mine[2], pairs=part.columns_of(pairs))
            loss = part_softmax(mine[0], mine[1][part.items_X], part, 2.0, history)
    (3 * loss).backward()
    bias_MN = is_history * theirs[2]
    expected = cross_entropy_reference(theirs[0], theirs[1], target, 2.0, bias_MN)
    (3 * expected).backward()

    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    for tensor, other in zip(mine, theirs, strict=True):
        assert tensor.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(tensor.grad.double(), other.grad, rtol=1e-4, atol=1e-5)


def test_history_items_that_are_no_candidates_have_no_column() -> None:
    part = Candidates(
        items_X=torch.tensor([7, 2, 9]), target_M=torch.tensor([0]), offset_X=torch.zeros(3)
    )
    pairs = HistoryPairs(row_P=torch.tensor([0, 0, 0, 1]), item_P=torch.tensor([1, 2, 7, 9]))
    columns = part.columns_of(pairs)
    assert columns.row_P.tolist() == [0, 0, 1]
    assert columns.item_P.tolist() == [1, 0, 2]


def test_full_softmax_by_hand() -> None:
    # scores 0 and log 3: probabilities 1/4 and 3/4
    query = torch.tensor([[1.0], [1.0]])
    item = (
        torch.tensor([[0.0], [3.0]]).log1p()
        * torch.log(torch.tensor(3.0))
        / torch.log(torch.tensor(4.0))
    )
    loss = full_softmax(query, item, torch.tensor([0, 1]))
    expected = -(torch.log(torch.tensor(1 / 4)) + torch.log(torch.tensor(3 / 4))) / 2
    torch.testing.assert_close(loss, expected)


def test_no_gradient_is_formed_for_what_needs_none() -> None:
    query = torch.randn(3, 2, requires_grad=True)
    item = torch.randn(4, 2)
    full_softmax(query, item, torch.tensor([0, 1, 2])).backward()
    assert query.grad is not None
    assert item.grad is None


def test_bfloat16_products_come_near() -> None:
    torch.manual_seed(0)
    query, item = torch.randn(64, 16), torch.randn(50, 16)
    target = torch.randint(50, (64,))
    expected = cross_entropy_reference(query, item, target)
    loss = full_softmax(query.bfloat16(), item.bfloat16(), target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=0)


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 20),
    items=st.integers(1, 30),
    most=st.integers(0, 40),
    seed=st.integers(0, 2**16),
)
def test_candidates_stand_for_the_catalogue(rows: int, items: int, most: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(items, (rows,), generator=generator)
    part = draw_candidates(target, items, most, generator)
    assert torch.equal(part.items_X[part.target_M], target)
    assert len(part.items_X.unique()) == len(part.items_X)
    targets = len(target.unique())
    least = targets + (targets + 1) // 2
    assert len(part.items_X) == min(items, max(most, least))
    assert (part.offset_X[:targets] == 0).all()
    assert part.offset_X.exp().sum().item() == pytest.approx(items, rel=1e-4)


@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_all_candidates_are_the_full_softmax(scale: float) -> None:
    generator = torch.Generator().manual_seed(3)
    query, item = torch.randn(9, 4, generator=generator), torch.randn(7, 4, generator=generator)
    target = torch.randint(7, (9,), generator=generator)
    part = draw_candidates(target, 7, 7, generator)
    loss = part_softmax(query, item[part.items_X], part, scale)
    torch.testing.assert_close(loss, full_softmax(query, item, target, scale))


def test_candidates_by_hand() -> None:
    """Scores 0, of one target and of two of six others, each of which counts three times."""
    generator = torch.Generator().manual_seed(0)
    part = draw_candidates(torch.tensor([4]), 7, 3, generator)
    loss = part_softmax(torch.zeros(1, 2), torch.randn(3, 2), part, 20.0)
    assert loss.item() == pytest.approx(math.log(1 + 2 * 3))


def test_the_estimate_is_right_in_the_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    query, item = torch.randn(1, 3, generator=generator), torch.randn(20, 3, generator=generator)
    target = torch.tensor([3])
    sums = []
    for _ in range(2000):
        part = draw_candidates(target, 20, 5, generator)
        sums.append((item[part.items_X] @ query[0] + part.offset_X).exp().sum())
    expected = (item @ query[0]).exp().sum().item()
    assert torch.stack(sums).mean().item() == pytest.approx(expected, rel=0.05)


def test_candidates_cost_nothing_for_the_other_items() -> None:
    """Anything of the size of this catalogue would not fit into memory."""
    items, generator = 10**12, torch.Generator().manual_seed(0)
    part = draw_candidates(torch.tensor([5, 10**11, 5]), items, 1000, generator)
    assert len(part.items_X.unique()) == len(part.items_X) == 1000
    assert part.items_X[part.target_M].tolist() == [5, 10**11, 5]
    assert part.offset_X[2:].double().exp().sum().item() == pytest.approx(items, rel=1e-4)
    assert part.items_X.double().mean().item() == pytest.approx(items / 2, rel=0.1)


@pytest.mark.parametrize("items", [20, 100])
def test_the_estimate_is_right_in_the_mean_with_rejected_draws(items: int) -> None:
    """Of 20 items most are taken, so the others are permuted; of 100 items draws are rejected."""
    generator = torch.Generator().manual_seed(1)
    score = torch.randn(items, generator=generator)
    target = torch.tensor([3, 7, 3, 0])
    sums = []
    for _ in range(3000):
        part = draw_candidates(target, items, 13, generator)
        sums.append((score[part.items_X] + part.offset_X).exp().sum())
    assert torch.stack(sums).mean().item() == pytest.approx(float(score.exp().sum()), rel=0.03)
