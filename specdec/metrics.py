"""What a generation cost and what its drafts were worth."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class RequestMetrics:
    """Counts and times of one request; times in seconds of `time.perf_counter`.

    A target forward counts where it emitted tokens of this request, so the forward that ends the prompt does and earlier
    prompt chunks do not. `drafted_by_depth[d]` counts the trees that reached depth d + 1, `accepted_by_depth[d]` those
    whose accepted path did.
    """

    num_new_tokens: int = 0
    num_target_forwards: int = 0
    num_drafted: int = 0
    drafted_by_depth: list[int] = field(default_factory=list)
    accepted_by_depth: list[int] = field(default_factory=list)
    start_s: float = 0.0
    first_token_s: float = 0.0
    end_s: float = 0.0

    @property
    def tau(self) -> float:
        """Mean tokens emitted per target forward, the extra token included."""
        return self.num_new_tokens / max(self.num_target_forwards, 1)

    @property
    def ttft_s(self) -> float:
        """Time to first token."""
        return self.first_token_s - self.start_s

    @property
    def total_s(self) -> float:
        return self.end_s - self.start_s

    @property
    def tokens_per_s(self) -> float:
        """New tokens per second, the prompt's forward included."""
        return self.num_new_tokens / self.total_s if self.total_s > 0 else 0.0

    def count_tree(self, depth: int, accepted: int, num_nodes: int) -> None:
        """One verified tree of `num_nodes` nodes that reached `depth`, `accepted` drafted tokens of it kept."""
        self.num_target_forwards += 1
        self.num_drafted += num_nodes - 1
        for counts, reached in ((self.drafted_by_depth, depth), (self.accepted_by_depth, accepted)):
            counts += [0] * (depth - len(counts))
            for d in range(reached):
                counts[d] += 1


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
