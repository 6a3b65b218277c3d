import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from tests.trainer import worlds
from tests.trainer.losses import in_batch_reference as reference
from trainer.data.batches import Sequences, log_popularity
from trainer.losses import chunked_scores, clip
from trainer.losses.base import ItemVectors, LossSettings, Targets
from trainer.losses.batch_columns import own_items
from trainer.losses.clip import in_batch_symmetric
from trainer.losses.in_batch import (
    Columns,
    ExcludedLabels,
    InBatch,
    in_batch,
)

EXACT = {torch.float32: 1e-5, torch.float64: 1e-10}


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def directions(rows: int, dim: int, generator: torch.Generator) -> Tensor:
    """Unit vectors, as cosines have them: a score is at most the scale."""
    return functional.normalize(torch.randn(rows, dim, generator=generator).double(), dim=1)


def close(mine: Tensor, theirs: Tensor, dtype: torch.dtype, size: float = 1.0) -> None:
    exact = EXACT[dtype]
    torch.testing.assert_close(mine.double(), theirs.double(), rtol=exact, atol=exact * size)


def small_blocks(patch: pytest.MonkeyPatch, rows: int) -> None:
    patch.setattr(chunked_scores, "_BLOCK_BYTES", {"cpu": 1})
    patch.setattr(chunked_scores, "_FEWEST_ROWS", rows)
    patch.setattr(clip, "_KEPT_BYTES", 0)


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    rows, columns, dim = draw(st.integers(1, 9)), draw(st.integers(1, 9)), draw(st.integers(1, 5))
    column = st.integers(0, columns - 1)
    labels = st.lists(st.integers(0, 4), min_size=columns, max_size=columns)
    return {
        "rows": rows,
        "dim": dim,
        "columns": columns,
        "seed": draw(st.integers(0, 2**16)),
        "scale": draw(st.sampled_from([0.1, 1.0, 20.0])),
        "positives": draw(
            st.lists(st.lists(column, min_size=1, max_size=3), min_size=rows, max_size=rows)
        ),
        "labels": draw(st.none() | labels),
        "own": draw(st.none() | st.lists(st.sets(st.integers(0, 4)), min_size=1, max_size=3)),
        "corrected": draw(st.booleans()),
        "counts": draw(st.none() | st.lists(st.integers(1, 5), min_size=columns, max_size=columns)),
        "counted": draw(st.sampled_from([None, 1, 2])),
        "block": draw(st.integers(1, 4)),
        "dtype": draw(st.sampled_from([torch.float32, torch.float64])),
    }


@settings(deadline=None, max_examples=60)
@given(case=cases())
def test_the_operator_equals_the_formula_in_float64(case: dict[str, Any]) -> None:
    rows, columns, dtype = case["rows"], case["columns"], case["dtype"]
    generator = torch.Generator().manual_seed(case["seed"])
    query = directions(rows, case["dim"], generator).to(dtype)
    key = directions(columns, case["dim"], generator).to(dtype)
    correction = torch.randn(columns, generator=generator).double() if case["corrected"] else None
    owners = torch.arange(rows) % len(case["own"]) if case["own"] else None
    own = [case["own"][u] for u in owners.tolist()] if owners is not None else None
    own_UJ = None
    if case["own"]:
        own_UJ = torch.tensor([sorted(s) + [-1] * (5 - len(s)) for s in case["own"]])
    width = max(len(row) for row in case["positives"])
    positive_MP = torch.tensor([row + [-1] * (width - len(row)) for row in case["positives"]])

    mine, theirs = leaves(query, key), leaves(query.double(), key.double())
    with pytest.MonkeyPatch.context() as patch:
        small_blocks(patch, case["block"])
        loss = in_batch(
            mine[0],
            mine[1],
            positive_MP,
            scale=case["scale"],
            columns=Columns(
                label_C=None if case["labels"] is None else torch.tensor(case["labels"]),
                correction_C=correction,
                count_C=None if case["counts"] is None else torch.tensor(case["counts"]),
            ),
            excluded=None if own_UJ is None else ExcludedLabels(own_UJ=own_UJ, owner_M=owners),
            counted=case["counted"],
        )
    expected = reference.in_batch(
        theirs[0],
        theirs[1],
        case["positives"],
        scale=case["scale"],
        labels=case["labels"],
        own=own,
        correction=None if correction is None else correction.tolist(),
        counts=case["counts"],
        counted=case["counted"],
    )
    (3 * loss).backward()
    (3 * expected).backward()
    assert loss.dtype == dtype
    size = max(1.0, case["scale"])
    close(loss, expected, dtype, size)
    for tensor, other in zip(mine, theirs, strict=True):
        assert tensor.grad is not None
        assert other.grad is not None
        close(tensor.grad, other.grad, dtype, size)


