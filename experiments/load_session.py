"""Serving a sweep: contenders take turns at every point, measurements are kept, and progress is shown."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from specdec.experiments.arrivals import Arrivals, ClosedLoop, OpenLoop, poisson_times
from specdec.experiments.driving import Clock, Emission, Served, Server, TurnClock, drive, driven, finished
from specdec.experiments.load_contenders import LoadContender
from specdec.experiments.load_rows import LoadRun, Point
from specdec.experiments.resume import Measurements, digest
from specdec.experiments.workload import LoadRequest
from specdec.live import LiveState, LiveView, Meter

WARM_UP_TOKENS = 64


@dataclass
class Session:
    """The contenders of one load and the requests that each of them serves; `common` says what all have in common."""

    contenders: Mapping[str, LoadContender]
    requests: Seq[LoadRequest]
    raw: Measurements
    common: dict[str, Any]
    clock: Clock
    seed: int = 0
    duration_s: float | None = None
    _warm: set[str] = field(default_factory=set)

    def serve_all(self, points: Seq[Point], num_repeats: int, view: LiveView) -> dict[tuple[str, Point], list[LoadRun]]:
        """Every contender's runs at every point; what is known already is not served again. Those who take turns belong
        together: they are kept when all of them have ended, and are known only all of them and beside the same others."""
        by_turns = isinstance(self.clock, TurnClock)
        names = list(self.contenders)
        sent = digest([asdict(one) for one in self.requests], self.seed, sorted(names) if by_turns else [])
        runs: dict[tuple[str, Point], list[LoadRun]] = {(name, point): [] for point in points for name in names}
        whole = self.clock.whole if isinstance(self.clock, TurnClock) else self.clock
        progress = _Progress(len(runs) * num_repeats, whole)
        for number, point in enumerate(points):
            for repeat in range(num_repeats):
                # Nobody is always first, when the machine is cool, or always last.
                first = (number + repeat) % len(names)
                keys = {
                    name: digest(name, self.contenders[name].labels, asdict(point), repeat, sent, self.common)
                    for name in names[first:] + names[:first]
                }
                known = {name: found["run"] for name, key in keys.items() if (found := self.raw.get(key)) is not None}
                if by_turns and len(known) < len(names):
                    known = {}
                for name in known:
                    progress.ended(name, is_new=False)
                new = self._served([name for name in keys if name not in known], point, progress, view)
                for name, run in list(new) if by_turns else new:
                    known[name] = asdict(run)
                    self.raw.put(keys[name], name=name, load=point.label, repeat=repeat, run=known[name])
                    view.note(_line(name, point, repeat, run))
                    progress.ended(name, is_new=True)
                for name in names:
                    runs[name, point].append(LoadRun(**known[name]))
        return runs

    def _served(
        self, names: Seq[str], point: Point, progress: _Progress, view: LiveView
    ) -> Generator[tuple[str, LoadRun], None, None]:
        """The runs of these contenders, one after another, or all at once where the clock is one for turns: a step of whoever
        has used least time is next, so that whatever else the machine does meets all of them alike."""
        clock = self.clock
        if not isinstance(clock, TurnClock):
            for name in names:
                yield name, finished(self._serve(name, point, progress, view))
            return
        open_runs = {name: self._serve(name, point, progress, view) for name in names}
        begins: dict[str, float] = {}
        while open_runs:
            # Before its first step each sets up what it serves with: that is no part of the load.
            name = min(open_runs, key=lambda one: clock.spent(one) - begins[one] if one in begins else -1.0)
            clock.give(name)
            try:
                next(open_runs[name])
            except StopIteration as end:
                clock.give("")
                del open_runs[name]
                yield name, end.value
            else:
                # What is noted and shown between turns is nobody's time.
                clock.give("")
                begins.setdefault(name, clock.spent(name))

    def _serve(self, name: str, point: Point, progress: _Progress, view: LiveView) -> Generator[None, None, LoadRun]:
        contender = self.contenders[name]
        if name not in self._warm:
            self._warm_up(contender)
            self._warm.add(name)
        server = contender.serve()
        begin = self.clock.now()
        meter = Meter(lambda: self.clock.now() - begin)

        def watch(emissions: list[Emission], served: dict[int, Served]) -> None:
            for one in emissions:
                request = served[one.index]
                meter.count(one.index, len(one.token_ids), one.time_s - begin, one.is_last, request.arrival_s)
            progress.shares[name] = meter.num_ended / len(self.requests)
            view.show(lambda: self._state(f"{name}, {point.label}", server, meter, progress))

        try:
            served = yield from driven(server, self._arrivals(point), self.clock, watch)
            return LoadRun.of(served, server.cost())
        finally:
            server.close()

    def _warm_up(self, contender: LoadContender) -> None:
        """A few tokens that nobody counts, on a server that is thrown away, so that no measurement pays for first calls."""
        params = replace(self.requests[0].params, max_new_tokens=8, ignore_eos=True)
        begins = [replace(one, prompt=one.prompt[:WARM_UP_TOKENS], params=params) for one in self.requests[:2]]
        server = contender.serve()
        try:
            drive(server, ClosedLoop(begins, len(begins)), self.clock)
        finally:
            server.close()

    def _arrivals(self, point: Point) -> Arrivals:
        if point.kind == "concurrency":
            return ClosedLoop(self.requests, int(point.value), self.duration_s)
        times = poisson_times(point.value, len(self.requests), self.seed)
        return OpenLoop(self.requests, times, self.duration_s)

    def _state(self, title: str, server: Server, meter: Meter, progress: _Progress) -> LiveState:
        return LiveState(
            f"{title} ({progress.num_ended + 1} of {progress.total} loads)",
            meter.num_ended,
            len(self.requests),
            meter.tokens_per_s,
            meter.latency,
            server.gauges(),
            progress.eta_s(),
        )


@dataclass
class _Progress:
    """How far a sweep is, with `shares` of the loads under way done; the time to come is that of the loads served in this
    process, as if all took as long."""

    total: int
    clock: Clock
    num_ended: int = 0
    num_new: int = 0
    shares: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._begin = self.clock.now()

    def ended(self, name: str, is_new: bool) -> None:
        self.shares.pop(name, None)
        self.num_ended += 1
        self.num_new += is_new

    def eta_s(self) -> float | None:
        """None before anything is done."""
        share = sum(self.shares.values())
        done = self.num_new + share
        return (self.clock.now() - self._begin) / done * (self.total - self.num_ended - share) if done else None


def _line(name: str, point: Point, repeat: int, run: LoadRun) -> str:
    first, between = run.latencies["ttft_p50_s"], run.latencies["itl_p50_s"]
    waits = "" if first is None else f", TTFT {1000 * first:.0f} ms"
    waits += "" if between is None else f", ITL {1000 * between:.0f} ms"
    return f"{point.label}, {name}, repeat {repeat + 1}: {run.tokens_per_s:.1f} tokens/s{waits}"
