"""What a server shows of itself while it serves."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from threading import Lock

from specdec.async_engine import AsyncEngine
from specdec.live import LiveState, LiveView, Meter, engine_gauges
from specdec.request import Token


class ServerView:
    """Shows a server on `view`: on a terminal all the time, elsewhere as long as it does anything."""

    def __init__(self, title: str, view: LiveView) -> None:
        self._title, self._view, self._num_shown = title, view, 0
        # The engine's thread counts what the event loop's shows.
        self._lock, self._meter = Lock(), Meter()

    def emitted(self, tokens: Seq[Token]) -> None:
        """Counts what a step emitted, just now; for `AsyncEngine`'s `watch`."""
        with self._lock:
            self._meter.emitted(tokens)

    def show(self, front: AsyncEngine) -> None:
        """Shows how it goes, if it is time."""
        num_steps = front.metrics.num_steps

        def state() -> LiveState:
            self._num_shown = num_steps
            gauges = engine_gauges(front.engine)
            with self._lock:
                meter = self._meter
                return LiveState(self._title, meter.num_ended, None, meter.tokens_per_s, meter.latency, gauges)

        if self._view.is_terminal or num_steps != self._num_shown:
            self._view.show(state)
