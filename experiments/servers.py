"""An engine of this library as a server of a load."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from specdec.engine import Engine
from specdec.experiments.driving import Clock, Emission
from specdec.experiments.measurement import PHASES
from specdec.experiments.workload import LoadRequest
from specdec.live import Gauges, engine_gauges


class EngineServer:
    """Steps an engine; a step's tokens come when it ends."""

    def __init__(self, engine: Engine, clock: Clock) -> None:
        self.engine, self._clock = engine, clock

    @property
    def is_idle(self) -> bool:
        return self.engine.is_idle

    def submit(self, request: LoadRequest) -> None:
        self.engine.submit(request.prompt, request.params, index=request.index)

    def step(self, wait_s: float | None) -> list[Emission]:
        tokens = self.engine.step()
        now = self._clock.now()
        found = []
        for index, group in groupby(tokens, key=lambda token: token.index):
            same = list(group)
            found.append(Emission(index, [token.token_id for token in same], now, same[-1].result is not None))
        return found

    def gauges(self) -> Gauges:
        return engine_gauges(self.engine)

    def cost(self) -> dict[str, Any]:
        metrics, times = self.engine.metrics, self.engine.metrics.times
        return {
            "tau": metrics.tau,
            "acceptance_by_depth": metrics.acceptance_by_depth,
            "occupancy": metrics.occupancy,
            "num_steps": metrics.num_steps,
            "num_prompt_tokens": metrics.num_prompt_tokens,
            "num_prompt_tokens_computed": metrics.num_prefill_tokens,
            "num_prefix_tokens": metrics.num_prefix_tokens,
            "num_computed_tokens": metrics.num_computed_tokens,
            "prefix_hit_rate": metrics.num_prefix_tokens / metrics.num_prompt_tokens,
            "num_preemptions": metrics.num_preemptions,
            "pages_used": metrics.num_used_pages,
            **{f"{name}_share": getattr(times, phase) / times.total_s for name, phase in PHASES.items()},
        }

    def close(self) -> None:
        """Its pages go with the engine."""
