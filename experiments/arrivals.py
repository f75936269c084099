"""When requests come: at their own times, or one for every one that ends."""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Sequence as Seq
from typing import Protocol

from specdec.experiments.resume import digest
from specdec.experiments.workload import LoadRequest


class Arrivals(Protocol):
    """Requests and their times of arrival, in seconds since the load began."""

    def due(self, now_s: float) -> list[tuple[LoadRequest, float]]:
        """Those that have come by now and were not asked for before, first come first, each with its time."""
        ...

    def next_s(self) -> float | None:
        """When the next one comes; None where none will, or only when another ends."""
        ...

    def ended(self, time_s: float) -> None:
        """A request has been answered in full."""
        ...


class OpenLoop:
    """Users who do not wait for each other: request i comes at `times_s[i]`, those before `duration_s` only."""

    def __init__(self, requests: Seq[LoadRequest], times_s: Seq[float], duration_s: float | None = None) -> None:
        end = math.inf if duration_s is None else duration_s
        pairs = sorted(zip(requests, times_s, strict=True), key=lambda pair: pair[1])
        self._coming = deque(pair for pair in pairs if pair[1] < end)

    def due(self, now_s: float) -> list[tuple[LoadRequest, float]]:
        found = []
        while self._coming and self._coming[0][1] <= now_s:
            found.append(self._coming.popleft())
        return found

    def next_s(self) -> float | None:
        return self._coming[0][1] if self._coming else None

    def ended(self, time_s: float) -> None:
        """Nobody waits for it."""


class ClosedLoop:
    """`concurrency` users, each of whom sends the next request when the last one is answered, before `duration_s` only."""

    def __init__(self, requests: Seq[LoadRequest], concurrency: int, duration_s: float | None = None) -> None:
        if concurrency < 1:
            raise ValueError(f"concurrency={concurrency} must be >= 1")
        self._left = deque(requests)
        self._end = math.inf if duration_s is None else duration_s
        self._idle = [0.0] * concurrency

    def due(self, now_s: float) -> list[tuple[LoadRequest, float]]:
        found = []
        while self.next_s() is not None and self._idle[0] <= now_s:
            found.append((self._left.popleft(), heapq.heappop(self._idle)))
        return found

    def next_s(self) -> float | None:
        return self._idle[0] if self._left and self._idle and self._idle[0] < self._end else None

    def ended(self, time_s: float) -> None:
        heapq.heappush(self._idle, time_s)


def poisson_times(rate: float, count: int, seed: int) -> list[float]:
    """The first `count` arrivals of a Poisson process of `rate` per second.

    The same seed gives the same arrivals at every rate, only faster or slower, so that a sweep over rates varies nothing
    else. Raises ValueError for a rate that is not positive.
    """
    if not 0 < rate < math.inf:
        raise ValueError(f"rate={rate} must be > 0 requests per second")
    chance = random.Random(digest(seed, "arrivals"))
    return [time / rate for time in itertools.accumulate(chance.expovariate(1.0) for _ in range(count))]
