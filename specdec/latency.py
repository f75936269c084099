"""How long users wait: time to first token, gaps between tokens, and their percentiles over many requests."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol


class Timed(Protocol):
    """A request of which it is known when tokens came: `emissions` are times and numbers of tokens, as a step emits them."""

    @property
    def ttft_s(self) -> float: ...

    @property
    def emissions(self) -> Seq[tuple[float, int]]: ...


@dataclass(frozen=True)
class Latency:
    """Percentiles in seconds: of the time to first token over requests, of the time between tokens over tokens.

    None where nothing was emitted, or no second token.
    """

    ttft_p50_s: float | None
    ttft_p95_s: float | None
    itl_p50_s: float | None
    itl_p95_s: float | None
    itl_p99_s: float | None


def latency(requests: Iterable[Timed]) -> Latency:
    """Of all requests together; one that has no token yet does not count."""
    begun = [one for one in requests if one.emissions]
    return of_times([one.ttft_s for one in begun], [gap for one in begun for gap in inter_token_gaps(one.emissions)])


def of_times(ttft_s: Seq[float], gaps_s: Seq[float]) -> Latency:
    """From times to first token, one per request, and gaps, one per later token."""
    first = [percentile(ttft_s, percent) if ttft_s else None for percent in (50, 95)]
    between = [percentile(gaps_s, percent) if gaps_s else None for percent in (50, 95, 99)]
    return Latency(*first, *between)


def inter_token_gaps(emissions: Seq[tuple[float, int]]) -> list[float]:
    """The time between tokens as a reader sees it: n tokens that come t seconds after the last ones count as n gaps of t / n.

    A step that accepts drafts emits several tokens at once; spread like this, gaps still sum up to the time from the first
    emission to the last, and tokens are counted, not steps. The first emission has no gap before it. Raises ValueError where
    time runs backwards.
    """
    gaps: list[float] = []
    for (before, _), (after, count) in itertools.pairwise(emissions):
        if after < before:
            raise ValueError(f"a token at {after} s follows one at {before} s: times must not run backwards")
        gaps += [(after - before) / count] * count
    return gaps


def percentile(values: Seq[float], percent: float) -> float:
    """Interpolated between the two nearest values: rank `percent` / 100 * (n - 1) of the sorted values, from 0.

    (Hyndman and Fan 1996, "Sample quantiles in statistical packages", definition 7.) Raises ValueError for no values or a
    percentage outside [0, 100].
    """
    if not values or not 0 <= percent <= 100:
        raise ValueError(f"percentile {percent} of {len(values)} values: give at least one value, and 0 to 100")
    ordered = sorted(values)
    rank = percent / 100 * (len(ordered) - 1)
    below = math.floor(rank)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (rank - below)
