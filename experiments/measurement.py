"""What a run of one system cost, summed over its prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace

from specdec.engine import Engine
from specdec.metrics import StepTimes, acceptance, added
from specdec.request import Result, Token, encode
from specdec.sampling import SamplingParams

PHASES = {"draft": "draft_s", "verify": "forward_s", "accept": "accept_s", "other": "other_s"}


@dataclass
class Measurement:
    """Sums over prompts; times in seconds. `seconds` is the wall time of decoding, prompts included."""

    num_prompts: int = 0
    num_tokens: int = 0
    num_target_forwards: int = 0
    num_drafted: int = 0
    seconds: float = 0.0
    ttft_s: float = 0.0
    drafted_by_depth: list[int] = field(default_factory=list)
    accepted_by_depth: list[int] = field(default_factory=list)
    phases: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))

    @property
    def tau(self) -> float:
        """Tokens per target forward, the extra token included."""
        return self.num_tokens / max(self.num_target_forwards, 1)

    @property
    def mean_nodes(self) -> float:
        """Drafted nodes verified per target forward of a prompt, the root not counted."""
        return self.num_drafted / max(self.num_target_forwards, 1)

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.seconds if self.seconds > 0 else 0.0

    @property
    def mean_ttft_s(self) -> float:
        """Mean time to first token."""
        return self.ttft_s / max(self.num_prompts, 1)

    @property
    def shares(self) -> dict[str, float]:
        """The part of the steps' time that each phase took."""
        total = sum(self.phases.values())
        return {name: seconds / total if total > 0 else 0.0 for name, seconds in self.phases.items()}

    @property
    def acceptance(self) -> list[float]:
        """Per depth, the share of the trees that reached it whose accepted path did."""
        return acceptance(self.accepted_by_depth, self.drafted_by_depth)

    def add(self, results: Sequence[Result], times: StepTimes) -> None:
        """Takes in prompts that were decoded together, and the time their steps took."""
        for result in results:
            metrics = result.metrics
            self.num_prompts += 1
            self.num_tokens += metrics.num_new_tokens
            self.num_target_forwards += metrics.num_target_forwards
            self.num_drafted += metrics.num_drafted
            self.ttft_s += metrics.ttft_s
            self.drafted_by_depth = added(self.drafted_by_depth, metrics.drafted_by_depth)
            self.accepted_by_depth = added(self.accepted_by_depth, metrics.accepted_by_depth)
        self.seconds += max(r.metrics.end_s for r in results) - min(r.metrics.start_s for r in results)
        for name, phase in PHASES.items():
            self.phases[name] += getattr(times, phase)


def decode(
    engine: Engine,
    prompts: Sequence[str] | Sequence[list[int]],
    params: Sequence[SamplingParams],
    chat: bool,
    measurement: Measurement,
    on_token: Callable[[Token], None] = lambda token: None,
) -> list[Result]:
    """Results in the order of the prompts, added to `measurement`; `on_token` sees every token as it becomes final."""
    before = replace(engine.times)
    results = []
    for token in engine.stream(prompts, params, chat=chat):
        on_token(token)
        if token.result is not None:
            results.append(token.result)
    spent = {one.name: getattr(engine.times, one.name) - getattr(before, one.name) for one in fields(StepTimes)}
    measurement.add(results, StepTimes(**spent))
    return sorted(results, key=lambda result: result.index)


def warm_up(engine: Engine, prompt: str | list[int], chat: bool) -> None:
    """A few tokens behind the beginning of the prompt that nobody counts, so that no measurement pays for first calls.

    The pages that it leaves for others are dropped, or the measured prompt would find itself computed.
    """
    token_ids = encode(engine.target, prompt, chat)[:64]
    engine.generate([token_ids], SamplingParams(max_new_tokens=16, ignore_eos=True, seed=0))
    engine.prefixes.evict(engine.prefixes.num_idle)
