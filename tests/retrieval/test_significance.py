import itertools

import numpy as np
import pytest

from retrieval.significance import bootstrap, paired_test


def test_the_interval_covers_the_mean_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(100):
        values = (rng.random((80, 1)) < 0.3).astype(np.float64)
        low, high = bootstrap(values, samples=200, confidence=0.9, seed=trial)
        hits += low[0] <= 0.3 <= high[0]
    # 90 expected, standard deviation 3; the percentile interval is a little short.
    assert 79 <= hits <= 97


def test_the_interval_is_as_wide_as_theory_says() -> None:
    values = np.random.default_rng(1).standard_normal((4000, 2)) * [1, 10]
    low, high = bootstrap(values, samples=2000, confidence=0.95)
    half = 1.96 * values.std(axis=0) / np.sqrt(4000)
    np.testing.assert_allclose((high - low) / 2, half, rtol=0.06)
    assert (low < values.mean(axis=0)).all()
    assert (values.mean(axis=0) < high).all()


def test_all_metrics_share_their_resamples() -> None:
    values = np.random.default_rng(2).random((50, 1))
    low, high = bootstrap(np.hstack([values, 2 * values, 1 - values]), samples=100, seed=3)
    np.testing.assert_allclose(low[1], 2 * low[0])
    np.testing.assert_allclose(low[2], 1 - high[0])
    again = bootstrap(values, samples=100, seed=3)
    np.testing.assert_allclose(np.hstack(again), [low[0], high[0]])
    assert bootstrap(values, samples=100, seed=4)[0][0] != low[0]


def test_users_that_agree_leave_no_doubt() -> None:
    low, high = bootstrap(np.full((30, 2), [0.1, 1 / 3]))
    assert low.tolist() == high.tolist() == [0.1, 1 / 3]
    low, high = bootstrap(np.array([[0.7]]))
    assert low.tolist() == high.tolist() == [0.7]


def test_p_values_of_few_users_are_exact() -> None:
    # Three users, each better by one: of the 8 assignments of signs, +++ and --- reach as far.
    result = paired_test(np.ones(3), np.zeros(3))
    assert (result.difference, result.p_value) == (1.0, 2 / 8)
    # Users without a difference change the mean, not the p-value.
    result = paired_test(np.array([1.0, 1, 1, 0, 5]), np.array([0.0, 0, 0, 0, 5]))
    assert (result.difference, result.p_value) == (0.6, 2 / 8)
    # Many assignments of signs reach the same sum on paper, and miss it in floating point.
    for tenths in np.random.default_rng(0).integers(-9, 10, (20, 9)):
        signs = np.array([*itertools.product([1, -1], repeat=9)])
        expected = (np.abs(signs @ tenths) >= abs(tenths.sum())).mean()
        assert paired_test(tenths / 10, np.zeros(9)).p_value == expected


def test_sampled_p_values_approach_the_exact_ones() -> None:
    rng = np.random.default_rng(5)
    a = rng.random(16)
    b = a + rng.normal(0.03, 0.1, 16)
    exact = paired_test(a, b, samples=2**16).p_value
    sampled = paired_test(a, b, samples=20_000).p_value
    assert 0.02 < exact < 0.9
    assert abs(sampled - exact) < 4 * np.sqrt(exact * (1 - exact) / 20_000)
    assert sampled == paired_test(b, a, samples=20_000).p_value


def test_equal_systems_do_not_differ() -> None:
    a = np.random.default_rng(6).random(500)
    result = paired_test(a, a.copy())
    assert (result.difference, result.low, result.high, result.p_value) == (0, 0, 0, 1)


def test_a_clear_difference_is_found_and_noise_is_not() -> None:
    rng = np.random.default_rng(7)
    a = rng.random(2000)
    clear = paired_test(a + 0.02, a + rng.normal(0, 0.1, 2000), samples=2000)
    assert clear.p_value == 1 / 2001
    assert 0 < clear.low < clear.difference < clear.high
    p_values = [paired_test(rng.random(60), rng.random(60), samples=200).p_value for _ in range(80)]
    # Uniform under the null hypothesis: about 8 of 80 below 0.1.
    assert 2 <= sum(p < 0.1 for p in p_values) <= 17


def test_senseless_input_is_refused() -> None:
    ones = np.ones((3, 1))
    for values, settings, message in [
        (ones[:, 0], {}, "expected \\(users, metrics\\)"),
        (ones[:0], {}, "users >= 1"),
        (ones * np.nan, {}, "NaN"),
        (ones, {"samples": 0}, "samples is 0"),
        (ones, {"confidence": 1.0}, "confidence is 1.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            bootstrap(values, **settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the same users"):
        paired_test(np.ones(3), np.ones(4))
    with pytest.raises(ValueError, match="NaN"):
        paired_test(np.ones(3), np.array([1, 2, np.inf]))
