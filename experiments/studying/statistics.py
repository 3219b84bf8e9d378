"""Means with confidence intervals, and paired differences of methods over the same seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.95


class Estimate(NamedTuple):
    """A mean over seeds.

    Attributes:
      n: number of seeds.
      mean: mean of their values; NaN for no seed.
      margin: half the width of the 95 % confidence interval; NaN for fewer than two seeds.
    """

    n: int
    mean: float
    margin: float


class Difference(NamedTuple):
    """The mean over seeds of one method's value minus another's.

    Attributes:
      n: number of seeds that both methods have.
      mean: mean of the differences; NaN for no seed.
      margin: half the width of its 95 % confidence interval; NaN for fewer than two seeds.
      p: two-sided p-value of the paired t-test; NaN for fewer than two seeds, or if the difference
        is the same for all seeds.
      above: number of seeds with which the one method's value is greater.
      holm: p corrected for the number of comparisons (see `holm`).
    """

    n: int
    mean: float
    margin: float
    p: float
    above: int
    holm: float = math.nan


def estimate(values: Sequence[float]) -> Estimate:
    """Estimates mean ± t(0.975, n-1) s / √n, Student's t interval; s is the sample deviation.

    Args:
      values: (n,) one value for each seed.
    """
    n = len(values)
    if n < 2:
        return Estimate(n, values[0] if n else math.nan, math.nan)
    from scipy.stats import t

    margin = t.ppf((1 + CONFIDENCE) / 2, n - 1) * np.std(values, ddof=1) / math.sqrt(n)
    return Estimate(n, float(np.mean(values)), float(margin))


def paired_difference(values: Sequence[float], reference: Sequence[float]) -> Difference:
    """Compares two methods seed by seed, so that the effect of a seed on both cancels.

    Args:
      values: (n,) values of the one method.
      reference: (n,) values of the other, for the same seeds in the same order.
    """
    differences = np.subtract(values, reference)
    n, mean, margin = estimate(differences.tolist())
    above = int((differences > 0).sum())
    # If the differences vary by rounding alone, the test statistic is 0/0 or infinite: no p-value.
    if n < 2 or np.ptp(differences) <= 1e-12 * np.abs([values, reference]).max():
        return Difference(n, mean, margin, math.nan, above)
    from scipy.stats import ttest_rel

    return Difference(n, mean, margin, float(ttest_rel(values, reference).pvalue), above)


def holm(values: Sequence[float]) -> list[float]:
    """Corrects p-values for the number of comparisons (Holm 1979, "A simple sequentially ...").

    With the corrected values, the chance of calling any difference significant that is none is at
    most the level at which they are judged.

    Args:
      values: p-values of a family of comparisons; NaN is no comparison, and stays NaN.
    """
    order = sorted((i for i, p in enumerate(values) if not math.isnan(p)), key=values.__getitem__)
    corrected = [math.nan] * len(values)
    least = 0.0
    for rank, i in enumerate(order):
        least = max(least, min((len(order) - rank) * values[i], 1.0))
        corrected[i] = least
    return corrected
