"""What a generation cost and what its drafts were worth."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from itertools import zip_longest

from specdec.latency import inter_token_gaps, percentile


@dataclass
class RequestMetrics:
    """Counts and times of one request; times in seconds of `time.perf_counter`, from its submission on.

    A target forward counts where it emitted tokens of this request, so the forward that ends the prompt does and earlier
    prompt chunks do not. `drafted_by_depth[d]` counts the trees that reached depth d + 1, `accepted_by_depth[d]` those
    whose accepted path did. `num_prefix_tokens` came from shared pages when it was first run; `emissions` holds a time and a
    number of tokens per step that emitted some.
    """

    num_new_tokens: int = 0
    num_target_forwards: int = 0
    num_drafted: int = 0
    drafted_by_depth: list[int] = field(default_factory=list)
    accepted_by_depth: list[int] = field(default_factory=list)
    num_prefix_tokens: int = 0
    num_preemptions: int = 0
    submit_s: float = 0.0
    end_s: float = 0.0
    emissions: list[tuple[float, int]] = field(default_factory=list)

    @property
    def tau(self) -> float:
        """Mean tokens emitted per target forward, the extra token included."""
        return self.num_new_tokens / max(self.num_target_forwards, 1)

    @property
    def start_s(self) -> float:
        """When it was submitted: waiting for its turn counts."""
        return self.submit_s

    @property
    def first_token_s(self) -> float:
        return self.emissions[0][0] if self.emissions else 0.0

    @property
    def ttft_s(self) -> float:
        """Time to first token, the wait before it included; 0 where there was none."""
        return self.first_token_s - self.submit_s if self.emissions else 0.0

    @property
    def total_s(self) -> float:
        return self.end_s - self.submit_s

    @property
    def tokens_per_s(self) -> float:
        """New tokens per second, the prompt's forward included."""
        return self.num_new_tokens / self.total_s if self.total_s > 0 else 0.0

    @property
    def itl_p50_s(self) -> float | None:
        """Median time between tokens, those of one step sharing the time before it; None where only one step emitted any."""
        return self._gap_s(50)

    @property
    def itl_p95_s(self) -> float | None:
        return self._gap_s(95)

    @property
    def itl_p99_s(self) -> float | None:
        return self._gap_s(99)

    @property
    def acceptance_by_depth(self) -> list[float]:
        """See `acceptance`."""
        return acceptance(self.accepted_by_depth, self.drafted_by_depth)

    def count_tree(self, depth: int, accepted: int, num_nodes: int) -> None:
        """One verified tree of `num_nodes` nodes that reached `depth`, `accepted` drafted tokens of it kept."""
        self.num_target_forwards += 1
        self.num_drafted += num_nodes - 1
        for counts, reached in ((self.drafted_by_depth, depth), (self.accepted_by_depth, accepted)):
            counts += [0] * (depth - len(counts))
            for d in range(reached):
                counts[d] += 1

    def _gap_s(self, percent: float) -> float | None:
        gaps = inter_token_gaps(self.emissions)
        return percentile(gaps, percent) if gaps else None


@dataclass
class StepTimes:
    """Where the steps of an engine went, in seconds: drafting, the target's forward, acceptance, everything else."""

    draft_s: float = 0.0
    forward_s: float = 0.0
    accept_s: float = 0.0
    other_s: float = 0.0
    num_steps: int = 0

    @property
    def total_s(self) -> float:
        return self.draft_s + self.forward_s + self.accept_s + self.other_s

    @property
    def overhead(self) -> float:
        """Share of the step outside the target's forward."""
        return 1 - self.forward_s / self.total_s if self.total_s > 0 else 0.0


@dataclass
class EngineMetrics:
    """What an engine has done since it was made.

    `num_prompt_tokens` counts each prompt once, when it is first run, and `num_prefix_tokens` the positions of it that came
    from shared pages then; `num_prefill_tokens` are those computed in prompt chunks, after a preemption once more;
    `num_computed_tokens` are all tokens that went through the target, trees included. Pages as they stand: in all, held by
    anybody, held by the prefix cache, and of these the ones that nobody uses. Trees by depth, and the tokens and forwards of
    `tau`, are those of requests that have ended, in whatever way.
    """

    max_batch_size: int
    num_requests: int = 0
    num_finished: int = 0
    num_cancelled: int = 0
    num_failed: int = 0
    num_steps: int = 0
    num_sequence_steps: int = 0
    num_prompt_tokens: int = 0
    num_prefix_tokens: int = 0
    num_prefill_tokens: int = 0
    num_computed_tokens: int = 0
    num_output_tokens: int = 0
    num_preemptions: int = 0
    num_pages: int = 0
    num_used_pages: int = 0
    num_prefix_pages: int = 0
    num_idle_prefix_pages: int = 0
    drafted_by_depth: list[int] = field(default_factory=list)
    accepted_by_depth: list[int] = field(default_factory=list)
    num_ended_tokens: int = 0
    num_ended_forwards: int = 0
    times: StepTimes = field(default_factory=StepTimes)

    @property
    def occupancy(self) -> float:
        """Mean share of the `max_batch_size` places that were taken in a step."""
        return self.num_sequence_steps / (self.num_steps * self.max_batch_size) if self.num_steps else 0.0

    @property
    def acceptance_by_depth(self) -> list[float]:
        """See `acceptance`."""
        return acceptance(self.accepted_by_depth, self.drafted_by_depth)

    @property
    def tau(self) -> float | None:
        """Mean tokens per target forward of the requests that have ended; None before one has."""
        return self.num_ended_tokens / self.num_ended_forwards if self.num_ended_forwards else None

    def count_ended(self, request: RequestMetrics) -> None:
        """Takes in the trees, tokens and forwards of a request that has ended."""
        self.num_ended_tokens += request.num_new_tokens
        self.num_ended_forwards += request.num_target_forwards
        # New lists, since other threads may be reading the old ones.
        self.drafted_by_depth = added(self.drafted_by_depth, request.drafted_by_depth)
        self.accepted_by_depth = added(self.accepted_by_depth, request.accepted_by_depth)


def added(counts: Seq[int], others: Seq[int]) -> list[int]:
    """Depth by depth; what is not there counts as 0."""
    return [one + other for one, other in zip_longest(counts, others, fillvalue=0)]


def acceptance(accepted_by_depth: Seq[int], drafted_by_depth: Seq[int]) -> list[float]:
    """Per depth, from 1 on, the share of the trees that reached it whose accepted path did."""
    # While an engine counts a request in another thread, one list may be longer than the other already.
    pairs = zip(accepted_by_depth, drafted_by_depth, strict=False)
    return [accepted / drafted for accepted, drafted in pairs]
