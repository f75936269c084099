"""A live view of something that serves requests: a panel on a terminal, log lines elsewhere."""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from itertools import groupby
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.table import Table

from specdec.latency import Latency, inter_token_gaps, of_times

if TYPE_CHECKING:
    from specdec.engine import Engine
    from specdec.request import Token


@dataclass(frozen=True)
class Gauges:
    """What a server says of itself; None where it does not know. `shares` are the parts of its time, by name."""

    running: int | None = None
    waiting: int | None = None
    occupancy: float | None = None
    pages_used: int | None = None
    pages_of_prefixes: int | None = None
    pages_total: int | None = None
    prefix_hit_rate: float | None = None
    preemptions: int | None = None
    tau: float | None = None
    shares: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class LiveState:
    """One look at a run: what is done of how much, the latest tokens per second and latencies, and the gauges."""

    title: str
    done: int
    total: int | None
    tokens_per_s: float
    latency: Latency
    gauges: Gauges
    eta_s: float | None = None

    def cells(self) -> dict[str, str]:
        """What is known, by name, as text."""
        gauges, waits = self.gauges, self.latency
        found = {
            "requests": f"{self.done}" if self.total is None else f"{self.done}/{self.total}",
            "running": _number(gauges.running),
            "waiting": _number(gauges.waiting),
            "tokens/s": f"{self.tokens_per_s:.1f}",
            "occupancy": _percent(gauges.occupancy),
            "pages": _pages(gauges),
            "prefix hits": _percent(gauges.prefix_hit_rate),
            "preemptions": _number(gauges.preemptions),
            "tau": "" if gauges.tau is None else f"{gauges.tau:.2f}",
            "TTFT p50/p95": _times(waits.ttft_p50_s, waits.ttft_p95_s),
            "ITL p50/p95/p99": _times(waits.itl_p50_s, waits.itl_p95_s, waits.itl_p99_s),
            "time": ", ".join(f"{name} {_percent(share)}" for name, share in gauges.shares.items()),
            "ETA": "" if self.eta_s is None else duration(self.eta_s),
        }
        return {name: text for name, text in found.items() if text}


class Meter:
    """Counts tokens as they come, over all requests; speeds are of the last `window_s` seconds, latencies of the last
    `num_kept` requests and gaps, so that a run of days stays cheap. Times are seconds of one clock."""

    def __init__(
        self, clock: Callable[[], float] = time.perf_counter, window_s: float = 10.0, num_kept: int = 2048
    ) -> None:
        self.num_ended = 0
        self._clock, self._window_s, self._begin = clock, window_s, clock()
        # The last token's time; the request that has waited longest for its next one comes first.
        self._last: OrderedDict[int, float] = OrderedDict()
        self._num_kept = num_kept
        self._recent: deque[tuple[float, int]] = deque()
        self._ttft: deque[float] = deque(maxlen=num_kept)
        self._gaps: deque[float] = deque(maxlen=num_kept)

    def count(self, request: int, num_tokens: int, time_s: float, is_last: bool, sent_s: float | None = None) -> None:
        """A request's tokens came together at `time_s`; its first ones tell how long it waited, where `sent_s` is known."""
        before = self._last.pop(request, None)
        if before is not None:
            self._gaps.extend(inter_token_gaps([(before, 1), (time_s, num_tokens)]))
        elif sent_s is not None:
            self._ttft.append(time_s - sent_s)
        self._recent.append((time_s, num_tokens))
        if is_last:
            self.num_ended += 1
            return
        self._last[request] = time_s
        # Nobody tells which ones were cancelled, but they wait longest.
        if len(self._last) > self._num_kept:
            self._last.popitem(last=False)

    def emitted(self, tokens: Seq[Token]) -> None:
        """What a step of an engine emitted, just now."""
        now = self._clock()
        for id, group in groupby(tokens, key=lambda token: token.id):
            same = list(group)
            result = same[-1].result
            self.count(id, len(same), now, result is not None)
            if result is not None:
                self._ttft.append(result.metrics.ttft_s)

    @property
    def tokens_per_s(self) -> float:
        now = self._clock()
        since = max(self._begin, now - self._window_s)
        while self._recent and self._recent[0][0] < since:
            self._recent.popleft()
        return sum(count for _, count in self._recent) / (now - since) if now > since else 0.0

    @property
    def latency(self) -> Latency:
        return of_times(self._ttft, self._gaps)


def engine_gauges(engine: Engine) -> Gauges:
    """What an engine says of itself."""
    metrics, times = engine.metrics, engine.metrics.times
    parts = {"draft": times.draft_s, "verify": times.forward_s, "accept": times.accept_s, "other": times.other_s}
    return Gauges(
        running=len(engine.running),
        waiting=len(engine.waiting),
        occupancy=metrics.occupancy,
        pages_used=metrics.num_used_pages,
        pages_of_prefixes=metrics.num_idle_prefix_pages,
        pages_total=metrics.num_pages,
        prefix_hit_rate=metrics.num_prefix_tokens / max(metrics.num_prompt_tokens, 1),
        preemptions=metrics.num_preemptions,
        tau=metrics.tau,
        shares={name: seconds / times.total_s for name, seconds in parts.items()} if times.total_s else {},
    )


class LiveView:
    """Shows the latest state: on a terminal a panel that is drawn anew `per_s` times a second, elsewhere a line every
    `log_every_s` seconds and one at the end. A context manager; a state is only made when it is to be shown."""

    def __init__(
        self,
        console: Console | None = None,
        clock: Callable[[], float] = time.perf_counter,
        per_s: float = 4.0,
        log_every_s: float = 30.0,
    ) -> None:
        self._console = Console(stderr=True, markup=False, highlight=False) if console is None else console
        is_terminal = self._console.is_terminal
        self._clock, self._every_s = clock, 1 / per_s if is_terminal else log_every_s
        self._next_s = clock() + (0.0 if is_terminal else log_every_s)
        self._live = Live(console=self._console, auto_refresh=False, transient=True) if is_terminal else None

    def __enter__(self) -> LiveView:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    @property
    def is_terminal(self) -> bool:
        return self._live is not None

    def show(self, state: Callable[[], LiveState], now: bool = False) -> None:
        """Shows what `state` says, if it is time or `now`."""
        if not now and self._clock() < self._next_s:
            return
        self._next_s = self._clock() + self._every_s
        one = state()
        if self._live is not None:
            self._live.update(panel(one), refresh=True)
        else:
            self._console.print(line(one), soft_wrap=True)

    def note(self, text: str) -> None:
        """A line that stays, above the panel on a terminal."""
        self._console.print(text, soft_wrap=True)


def panel(state: LiveState) -> Table:
    """The state as a table of two columns."""
    table = Table(title=state.title, title_justify="left", show_header=False)
    for name, text in state.cells().items():
        table.add_row(name, text)
    return table


def line(state: LiveState) -> str:
    """The state on one line."""
    return f"{state.title}: " + ", ".join(f"{name} {text}" for name, text in state.cells().items())


def duration(seconds: float) -> str:
    """`1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def _number(value: int | None) -> str:
    return "" if value is None else str(value)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def _times(*seconds: float | None) -> str:
    known = [f"{1000 * one:.0f}" for one in seconds if one is not None]
    return f"{'/'.join(known)} ms" if known else ""


def _pages(gauges: Gauges) -> str:
    if gauges.pages_used is None:
        return ""
    text = f"{gauges.pages_used}/{gauges.pages_total}"
    return f"{text} ({gauges.pages_of_prefixes} of prefixes)" if gauges.pages_of_prefixes else text
