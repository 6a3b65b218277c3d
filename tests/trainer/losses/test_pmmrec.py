"""The objectives of PMMRec against its equations, slot by slot, in float64."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from trainer.losses.pmmrec import (
    ALIGNMENTS,
    REPLACED,
    SHUFFLED,
    UNCHANGED,
    Positions,
    align,
    corrupt,
    dap,
    nid,
    pool,
    rcl,
    total,
)

N, D = 8, 3
sequences = st.lists(
    st.lists(st.integers(0, N - 1), min_size=2, max_size=5), min_size=2, max_size=4
)
dtypes = st.sampled_from([torch.float32, torch.float64])


def positions(rows: list[list[int]], extra_items: list[set[int]]) -> Positions:
    """What the model makes of a batch; each user has interacted with a row's items and more."""
    item_K = torch.tensor(sorted({item for row in rows for item in row}))
    place = {item: k for k, item in enumerate(item_K.tolist())}
    own = [sorted({*row, *others}) for row, others in zip(rows, extra_items, strict=True)]
    width = max(map(len, own))
    flat = [item for row in rows for item in row]
    return Positions(
        item_C=item_K,
        count_C=torch.tensor([flat.count(item) for item in item_K.tolist()]),
        anchor_M=torch.tensor([place[item] for row in rows for item in row[:-1]]),
        next_M=torch.tensor([place[item] for row in rows for item in row[1:]]),
        own_UJ=torch.tensor([row + [-1] * (width - len(row)) for row in own]),
        owner_M=torch.tensor([u for u, row in enumerate(rows) for _ in row[:-1]]),
    )


def negatives(rows: list[list[int]], extra_items: list[set[int]], user: int) -> list[int]:
    """N of Eq. 5: the items of all slots, except what the user has interacted with."""
    mine = {*rows[user], *extra_items[user]}
    return [item for row in rows for item in row if item not in mine]


def close(mine: Tensor, theirs: Tensor, dtype: torch.dtype) -> None:
    exact = 1e-5 if dtype == torch.float32 else 1e-10
    torch.testing.assert_close(mine.double(), theirs, rtol=exact, atol=exact)


def gradients_close(mine: list[Tensor], theirs: list[Tensor], dtype: torch.dtype) -> None:
    for tensor, other in zip(mine, theirs, strict=True):
        assert tensor.grad is not None
        assert other.grad is not None
        close(tensor.grad, other.grad, dtype)


