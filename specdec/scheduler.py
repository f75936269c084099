"""Who runs next: which requests hold pages, and how their prompts and trees share the steps."""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass

from specdec.interfaces import Drafter
from specdec.metrics import EngineMetrics
from specdec.pages import OutOfPages, PagePool
from specdec.request import Request
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


class Scheduler:
    """First come, first served, by the pages that are really needed; ids are the order of arrival.

    A request is admitted when there are pages for its tokens so far and for `scratch` slots behind them, where trees are
    written. One that outgrows its pages takes those of the youngest, which goes back to the head of the queue and is
    computed again later; so the oldest always goes on. `may_grow` lets the pool grow instead. Raises OutOfPages in `submit`
    for a request that would not fit the pool alone.
    """

    def __init__(
        self,
        pool: PagePool,
        drafter: Drafter | None,
        metrics: EngineMetrics,
        *,
        prefill_chunk: int,
        scratch: int,
        may_grow: bool,
    ) -> None:
        self._pool, self._drafter, self._metrics = pool, drafter, metrics
        self._max_batch_size, self._prefill_chunk = metrics.max_batch_size, prefill_chunk
        self._scratch, self._may_grow = scratch, may_grow
        # Both in order of arrival.
        self.waiting: list[Request] = []
        self.running: list[Request] = []

    def submit(self, request: Request) -> None:
        need = self._pool.pages_for(request.sequence.max_tokens + self._scratch)
        if not self._may_grow and need > self._pool.num_pages:
            raise OutOfPages(need, self._pool.num_pages, self._pool.num_pages, self._pool.page_size)
        self.waiting.append(request)

    def plan(self) -> Plan:
        """The next step; its pages are reserved."""
        self._keep_running()
        self._admit()
        return self._share_out()

    def remove(self, request: Request) -> None:
        """Takes out a request that has ended or is not wanted any more; its pages are free then."""
        if request in self.running:
            self.running.remove(request)
            self._release(request)
        else:
            self.waiting.remove(request)

    def _keep_running(self) -> None:
        at = 0
        while at < len(self.running):
            if self._reserve(self.running[at].sequence):
                at += 1
            else:
                self._preempt(self.running[-1])

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._release(request)
        # The round stays: what is emitted after the second prefill is keyed as if nothing had happened.
        request.sequence.num_computed = 0
        request.metrics.num_preemptions += 1
        self._metrics.num_preemptions += 1
        insort(self.waiting, request, key=_arrival)

    def _admit(self) -> None:
        budget = self._prefill_chunk - sum(_left(request.sequence) for request in self.running)
        while self.waiting and len(self.running) < self._max_batch_size and budget > 0:
            request = self.waiting[0]
            one = request.sequence
            # One page more for each that runs already, so that nobody has to leave as soon as one of them goes on.
            need = self._pool.pages_for(one.root_position + self._scratch) + len(self.running)
            if not self._may_grow and need > self._pool.num_free:
                break
            fits = self._reserve(one)
            assert fits, "there were pages enough"
            del self.waiting[0]
            insort(self.running, request, key=_arrival)
            budget -= _left(one)
            if not request.metrics.num_preemptions:
                self._metrics.num_prompt_tokens += one.prompt_len

    def _reserve(self, one: Sequence) -> bool:
        """Holds the pages for all tokens and a tree behind them, if there are so many."""
        end = one.root_position + self._scratch
        try:
            one.table.reserve(end, one.num_computed)
        except OutOfPages as error:
            if not self._may_grow:
                return False
            # By half at least: growing copies what is there.
            total = self._pool.num_pages
            self._pool.grow(max(total + error.wanted - error.free, total + total // 2))
            one.table.reserve(end, one.num_computed)
        return True

    def _share_out(self) -> Plan:
        """Prompts share `prefill_chunk` tokens, the oldest first; whoever is past its prompt goes on in any case."""
        budget = self._prefill_chunk
        step = Plan([], [], [], [])
        for request in self.running:
            one = request.sequence
            left = _left(one)
            chunk = min(left, budget)
            if left and not chunk:
                continue
            budget -= chunk
            step.sequences.append(one)
            step.chunks.append(chunk)
            if chunk == left and one.begins_bare:
                step.finishing.append(one)
            elif not left:
                step.drafting.append(one)
        return step

    def _release(self, request: Request) -> None:
        request.sequence.table.release()
        if self._drafter is not None:
            self._drafter.forget([request.id])


def _arrival(request: Request) -> int:
    return request.id


def _left(one: Sequence) -> int:
    """Tokens before the root that are still to be computed."""
    return one.root_position - one.num_computed
