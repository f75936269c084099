"""One request and its state while it is generated."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from specdec.pages import PageTable
from specdec.sampling import BatchSampling, SamplingParams


@dataclass(eq=False)
class Sequence:
    """A request: prompt and output tokens, its pages, and how far the target has computed.

    The last token is the root: final, not yet through the target. Positions 0..`num_computed`-1 have keys and values.
    `round` counts trees verified; `max_tokens` bounds prompt and output together.
    """

    id: int
    token_ids: list[int]
    params: SamplingParams
    seed: int
    table: PageTable
    max_tokens: int
    max_positions: int | None = None
    prompt_len: int = field(init=False)
    num_computed: int = 0
    round: int = 0
    finish_reason: str | None = None

    def __post_init__(self) -> None:
        self.prompt_len = len(self.token_ids)

    @property
    def root(self) -> int:
        return self.token_ids[-1]

    @property
    def root_position(self) -> int:
        return len(self.token_ids) - 1

    @property
    def is_prefilled(self) -> bool:
        """Only the root is left to compute, so a tree can grow from it."""
        return self.num_computed == self.root_position

    @property
    def begins_bare(self) -> bool:
        """The forward that ends a prompt verifies the root alone. So does one that had nothing left of the prompt to compute,
        for rounds, by which noise is keyed, must not depend on where the prompt's keys came from."""
        return self.round == 0 and self.root_position > 0

    @property
    def max_draft_depth(self) -> int:
        """Drafted levels that can still be of use: the extra token takes the last place, and positions end somewhere."""
        useful = self.max_tokens - len(self.token_ids) - 1
        if self.max_positions is not None:
            useful = min(useful, self.max_positions - len(self.token_ids))
        return max(useful, 0)

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.prompt_len :]


def batch_sampling(sequences: Seq[Sequence], vocab_size: int, device: object) -> BatchSampling:
    """The sampling parameters and histories of some sequences, as they stand now."""
    return BatchSampling(
        [one.params for one in sequences],
        [one.token_ids[: one.prompt_len] if one.params.has_penalties else [] for one in sequences],
        [one.output_token_ids if one.params.has_penalties else [] for one in sequences],
        vocab_size,
        device,  # type: ignore[arg-type]
    )
