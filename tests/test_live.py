"""The live view: what is counted, when it is shown, what it looks like."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from specdec import Engine, PagedModel, SamplingParams
from specdec.latency import Latency
from specdec.live import Gauges, LiveState, LiveView, Meter, duration, line, panel
from specdec.serving import ServerView
from specdec.verifiers import Follow, Verifier

LATENCY = Latency(0.1, 0.25, 0.02, 0.03, 0.04)
FULL = LiveState(
    "fixed, rate 2",
    3,
    10,
    81.24,
    LATENCY,
    Gauges(4, 2, 0.5, 30, 12, 64, 0.25, 1, 2.345, {"draft": 0.1, "verify": 0.9}),
    3723.4,
)
TEXT = (
    "fixed, rate 2: requests 3/10, running 4, waiting 2, tokens/s 81.2, occupancy 50%, pages 30/64 (12 of prefixes), "
    "prefix hits 25%, preemptions 1, tau 2.35, TTFT p50/p95 100/250 ms, ITL p50/p95/p99 20/30/40 ms, "
    "time draft 10%, verify 90%, ETA 1:02:03"
)


class Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def test_a_line_says_what_is_known_and_nothing_else() -> None:
    assert line(FULL) == TEXT
    empty = LiveState("begin", 0, None, 0.0, Latency(None, None, None, None, None), Gauges())
    assert line(empty) == "begin: requests 0, tokens/s 0.0"
    assert duration(59.6) == "0:01:00"


def test_a_panel_names_every_value() -> None:
    out = io.StringIO()
    Console(file=out, width=100).print(panel(FULL))
    for name, text in FULL.cells().items():
        assert name in out.getvalue() and text in out.getvalue()


def test_a_file_gets_a_line_now_and_then() -> None:
    out, clock, made = io.StringIO(), Clock(), []

    def state() -> LiveState:
        made.append(clock.seconds)
        return FULL

    with LiveView(Console(file=out, width=40), clock, log_every_s=30) as view:
        for seconds in range(0, 100, 7):
            clock.seconds = float(seconds)
            view.show(state)
        view.note("done")
        view.show(state, now=True)
    # Nothing is made that is not shown, and no line is wrapped.
    assert made == [35.0, 70.0, 98.0]
    assert out.getvalue() == f"{TEXT}\n{TEXT}\ndone\n{TEXT}\n"


def test_a_terminal_gets_a_panel_at_once() -> None:
    out, clock = io.StringIO(), Clock()
    with LiveView(Console(file=out, width=100, force_terminal=True), clock, per_s=2) as view:
        made = [view.show(lambda: FULL) for clock.seconds in (0.0, 0.1, 0.6)]
        view.note("a line that stays")
    assert (
        len(made) == 3 and view.is_terminal and "tokens/s" in out.getvalue() and "a line that stays" in out.getvalue()
    )


def test_a_meter_looks_back_a_window_and_spreads_tokens() -> None:
    clock = Clock()
    meter = Meter(clock, window_s=10, num_kept=4)
    assert meter.tokens_per_s == 0 and meter.latency == Latency(None, None, None, None, None)
    meter.count(1, 1, 2.0, False, sent_s=0.5)
    meter.count(1, 4, 4.0, True)
    meter.count(2, 1, 4.0, True)
    clock.seconds = 5.0
    assert meter.tokens_per_s == pytest.approx(6 / 5) and meter.num_ended == 2
    assert meter.latency == Latency(1.5, 1.5, 0.5, 0.5, 0.5)
    clock.seconds = 13.0
    assert meter.tokens_per_s == pytest.approx(5 / 10)
    # Request numbers may come again once they have ended.
    meter.count(1, 1, 13.0, False, sent_s=12.0)
    assert meter.latency.ttft_p50_s == pytest.approx(1.25)


def test_a_meter_forgets_requests_that_were_cancelled() -> None:
    meter = Meter(Clock(), num_kept=4)
    meter.count(0, 1, 0.0, False)
    for cancelled in range(1, 100):
        meter.count(cancelled, 1, cancelled - 0.5, False)
        # One runs on, and its gaps are the only ones.
        meter.count(0, 1, float(cancelled), False)
        assert len(meter._last) <= 4
    assert meter.latency == Latency(None, None, 1.0, 1.0, 1.0)


def test_a_meter_takes_what_a_step_emits() -> None:
    clock = Clock()
    meter = Meter(clock)
    clock.seconds = 1.0
    meter.emitted([SimpleNamespace(id=0, result=None), SimpleNamespace(id=7, result=None)])
    clock.seconds = 2.0
    last = SimpleNamespace(metrics=SimpleNamespace(ttft_s=0.75))
    meter.emitted([SimpleNamespace(id=0, result=None), SimpleNamespace(id=0, result=last)])
    assert (meter.num_ended, meter.tokens_per_s) == (1, 2.0)
    assert meter.latency == Latency(0.75, 0.75, 0.5, 0.5, 0.5)


def test_a_servers_log_is_silent_while_nothing_is_done(tiny) -> None:
    out, clock = io.StringIO(), Clock()
    engine = Engine(Verifier(PagedModel(tiny(), name="tiny"), Follow()), max_batch_size=2)
    front = SimpleNamespace(engine=engine, metrics=engine.metrics)
    with LiveView(Console(file=out, width=40), clock, log_every_s=30) as live:
        view = ServerView("tiny", live)
        for clock.seconds in (20.0, 31.0, 90.0):
            view.show(front)
        assert out.getvalue() == ""
        for token in engine.stream([[1, 2, 3]], SamplingParams(temperature=0, max_new_tokens=4, ignore_eos=True)):
            view.emitted([token])
        front.metrics = engine.metrics
        for clock.seconds in (100.0, 140.0, 180.0):
            view.show(front)
    (shown,) = out.getvalue().splitlines()
    assert shown.startswith("tiny: requests 1, running 0, waiting 0, tokens/s ") and "tau 1.00" in shown