@settings(deadline=None, max_examples=25)
@given(rows=sequences, corrected=st.booleans(), dtype=dtypes, seed=st.integers(0, 2**16))
def test_dap_is_equation_5(
    rows: list[list[int]], corrected: bool, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    extra_items = [{int(torch.randint(N, (), generator=generator))} for _ in rows]
    at = positions(rows, extra_items)
    e_ND = torch.randn(N, D, generator=generator, dtype=torch.float64)
    h_MD = torch.randn(len(at.next_M), D, generator=generator, dtype=torch.float64)
    log_p = torch.rand(N, generator=generator, dtype=torch.float64).log()
    theirs = [h_MD.requires_grad_(), e_ND[at.item_C].requires_grad_()]
    place = {item: k for k, item in enumerate(at.item_C.tolist())}
    expected, m = torch.zeros((), dtype=torch.float64), 0
    for u, row in enumerate(rows):
        for following in row[1:]:
            scores = theirs[1] @ h_MD[m] - (log_p[at.item_C] if corrected else 0)
            others = scores[[place[item] for item in negatives(rows, extra_items, u)]].exp().sum()
            positive = scores[place[following]].exp()
            expected = expected - (positive / (positive + others)).log()
            m += 1
    (expected / m).backward()
    mine = [x.detach().to(dtype).requires_grad_() for x in theirs]
    loss = dap(mine[0], mine[1], at, log_popularity_C=log_p[at.item_C] if corrected else None)
    loss.backward()
    close(loss, expected / m, dtype)
    gradients_close(mine, theirs, dtype)


@settings(deadline=None, max_examples=50)
@given(
    rows=sequences,
    kind=st.sampled_from(ALIGNMENTS),
    literal=st.booleans(),
    scale=st.sampled_from([1.0, 10.0]),
    dtype=dtypes,
    seed=st.integers(0, 2**16),
)
def test_alignments_are_equations_6_to_9(
    rows: list[list[int]], kind: str, literal: bool, scale: float, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    extra_items = [{int(torch.randint(N, (), generator=generator))} for _ in rows]
    at = positions(rows, extra_items)
    t_ND, v_ND = (
        torch.randn(N, D, generator=generator, dtype=torch.float64).requires_grad_()
        for _ in range(2)
    )
    present = torch.rand(2, N, generator=generator) < 0.8
    unit = [functional.normalize(x, dim=1) for x in (t_ND, v_ND)]

    def one_way(a: int, b: int) -> Tensor:
        terms = []
        for u, row in enumerate(rows):
            others = negatives(rows, extra_items, u)
            for item, following in itertools.pairwise(row):
                if not (present[a, item] and present[b, item]):
                    continue

                def delta(m: int, other: int, item: int = item) -> Tensor:
                    return (scale * unit[a][item] @ unit[m][other]).exp() * present[m, other]

                below = above = delta(b, item)
                if kind in ("ncl", "nicl"):
                    above = above + delta(b, following) + delta(a, following)
                    below = below if literal else above
                for m in (a, b) if kind in ("icl", "nicl") else (b,):
                    below = below + sum(delta(m, other) for other in others)
                terms.append(-(above / below).log())
        return torch.stack(terms).mean() if terms else torch.zeros((), dtype=torch.float64)

    expected = (one_way(0, 1) + one_way(1, 0)) / 2
    mine = [x.detach()[at.item_C].to(dtype).requires_grad_() for x in (t_ND, v_ND)]
    modalities = [(x, has[at.item_C]) for x, has in zip(mine, present, strict=True)]
    loss = align(kind, modalities, at, scale=scale, literal=literal)
    close(loss, expected, dtype)
    if expected.requires_grad:
        loss.backward()
        expected.backward()
        for tensor, other in zip(mine, (t_ND, v_ND), strict=True):
            assert tensor.grad is not None
            assert other.grad is not None
            # Normalising divides by the length, which may be small.
            short = float(tensor.detach().norm(dim=1).min().clamp_max(1))
            close(tensor.grad * short, other.grad[at.item_C] * short, dtype)


def test_the_literal_denominator_lets_the_loss_go_below_zero() -> None:
    """Two users, two items each; next items are as near as can be, and others far away."""
    at = positions([[0, 1], [2, 3]], [set(), set()])
    x_KD = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]])
    modalities = [(x_KD, torch.ones(4, dtype=torch.bool))] * 2
    # positives 3 e; negatives 4 / e; the literal denominator holds one e
    sound = align("nicl", modalities, at, scale=1.0)
    literal = align("nicl", modalities, at, scale=1.0, literal=True)
    e = math.e
    torch.testing.assert_close(sound, torch.tensor(math.log((3 * e + 4 / e) / (3 * e))))
    torch.testing.assert_close(literal, torch.tensor(math.log((e + 4 / e) / (3 * e))))
    assert literal < 0 < sound


def test_more_than_two_modalities_are_all_pairs() -> None:
    at = positions([[0, 1, 2], [3, 4]], [set(), set()])
    generator = torch.Generator().manual_seed(0)
    x = [(torch.randn(5, D, generator=generator), torch.ones(5, dtype=torch.bool)) for _ in "abc"]
    pairs = [align("nicl", [x[i], x[j]], at, scale=2.0) for i, j in ((0, 1), (0, 2), (1, 2))]
    torch.testing.assert_close(align("nicl", x, at, scale=2.0), torch.stack(pairs).mean())


def test_nothing_to_align_is_no_loss() -> None:
    at = positions([[0, 1], [2, 3]], [set(), set()])
    x_KD = torch.randn(4, D, requires_grad=True)
    left = torch.tensor([True, True, False, False])
    loss = align("nicl", [(x_KD, left), (x_KD, ~left)], at, scale=1.0)
    loss.backward()
    assert loss.item() == 0


