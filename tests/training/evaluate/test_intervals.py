"""Intervals: Wilson's as published, resampling as the normal approximation says, pairs drawn together."""

import numpy as np
import pytest

from training.evaluate.intervals import percentile, resampled_means, wilson

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("wins", "count", "low", "high"),
    # Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_as_published(wins, count, low, high):
    found = wilson(wins / count, count)
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)


def test_resampling_finds_the_standard_error_of_a_mean():
    values = np.random.default_rng(0).normal(3.0, 2.0, size=(400, 1))
    found = percentile(float(values.mean()), resampled_means(values, seed=1)[:, 0])
    error = values.std() / 400**0.5
    assert [found.low, found.high] == pytest.approx([values.mean() - 1.96 * error, values.mean() + 1.96 * error], abs=0.1 * error)


def test_two_columns_see_the_same_draws_and_a_seed_repeats_them():
    values = np.random.default_rng(0).normal(size=(30, 1))
    draws = resampled_means(np.hstack([values, values + 1.0]), seed=7)
    assert np.ptp(draws[:, 1] - draws[:, 0]) < 1e-12
    assert np.array_equal(draws, resampled_means(np.hstack([values, values + 1.0]), seed=7))
