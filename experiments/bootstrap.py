"""Bootstrap intervals: how far a statistic of prompts might have come out otherwise, with other prompts like these."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
NUM_RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    low: float
    high: float


def interval(statistic: Callable[[list[int]], float], count: int, seed: int = 0) -> Interval | None:
    """The percentile interval at `LEVEL` of a statistic of `count` units, given the indices of those drawn with replacement.

    The same seed draws the same units, so what is paired stays paired. None for a single unit, which tells nothing. (Efron
    and Tibshirani 1993, "An introduction to the bootstrap", chapter 13)
    """
    if count < 2:
        return None
    drawn = np.random.default_rng(seed).integers(count, size=(NUM_RESAMPLES, count))
    low, high = np.quantile([statistic(one.tolist()) for one in drawn], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(low), float(high))
