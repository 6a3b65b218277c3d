import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.batches import TrainSet
from trainer.data.negative_sampling import draw_others, sample_unseen
from trainer.losses.bce import sampled_bce


def train_set(seen: list[set[int]], items: int) -> TrainSet:
    keys = sorted(user * items + item for user, own in enumerate(seen) for item in own)
    counts = np.bincount([key % items for key in keys], minlength=items)
    return TrainSet(counts_N=torch.from_numpy(counts), keys_J=torch.tensor(keys))


@settings(deadline=None)
@given(
    items=st.integers(1, 7),
    seen=st.lists(st.sets(st.integers(0, 6)), min_size=1, max_size=4),
    seed=st.integers(0, 100),
)
def test_every_unseen_item_and_no_other_is_drawn(
    items: int, seen: list[set[int]], seed: int
) -> None:
    seen = [{item for item in own if item < items} for own in seen]
    seen[0].add(0)  # a training set is never empty
    train = train_set(seen, items)
    users = torch.arange(len(seen)).repeat_interleave(200)
    generator = torch.Generator().manual_seed(seed)
    drawn, exists = sample_unseen(train, users, generator)
    for user, own in enumerate(seen):
        of_user = users == user
        left = set(range(items)) - own
        assert bool(exists[of_user].all()) is bool(left)
        assert bool(exists[of_user].any()) is bool(left)
        if left:
            assert set(drawn[of_user].tolist()) == left
    assert not (train.seen(users, drawn) & exists).any()


def test_the_draw_is_uniform_and_a_function_of_the_generator() -> None:
    train = train_set([{1, 4, 5}], 8)
    users = torch.zeros(50_000, dtype=torch.int64)
    drawn, _ = sample_unseen(train, users, torch.Generator().manual_seed(1))
    share = torch.bincount(drawn, minlength=8) / len(drawn)
    expected = torch.tensor([0.2, 0, 0.2, 0.2, 0, 0, 0.2, 0.2])
    torch.testing.assert_close(share, expected, rtol=0, atol=0.01)
    again, _ = sample_unseen(train, users, torch.Generator().manual_seed(1))
    assert torch.equal(again, drawn)


def test_the_loss_by_hand() -> None:
    query = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    positive = torch.tensor([[2.0, 5.0], [1.0, 0.5]])  # scores 2 and 1
    negative = torch.tensor([[-1.0, 3.0], [7.0, 9.0]])  # scores -1 and 18, which is none
    exists = torch.tensor([True, False])
    expected = (math.log1p(math.exp(-2)) + math.log1p(math.exp(-1))) / 2
    expected += math.log1p(math.exp(-1))
    assert sampled_bce(query, positive, negative, exists).item() == pytest.approx(expected)
    halved = sampled_bce(query / 0.5, positive, negative, exists, scale=0.5)
    assert halved.item() == pytest.approx(expected)
    none = sampled_bce(query, positive, negative, torch.zeros(2, dtype=torch.bool))
    assert none.item() == pytest.approx(expected - math.log1p(math.exp(-1)))


@pytest.mark.parametrize(("taken", "count"), [([], 3), ([0, 9], 4), ([2], 4), ([2, 5, 8], 7)])
def test_others_are_drawn_evenly_in_each_place(taken: list[int], count: int) -> None:
    """Each item that is not taken is as often the first, the second and so on as any other."""
    n_items, rounds = 10, 3000
    others = [item for item in range(n_items) if item not in taken]
    generator = torch.Generator().manual_seed(2)
    drawn = torch.stack(
        [draw_others(torch.tensor(taken).long(), n_items, count, generator) for _ in range(rounds)]
    )
    assert all(len(row.unique()) == count for row in drawn)
    for place in range(count):
        counts = drawn[:, place].bincount(minlength=n_items)
        assert counts[taken].sum() == 0
        expected = rounds / len(others)
        assert ((counts[others] - expected).abs() < 5 * expected**0.5).all()
