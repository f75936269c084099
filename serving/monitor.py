"""What a monitoring system reads: counts of the engine and of finished requests, in Prometheus' text form."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from specdec.async_engine import AsyncEngine
from specdec.latency import inter_token_gaps
from specdec.request import Result

# Seconds, from a small model on an accelerator to a long prompt on a processor; and tokens per forward.
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_TAU = (1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 12.0)


class Monitor:
    """The metrics of one server, in a registry of its own; their names begin with `specdec_`."""

    def __init__(self, front: AsyncEngine, versions: dict[str, str]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(front, versions))

        def histogram(name: str, text: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
            return Histogram(f"specdec_{name}", text, buckets=buckets, registry=self.registry)

        self._responses = Counter(
            "specdec_http_responses", "Responses by path and status", ("path", "status"), registry=self.registry
        )
        self._finished = Counter(
            "specdec_requests_finished", "Requests that ended by themselves", ("finish_reason",), registry=self.registry
        )
        drafted = Counter("specdec_drafted_tokens", "Drafted tokens of finished requests", registry=self.registry)
        accepted = Counter("specdec_accepted_tokens", "Those of them that were kept", registry=self.registry)
        self._drafted, self._accepted = drafted, accepted
        self._ttft = histogram("time_to_first_token_seconds", "From submission to the first token, waiting included")
        self._gap = histogram("inter_token_seconds", "Gap between emissions, spread over their tokens")
        self._total = histogram("request_seconds", "From submission to the last token")
        self._tau = histogram("tokens_per_forward", "Tokens per target forward of a request (tau)", _TAU)

    def finished(self, result: Result) -> None:
        """Counts a request that has ended."""
        metrics = result.metrics
        self._finished.labels(result.finish_reason).inc()
        self._ttft.observe(metrics.ttft_s)
        self._total.observe(metrics.total_s)
        self._tau.observe(metrics.tau)
        self._drafted.inc(metrics.num_drafted)
        self._accepted.inc(sum(metrics.accepted_by_depth))
        for gap in inter_token_gaps(metrics.emissions):
            self._gap.observe(gap)

    def counting(self, app: ASGIApp) -> ASGIApp:
        """The same application, its responses counted; paths of no route share a name, so that nobody invents new series."""

        async def counted(scope: Scope, receive: Receive, send: Send) -> None:
            async def watched(message: Message) -> None:
                if message["type"] == "http.response.start":
                    route = scope.get("route")
                    self._responses.labels(getattr(route, "path", "other"), str(message["status"])).inc()
                await send(message)

            await app(scope, receive, watched)

        return counted

    def text(self) -> bytes:
        """All metrics as they stand now."""
        return generate_latest(self.registry)


class _EngineCollector(Collector):
    """Reads the engine's own counts when asked, so that nothing is counted twice."""

    def __init__(self, front: AsyncEngine, versions: dict[str, str]) -> None:
        self._front, self._versions = front, versions

    def collect(self) -> Iterator[Metric]:
        front, metrics = self._front, self._front.metrics
        yield InfoMetricFamily("specdec", "Versions of what serves", self._versions)
        yield GaugeMetricFamily("specdec_up", "Whether requests are taken", int(front.state == "running"))
        yield GaugeMetricFamily("specdec_requests_open", "Submitted and not ended", front.num_open)
        yield GaugeMetricFamily("specdec_requests_running", "In the batch", len(front.engine.running))
        yield GaugeMetricFamily("specdec_requests_waiting", "In the engine's queue", len(front.engine.waiting))
        yield GaugeMetricFamily("specdec_batch_occupancy", "Mean share of the batch in use per step", metrics.occupancy)
        counts = {
            "steps": ("Steps, one target forward each", metrics.num_steps),
            "prompt_tokens": ("Prompt tokens of started requests", metrics.num_prompt_tokens),
            "prefix_tokens": ("Prompt tokens shared with another request", metrics.num_prefix_tokens),
            "prefill_tokens": ("Prompt tokens computed, after a preemption once more", metrics.num_prefill_tokens),
            "computed_tokens": ("Tokens that went through the target, trees included", metrics.num_computed_tokens),
            "output_tokens": ("Tokens emitted", metrics.num_output_tokens),
            "preemptions": ("Requests put back for want of pages", metrics.num_preemptions),
            "requests_cancelled": ("Requests that were cancelled in the engine", metrics.num_cancelled),
            "requests_failed": ("Requests whose step failed", metrics.num_failed),
        }
        for name, (text, value) in counts.items():
            yield CounterMetricFamily(f"specdec_{name}", text, value)
        trees = {
            "drafted_by_depth": ("Trees of ended requests that reached a depth", metrics.drafted_by_depth),
            "accepted_by_depth": ("Those of them whose accepted path did", metrics.accepted_by_depth),
        }
        for name, (text, by_depth) in trees.items():
            family = CounterMetricFamily(f"specdec_{name}", text, labels=("depth",))
            for depth, value in enumerate(by_depth, 1):
                family.add_metric((str(depth),), value)
            yield family
        times = metrics.times
        seconds = CounterMetricFamily("specdec_step_seconds", "Where steps spend their time", labels=("part",))
        for part in ("draft", "forward", "accept", "other"):
            seconds.add_metric((part,), getattr(times, f"{part}_s"))
        yield seconds
        pages = GaugeMetricFamily("specdec_pages", "Pages of the KV cache by use", labels=("use",))
        idle = metrics.num_idle_prefix_pages
        in_use = metrics.num_used_pages - idle
        for use, value in {"running": in_use, "prefix": idle, "free": metrics.num_pages - in_use - idle}.items():
            pages.add_metric((use,), value)
        yield pages
