"""Means of measurements that come in clusters, with honest standard errors."""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error; None where a single cluster tells nothing about it."""

    mean: float
    stderr: float | None


def clustered_mean(clusters: Seq[Seq[float]]) -> Estimate:
    """The mean over all values, its standard error over clusters: values of one cluster may hang together as they like.

    The variance is G/(G-1) sum_g (sum of g's residuals)^2 / n^2 for n values in G clusters (Cameron and Miller 2015, "A
    practitioner's guide to cluster-robust inference", section II, for a regression on a constant). Empty clusters do not
    count. Raises ValueError where there is no value at all.
    """
    filled = [values for values in clusters if values]
    count = sum(len(values) for values in filled)
    if not count:
        raise ValueError("there is nothing to take the mean of")
    mean = math.fsum(value for values in filled for value in values) / count
    if len(filled) == 1:
        return Estimate(mean, None)
    squares = math.fsum(math.fsum(value - mean for value in values) ** 2 for values in filled)
    return Estimate(mean, math.sqrt(len(filled) / (len(filled) - 1) * squares) / count)
