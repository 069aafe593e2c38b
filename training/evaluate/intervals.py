"""Confidence intervals, at 95 %: by resampling for means and ratios over records, Wilson's for shares."""

from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
ENDS = (0.025, 0.975)
Z = 1.959964  # the normal distribution has 95 % of its weight within this many standard deviations


@dataclass(frozen=True)
class Estimate:
    """A metric and the two ends of its interval."""

    value: float
    low: float
    high: float


def resampled_means(columns: np.ndarray, seed: int) -> np.ndarray:
    """Return the means of columns [records, n] over RESAMPLES draws, [RESAMPLES, n]: the bootstrap of Efron 1979.

    A draw takes as many records as there are, with replacement, and the same ones for all columns: metrics of two models
    on the same records can be subtracted draw by draw (Koehn 2004, "Statistical significance tests for machine
    translation evaluation", section 4).
    """
    random, count = np.random.default_rng(seed), len(columns)
    draws = (np.bincount(random.integers(count, size=count), minlength=count) for _ in range(RESAMPLES))
    return np.stack([times @ columns for times in draws]) / count


def percentile(value: float, resampled: np.ndarray) -> Estimate:
    """Return a metric with the middle 95 % of its resampled values. With few records it is too narrow: 12 give about 90 %."""
    low, high = np.quantile(resampled, ENDS)
    return Estimate(value, float(low), float(high))


def wilson(share: float, count: int) -> Estimate:
    """Return a share of ``count`` cases with Wilson's score interval (Wilson 1927; Brown, Cai and DasGupta 2001, eq. 4).

    With p the share, n the count and z = 1.96: (p + z^2/2n +- z sqrt(p (1 - p)/n + z^2/4n^2)) / (1 + z^2/n). It does not
    shrink to nothing where all cases agree, as resampling does. Ties may count as one half: they vary less than wins
    and losses, and the interval is wider than it had to be.
    """
    square = Z**2 / count
    middle, half = share + square / 2, Z * np.sqrt(share * (1 - share) / count + square / (4 * count))
    low, high = ((middle + sign * half) / (1 + square) for sign in (-1, 1))
    return Estimate(share, max(0.0, float(low)), min(1.0, float(high)))  # rounding: -0.0 % for none of n
