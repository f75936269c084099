"""Drives whatever serves requests with a load, and notes what each user saw."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from specdec.experiments.arrivals import Arrivals
from specdec.experiments.workload import LoadRequest
from specdec.live import Gauges

T = TypeVar("T")


class Clock(Protocol):
    """Seconds that only differences of mean something."""

    def now(self) -> float: ...

    def wait(self, seconds: float) -> None: ...


class WallClock:
    """The clock that engines and requests read, too."""

    def now(self) -> float:
        return time.perf_counter()

    def wait(self, seconds: float) -> None:
        time.sleep(seconds)


class TurnClock:
    """Tells each of several who take turns the seconds of `whole` that were its own; for those who wait it stands still."""

    def __init__(self, whole: Clock) -> None:
        self.whole = whole
        self._spent: dict[str, float] = {}
        self._who, self._since = "", whole.now()

    def give(self, who: str) -> None:
        """From now on it is this one's turn."""
        self._spent[self._who] = self.now()
        self._who, self._since = who, self.whole.now()

    def spent(self, who: str) -> float:
        """Seconds of this one's turns that are over."""
        return self._spent.get(who, 0.0)

    def now(self) -> float:
        return self.spent(self._who) + self.whole.now() - self._since

    def wait(self, seconds: float) -> None:
        self.whole.wait(seconds)


@dataclass(frozen=True)
class Emission:
    """Tokens of request `index` that came at once, at `time_s` of the clock."""

    index: int
    token_ids: list[int]
    time_s: float
    is_last: bool


class Server(Protocol):
    """Takes requests at any time and answers them."""

    @property
    def is_idle(self) -> bool:
        """Nothing waits, nothing runs."""
        ...

    def submit(self, request: LoadRequest) -> None: ...

    def step(self, wait_s: float | None) -> list[Emission]:
        """Works on, or waits, until tokens may have come; where it only waits, no longer than `wait_s`."""
        ...

    def cost(self) -> dict[str, Any]:
        """What serving has cost so far, in fields of a result row."""
        ...

    def gauges(self) -> Gauges: ...

    def close(self) -> None: ...


@dataclass
class Served:
    """A request as its user saw it: when it was sent and when how many tokens came, in seconds since the load began."""

    index: int
    arrival_s: float
    emissions: list[tuple[float, int]] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)

    @property
    def ttft_s(self) -> float:
        """Time to first token, waiting included."""
        return self.emissions[0][0] - self.arrival_s


def finished(steps: Generator[None, None, T]) -> T:
    """What comes of the steps when all are taken."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: T = end.value
            return result


def drive(
    server: Server,
    arrivals: Arrivals,
    clock: Clock,
    on_step: Callable[[list[Emission], dict[int, Served]], None] = lambda emissions, served: None,
) -> list[Served]:
    """Sends every request when it comes and works until all are answered; in the order of arrival.

    A request counts from when its user sends it, not from when the server, busy with a step, looks at it. `on_step` sees
    each step's emissions and all requests so far.
    """
    return finished(driven(server, arrivals, clock, on_step))


def driven(
    server: Server,
    arrivals: Arrivals,
    clock: Clock,
    on_step: Callable[[list[Emission], dict[int, Served]], None] = lambda emissions, served: None,
) -> Generator[None, None, list[Served]]:
    """`drive`, step by step: it yields after each, and returns the requests."""
    begin = clock.now()
    waited_for = 0.0
    served: dict[int, Served] = {}
    while True:
        # Sums of seconds round: what has been waited for is due even where the clock falls short of it by a hair.
        for request, arrival_s in arrivals.due(max(clock.now() - begin, waited_for)):
            served[request.index] = Served(request.index, arrival_s)
            server.submit(request)
        next_s = arrivals.next_s()
        wait_s = None if next_s is None else max(0.0, next_s - (clock.now() - begin))
        if server.is_idle:
            if next_s is None or wait_s is None:
                return list(served.values())
            clock.wait(wait_s)
            waited_for = next_s
            continue
        emissions = server.step(wait_s)
        for one in emissions:
            served[one.index].token_ids += one.token_ids
            served[one.index].emissions.append((one.time_s - begin, len(one.token_ids)))
            if one.is_last:
                arrivals.ended(one.time_s - begin)
        on_step(emissions, served)
        yield