def test_nid_is_cross_entropy_on_logits() -> None:
    logits = torch.tensor([[0.0, math.log(3.0), -1e9], [2.0, 2.0, 2.0]])
    label = torch.tensor([SHUFFLED, UNCHANGED])
    expected = -(math.log(3 / 4) + math.log(1 / 3)) / 2
    torch.testing.assert_close(nid(logits, label), torch.tensor(expected))
    # clipped: e^0, 3 and e^0
    expected = -(math.log(3 / 5) + math.log(1 / 3)) / 2
    torch.testing.assert_close(nid(logits, label, relu=True), torch.tensor(expected))


@settings(deadline=None, max_examples=20)
@given(
    users=st.lists(st.integers(0, 4), min_size=1, max_size=6), dtype=dtypes, seed=st.integers(0, 99)
)
def test_rcl_is_equation_11(users: list[int], dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    clean, noisy = (
        torch.randn(len(users), D, generator=generator, dtype=torch.float64).requires_grad_()
        for _ in range(2)
    )
    expected = torch.zeros((), dtype=torch.float64)
    for u, user in enumerate(users):
        terms = (noisy @ clean[u]).exp()
        others = [k for k, other in enumerate(users) if other != user]
        expected = expected - (terms[u] / (terms[u] + terms[others].sum())).log() / len(users)
    mine = [x.detach().to(dtype).requires_grad_() for x in (clean, noisy)]
    loss = rcl(mine[0], mine[1], torch.tensor(users), scale=1.0)
    loss.backward()
    expected.backward()
    close(loss, expected, dtype)
    gradients_close(mine, [clean, noisy], dtype)


def test_pooling() -> None:
    state = torch.tensor([[[1.0], [3.0], [99.0]], [[5.0], [99.0], [99.0]]])
    lengths = torch.tensor([2, 1])
    assert pool(state, lengths, "mean").tolist() == [[2.0], [5.0]]
    assert pool(state, lengths, "last").tolist() == [[3.0], [5.0]]


def test_the_total_is_the_plain_sum() -> None:
    losses = {"dap": torch.tensor(1.0), "rcl": torch.tensor(2.5)}
    assert {name: value.item() for name, value in total(losses).items()} == {
        "loss": 3.5, "dap": 1.0, "rcl": 2.5,
    }  # fmt: skip


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    shuffle=st.sampled_from([0.0, 0.15, 0.5, 0.99]),
    replace=st.sampled_from([0.0, 0.05, 0.5]),
    seed=st.integers(0, 2**16),
)
def test_what_a_disturbance_does(
    lengths: list[int], shuffle: float, replace: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    width, lengths_B = max(lengths), torch.tensor(lengths)
    item = torch.arange(len(lengths) * width).view(len(lengths), width)  # all different
    valid = torch.arange(width) < lengths_B[:, None]
    corrupted, label = corrupt(item, lengths_B, generator, shuffle=shuffle, replace=replace)
    assert torch.equal(corrupted[~valid], item[~valid])
    assert torch.equal(label == UNCHANGED, corrupted == item)
    for row, length in enumerate(lengths):
        moved = label[row] == SHUFFLED
        # They changed places among themselves, each left its own, and none is alone.
        assert sorted(corrupted[row][moved].tolist()) == sorted(item[row][moved].tolist())
        assert int(moved.sum()) != 1
        assert int(moved.sum()) <= max(2, math.ceil(shuffle * length))
        assert int((label[row] == REPLACED).sum()) <= math.ceil(replace * length)
    assert set(corrupted[valid].tolist()) <= set(item[valid].tolist())


def test_the_shares_of_a_disturbance() -> None:
    generator = torch.Generator().manual_seed(0)
    for length in (20, 7, 3):
        item = torch.arange(4000 * length).view(4000, length)
        _, label = corrupt(item, torch.full((4000,), length), generator)
        assert (label == SHUFFLED).float().mean().item() == pytest.approx(0.15, abs=0.01)
        assert (label == REPLACED).float().mean().item() == pytest.approx(0.05, abs=0.005)


def test_the_same_item_in_another_slot_is_unchanged() -> None:
    item = torch.zeros(3, 6, dtype=torch.int64)
    corrupted, label = corrupt(item, torch.tensor([6, 4, 1]), torch.Generator(), shuffle=0.9)
    assert not corrupted.any()
    assert not label.any()