@settings(deadline=None, max_examples=60)
@given(
    pairs=st.integers(1, 12),
    dim=st.integers(1, 5),
    scale=st.sampled_from([0.1, 1.0, 20.0, 100.0]),
    labels=st.none() | st.lists(st.integers(0, 4), min_size=12, max_size=12),
    block=st.integers(1, 5),
    kept=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**16),
)
def test_the_symmetric_form_equals_the_formula_in_float64(
    pairs: int,
    dim: int,
    scale: float,
    labels: list[int] | None,
    block: int,
    kept: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y = (directions(pairs, dim, generator).to(dtype) for _ in range(2))
    labels = labels and labels[:pairs]
    mine, theirs = leaves(x, y), leaves(x.double(), y.double())
    with pytest.MonkeyPatch.context() as patch:
        small_blocks(patch, block)
        patch.setattr(clip, "_KEPT_BYTES", 10**6 if kept else 0)
        label_B = None if labels is None else torch.tensor(labels)
        loss = in_batch_symmetric(mine[0], mine[1], scale=scale, label_B=label_B)
    same = [[i] for i in range(pairs)]
    to_keys, to_queries = (
        reference.in_batch(a, b, same, scale=scale, labels=labels)
        for a, b in ((theirs[0], theirs[1]), (theirs[1], theirs[0]))
    )
    expected = (to_keys + to_queries) / 2
    (3 * loss).backward()
    (3 * expected).backward()
    close(loss, expected, dtype, max(1.0, scale))
    for tensor, other in zip(mine, theirs, strict=True):
        assert tensor.grad is not None
        assert other.grad is not None
        close(tensor.grad, other.grad, dtype, max(1.0, scale))


def test_by_hand() -> None:
    # scores 0, log 2 and log 5: the share of the middle one is 2 / 8, without the last one 2 / 3
    key = torch.tensor([[1.0], [2.0], [5.0]]).log()
    query = torch.ones(1, 1)
    target = torch.tensor([1])
    torch.testing.assert_close(in_batch(query, key, target), torch.tensor(math.log(8 / 2)))
    torch.testing.assert_close(
        in_batch(query, key, target, columns=Columns(label_C=torch.tensor([4, 7, 7]))),
        torch.tensor(math.log(3 / 2)),
    )
    torch.testing.assert_close(
        in_batch(
            query,
            key,
            target,
            columns=Columns(label_C=torch.tensor([0, 1, 2])),
            excluded=ExcludedLabels(own_UJ=torch.tensor([[1, 0, -1]])),
        ),
        torch.tensor(math.log(7 / 2)),
    )
    torch.testing.assert_close(
        in_batch(query, key, torch.tensor([[1, 2]])), torch.tensor(math.log(8 / 7))
    )
    torch.testing.assert_close(  # Eq. 8 of PMMRec: (2 + 5) / (2 + 1) is more than 1
        in_batch(query, key, torch.tensor([[1, 2]]), counted=1), torch.tensor(math.log(3 / 7))
    )
    torch.testing.assert_close(
        in_batch(query, key, target, columns=Columns(count_C=torch.tensor([1.0, 9.0, 2.0]))),
        torch.tensor(math.log(13 / 2)),
    )


def test_the_sign_of_the_popularity_correction() -> None:
    """Drawn by popularity and corrected, a batch stands for the whole catalogue, each item once.

    The log-partition of 200,000 columns drawn with p, each score less log p, is that of the
    catalogue and log 200,000. The wrong sign would give each item p^2, the right one p^0.
    """
    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor([1, 2, 4, 8, 16, 32])
    item, query = torch.randn(6, 3, generator=generator), torch.randn(1, 3, generator=generator)
    draws = 200_000
    drawn = torch.multinomial(counts.float(), draws, replacement=True, generator=generator)
    # A positive of score 0 beside the six: e^loss - 1 is the sum over the negatives.
    key = torch.cat([item, torch.zeros(1, 3)])
    for sign, power in ((1, 0), (-1, 2)):
        loss = in_batch(
            query,
            key,
            torch.tensor([6]),
            columns=Columns(
                correction_C=torch.cat([sign * log_popularity(counts), torch.zeros(1)]),
                count_C=torch.cat([torch.bincount(drawn, minlength=6), torch.ones(1)]),
            ),
        )
        p = counts / counts.sum()
        expected = ((query @ item.T)[0].exp() * p**power).sum()
        torch.testing.assert_close(loss.expm1() / draws, expected, rtol=0.02, atol=0)


def test_a_rare_negative_weighs_more_than_a_popular_one() -> None:
    query, key = torch.ones(1, 1), torch.zeros(2, 1)
    counts = torch.tensor([10, 1, 100])
    rare, popular = (
        in_batch(
            query,
            key,
            torch.tensor([0]),
            columns=Columns(correction_C=log_popularity(counts)[[0, other]]),
        )
        for other in (1, 2)
    )
    # e^(-log p): 11.1 for the target, 111 for the rare and 1.11 for the popular one
    torch.testing.assert_close(rare, torch.tensor(math.log(1 + 10)))
    torch.testing.assert_close(popular, torch.tensor(math.log(1 + 0.1)))
    assert torch.isfinite(log_popularity(torch.tensor([0, 3]))).all()


def test_a_row_without_negatives_costs_nothing() -> None:
    query, key = leaves(torch.randn(2, 3), torch.randn(2, 3))
    loss = in_batch(query, key, torch.tensor([0, 1]), columns=Columns(label_C=torch.tensor([5, 5])))
    loss.backward()
    assert loss.item() == 0
    assert query.grad is not None
    assert not query.grad.any()
    none = in_batch(query[:0], key, torch.zeros(0, dtype=torch.int64))
    assert none.item() == 0
    lonely = in_batch_symmetric(query[:1], key[:1])
    lonely.backward()
    assert lonely.item() == 0


def test_where_the_model_is_sure_the_gradient_keeps_its_digits() -> None:
    """p - 1 would cancel: here the share of the negatives is 2e-9, less than float32's epsilon."""
    query = torch.tensor([[20.0]], requires_grad=True)
    key = torch.tensor([[1.0], [0.0]])
    in_batch(query, key, torch.tensor([0])).backward()
    assert query.grad is not None
    torch.testing.assert_close(query.grad.item(), -math.exp(-20), rtol=1e-5, atol=0.0)


def test_large_scores_neither_overflow_nor_vanish() -> None:
    x, y = leaves(torch.eye(4) * 30, torch.eye(4).flip(0) * 30)
    loss = in_batch_symmetric(x, y)
    loss.backward()
    torch.testing.assert_close(loss, torch.tensor(900.0))
    assert x.grad is not None
    torch.testing.assert_close(x.grad.abs().max(), torch.tensor(30 / 4))


def test_no_gradient_is_formed_for_what_needs_none() -> None:
    query, key = torch.randn(3, 2, requires_grad=True), torch.randn(4, 2)
    in_batch(query, key, torch.tensor([0, 1, 2])).backward()
    assert query.grad is not None
    assert key.grad is None
    x, y = torch.randn(3, 2), torch.randn(3, 2, requires_grad=True)
    in_batch_symmetric(x, y).backward()
    assert x.grad is None
    assert y.grad is not None


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_products_come_near(autocast: bool) -> None:
    torch.manual_seed(0)
    query, key = torch.randn(64, 16), torch.randn(64, 16)
    target = torch.arange(64)
    wide = leaves(query, key)
    expected = in_batch(wide[0], wide[1], target, scale=0.5)
    expected.backward()
    narrow = leaves(query, key) if autocast else leaves(query.bfloat16(), key.bfloat16())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = in_batch(narrow[0], narrow[1], target, scale=0.5)
        both = in_batch_symmetric(narrow[0], narrow[1], scale=0.5)
    assert loss.dtype == both.dtype == torch.float32
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=0)
    for a, b in zip(narrow, wide, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert a.grad.dtype == a.dtype
        assert (a.grad.float() - b.grad).abs().max() < 0.03 * b.grad.abs().max()


def test_the_same_bits_every_time() -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3000, 8, generator=generator)
    key = torch.randn(500, 8, generator=generator)
    target = torch.randint(20, (3000,), generator=generator)  # many rows pull at the same key

    def gradients() -> list[Tensor]:
        first = leaves(query, key)
        in_batch(
            first[0], first[1], target, columns=Columns(label_C=torch.arange(500) % 90)
        ).backward()
        second = leaves(query, query.flip(0))
        in_batch_symmetric(second[0], second[1], label_B=torch.arange(3000) // 2).backward()
        return [x.grad for x in (*first, *second) if x.grad is not None]

    first = gradients()
    assert len(first) == 4
    for _ in range(4):
        assert all(torch.equal(a, b) for a, b in zip(first, gradients(), strict=True))


def test_own_items_are_the_users_training_items() -> None:
    rows = Sequences(
        items_BL=torch.tensor([[3, 1, 3], [0, 2, 2], [4, 4, 4]]), lengths_B=torch.tensor([3, 2, 1])
    )
    batch = worlds.batch(rows, worlds.features(6), torch.Generator())
    assert own_items(batch).tolist() == [[1, 3], [0, 2], [4, -1]]
    older = replace(batch.train, keys_J=torch.tensor([0, 1, 3, 6, 8, 10, 16]))
    batch = replace(batch, train=older)
    assert own_items(batch).tolist() == [[0, 1, 3], [0, 2, 4], [4, -1, -1]]
    assert own_items(batch, "window").tolist() == [[3, 1, 3], [0, 2, -1], [4, -1, -1]]


@pytest.mark.parametrize("debias", [True, False])
def test_the_window_or_the_history_is_no_negative(debias: bool) -> None:
    """Column by column in float64; the first user has item 5, which the second row contains."""
    rows = [[3, 1, 3], [0, 2, 5]]
    histories = {"history": [{1, 3, 5}, {0, 2, 5}], "window": [{1, 3}, {0, 2, 5}]}
    sequences = Sequences(items_BL=torch.tensor(rows), lengths_B=torch.tensor([3, 3]))
    batch = worlds.batch(sequences, worlds.features(6), torch.Generator())
    batch = replace(batch, train=replace(batch.train, keys_J=torch.tensor([1, 3, 5, 6, 8, 11])))
    generator = torch.Generator().manual_seed(0)
    item_ND = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    query_MD = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    target_M, row_M = torch.tensor([1, 3, 2, 5]), torch.tensor([0, 0, 1, 1])
    popularity_N = log_popularity(batch.train.counts_N).double() if debias else torch.zeros(6)
    losses = []
    for exclude, own in histories.items():
        terms = []
        for query_D, target, row in zip(query_MD, target_M, row_M.tolist(), strict=True):
            columns = [int(target), *(i for r in rows for i in r if i not in own[row])]
            scores = item_ND[columns] @ query_D - popularity_N[columns]
            terms.append(-scores.log_softmax(0)[0])
        loss = InBatch(LossSettings(dim=4, debias=debias, exclude=exclude))(
            query_MD,
            ItemVectors(vectors_KD=item_ND),
            Targets(item_M=target_M, row_M=row_M),
            batch,
            None,
        )
        torch.testing.assert_close(loss, torch.stack(terms).mean(), rtol=0, atol=1e-12)
        losses.append(float(loss))
    assert losses[1] > losses[0]  # a negative more


@pytest.mark.parametrize("debias_target", [True, False])
@pytest.mark.parametrize("power", [0.0, 0.5])
@pytest.mark.parametrize("drawn", [0, 7])
def test_drawn_items_are_negatives_and_change_the_expected_counts(
    drawn: int, power: float, debias_target: bool
) -> None:
    """Column by column in float64, with the expected count of each item in a batch."""
    rows = [[3, 1, 3], [0, 2, 5]]
    sequences = Sequences(items_BL=torch.tensor(rows), lengths_B=torch.tensor([3, 3]))
    batch = worlds.batch(sequences, worlds.features(8), torch.Generator().manual_seed(0))
    counts_N = torch.tensor([4, 9, 1, 25, 16, 1, 0, 4])
    batch = replace(batch, train=replace(batch.train, counts_N=counts_N))
    settings = LossSettings(
        dim=4, negatives=drawn, negatives_power=power, debias_target=debias_target, temperature=0.5
    )
    loss = InBatch(settings)
    generator = torch.Generator().manual_seed(0)
    item_ND = torch.randn(8, 4, generator=generator, dtype=torch.float64)
    query_MD = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    targets = Targets(item_M=torch.tensor([1, 3, 2, 5]), row_M=torch.tensor([0, 0, 1, 1]))
    items = loss.draw(targets, batch)
    others = [] if items is None else items.items_X.tolist()
    assert len(others) == drawn

    shares_N = counts_N.clamp_min(0.5).double() / 60
    draws_N = counts_N.double() ** power
    log_expected_N = (6 * shares_N + drawn * draws_N / draws_N.sum()).log()
    terms = []
    for query_D, target, row in zip(
        query_MD, targets.item_M.tolist(), targets.row_M.tolist(), strict=True
    ):
        negatives = [i for i in [*rows[0], *rows[1], *others] if i not in rows[row]]
        target_score = 2 * item_ND[target] @ query_D
        if debias_target:
            target_score = target_score - log_expected_N[target]
        negative_scores = 2 * item_ND[negatives] @ query_D - log_expected_N[negatives]
        terms.append(torch.cat([target_score[None], negative_scores]).logsumexp(0) - target_score)
    mine = loss(query_MD, ItemVectors(vectors_KD=item_ND), targets, batch, items)
    torch.testing.assert_close(mine, torch.stack(terms).mean(), rtol=0, atol=1e-6)  # float32 counts


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_without_the_correction_of_the_target_the_loss_estimates_the_softmax(power: float) -> None:
    rows = [[0, 1], [2, 3]]
    sequences = Sequences(items_BL=torch.tensor(rows), lengths_B=torch.tensor([2, 2]))
    batch = worlds.batch(sequences, worlds.features(9), torch.Generator().manual_seed(0))
    counts_N = torch.tensor([1, 2, 3, 4, 5, 6, 7, 8, 64])
    batch = replace(batch, train=replace(batch.train, counts_N=counts_N))
    loss = InBatch(
        LossSettings(dim=3, negatives=400_000, negatives_power=power, debias_target=False)
    )
    generator = torch.Generator().manual_seed(1)
    item_ND = torch.randn(9, 3, generator=generator, dtype=torch.float64)
    query_MD = torch.randn(1, 3, generator=generator, dtype=torch.float64)
    targets = Targets(item_M=torch.tensor([1]), row_M=torch.tensor([0]))
    items = loss.draw(targets, batch)
    mine = loss(query_MD, ItemVectors(vectors_KD=item_ND), targets, batch, items)
    others = [1, *range(2, 9)]  # the catalogue without the other item of the user
    exact = -(item_ND[others] @ query_MD[0]).log_softmax(0)[0]
    torch.testing.assert_close(mine, exact, rtol=0.01, atol=0)


class Largest(TorchDispatchMode):
    """The most numbers that the result of one operation has, forward and backward."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, tuple | list) else [output]:
            if isinstance(tensor, Tensor):
                self.most = max(self.most, tensor.untyped_storage().nbytes() // tensor.itemsize)
        return output


@pytest.mark.parametrize("way", ["rows", "own items", "symmetric", "naive"])
def test_all_scores_are_never_held_at_once(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the batch needs buffers twice as large: a block of rows by the columns."""
    small_blocks(monkeypatch, 32)
    most = []
    for rows in (512, 1024):
        query, key = leaves(*directions(2 * rows, 4, torch.Generator()).float().chunk(2))
        with Largest() as largest:  # type: ignore[no-untyped-call]
            if way == "symmetric":
                loss = in_batch_symmetric(query, key, scale=5.0)
            elif way == "naive":
                loss = functional.cross_entropy(query @ key.T, torch.arange(rows))
            else:
                of_users = ExcludedLabels(
                    own_UJ=torch.arange(rows // 4 * 3).view(-1, 3), owner_M=torch.arange(rows) // 4
                )
                loss = in_batch(
                    query,
                    key,
                    torch.arange(rows),
                    scale=5.0,
                    columns=Columns(label_C=torch.arange(rows)),
                    excluded=of_users if way == "own items" else None,
                )
            loss.backward()
        most.append(largest.most)
    bound = [32 * rows + 1024 for rows in (512, 1024)]
    is_bounded = [size <= limit for size, limit in zip(most, bound, strict=True)]
    assert is_bounded == [way != "naive"] * 2, most
