"""Who runs next: how a batch's prompts and trees share the steps."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

from specdec.sequence import Sequence


@dataclass(frozen=True)
class Plan:
    """One step: `chunks[i]` prompt tokens of `sequences[i]` are computed; then its root with a tree, unless the prompt
    goes on. `drafting` are the sequences whose tree a drafter may grow, those with only the root left to compute;
    `finishing` end their prompt in this step and verify their root alone."""

    sequences: list[Sequence]
    chunks: list[int]
    drafting: list[Sequence]
    finishing: list[Sequence]

    @property
    def verifying(self) -> list[Sequence]:
        """Sequences with a tree in this step, in the order of the trees."""
        return self.drafting + self.finishing


def plan(running: Seq[Sequence], prefill_chunk: int) -> Plan:
    """Every sequence moves in every step; a prompt in pieces of at most `prefill_chunk` tokens."""
    chunks = [min(one.root_position - one.num_computed, prefill_chunk) for one in running]
    drafting = [one for one in running if one.is_prefilled]
    finishing = [
        one
        for one, chunk in zip(running, chunks, strict=True)
        if chunk and one.num_computed + chunk == one.root_position
    ]
    return Plan(list(running), chunks, drafting, finishing)
