"""Who runs next: which requests hold pages, and how their prompts and trees share the steps."""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass

from specdec.interfaces import PagedDrafter
from specdec.metrics import EngineMetrics
from specdec.pages import OutOfPages, PagePool
from specdec.prefix import PrefixCache, PrefixPage
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
    written; one whose next page of prompt another is computing waits for that, and lets others pass. A part of the prompt
    tokens of a step is for prompts that end in it, so that behind a long prompt a short one need not wait. Out of pages, the
    prefixes that nobody uses go first, then those of the youngest request, which returns to the queue and is computed again
    later; so the oldest always goes on. `may_grow` lets the pool grow before anybody has to leave. Raises OutOfPages in
    `submit` for a request that would not fit the pool alone.
    """

    # Of a step's prompt tokens the part that is for prompts which end in it: one of so many.
    _SHORT_SHARE = 4

    def __init__(
        self,
        pool: PagePool,
        prefixes: PrefixCache,
        drafter: PagedDrafter | None,
        metrics: EngineMetrics,
        *,
        prefill_chunk: int,
        scratch: int,
        may_grow: bool,
    ) -> None:
        self._pool, self._prefixes, self._drafter, self._metrics = pool, prefixes, drafter, metrics
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

    def settle(self, requests: list[Request]) -> None:
        """Shares what a step has made final, and takes out the requests that it ended."""
        for request in requests:
            one = request.sequence
            num_final = min(one.num_computed, one.root_position)
            if self._drafter is None:
                self._prefixes.extend(one, num_final)
            else:
                self._prefixes.extend(one, min(num_final, self._drafter.covered(one.id)), self._drafter.note)
            # By its first drafted tree a drafter has run the prompt, if it does so at all.
            if one.round > 1:
                self._prefixes.withdraw(one)
            if request.result is not None:
                self.remove(request)
                self._metrics.num_finished += 1
                self._metrics.count_ended(request.metrics)

    def abandon(self, step: Plan | None) -> None:
        """Takes out the requests of a step that broke off (None: all that hold pages, for it was still being planned), since
        how far they have been computed is not known any more; those that have not ended fail."""
        ids = None if step is None else {one.id for one in step.sequences}
        for request in (*self.running, *self.waiting):
            if request.id in ids if ids is not None else request.sequence.table.pages:
                self.remove(request)
                if request.result is None:
                    request.end("failed")
                    self._metrics.num_failed += 1
                else:
                    self._metrics.num_finished += 1
                self._metrics.count_ended(request.metrics)
            elif ids is None:
                # One that was about to begin may have found a prefix already.
                self._release(request)

    def remove(self, request: Request) -> None:
        """Takes out a request that has ended or is not wanted any more; its pages are free then."""
        (self.running if request in self.running else self.waiting).remove(request)
        self._release(request)

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
        short = self._prefill_chunk // self._SHORT_SHARE - sum(self._short().values())
        at = 0
        # Whoever may pass others stands near the front: each that is looked at is looked up among the prefixes.
        while at < min(len(self.waiting), self._max_batch_size) and len(self.running) < self._max_batch_size:
            if max(budget, short) <= 0:
                break
            request = self.waiting[at]
            one = request.sequence
            if request.awaited is None or not request.awaited.is_coming:
                found, request.awaited = self._prefixes.find(one)
            if request.awaited is not None or (
                budget <= 0 and one.root_position - len(found) * self._pool.page_size > short
            ):
                at += 1
                continue
            if not self._begin(one, found):
                break
            del self.waiting[at]
            insort(self.running, request, key=_arrival)
            left = _left(one)
            budget -= left
            short -= left if left <= short else 0
            if not request.metrics.num_preemptions:
                self._metrics.num_prompt_tokens += one.prompt_len
                self._metrics.num_prefix_tokens += one.num_computed
                request.metrics.num_prefix_tokens = one.num_computed

    def _begin(self, one: Sequence, found: list[PrefixPage]) -> bool:
        """Gives a sequence the pages that were found and those it needs besides, if there are so many."""
        start = len(found) * self._pool.page_size
        # One page more for each that runs already, so that nobody has to leave as soon as one of them goes on.
        need = self._pool.pages_for(one.root_position + self._scratch) - len(found) + len(self.running)
        spare = self._pool.num_free + self._prefixes.num_idle - sum(map(self._prefixes.is_idle, found))
        if not self._may_grow and need > spare:
            return False
        self._prefixes.enter(one, found)
        one.num_computed = start
        fits = self._reserve(one)
        assert fits, "there were pages enough"
        if start and self._drafter is not None:
            self._drafter.adopt(one, start, [node.note for node in found])
        # Nobody should wait for pages that a drafter completes only if it drafts.
        if self._drafter is None or self._drafter.covers_unasked or one.max_draft_depth > 1:
            self._prefixes.announce(one)
        return True

    def _reserve(self, one: Sequence) -> bool:
        """Holds the pages for all tokens and a tree behind them, if there are so many."""
        end = one.root_position + self._scratch
        try:
            one.table.reserve(end, one.num_computed)
        except OutOfPages as error:
            missing = error.wanted - error.free
            missing -= self._prefixes.evict(missing)
            if missing and not self._may_grow:
                return False
            if missing:
                # By half at least: growing copies what is there.
                total = self._pool.num_pages
                self._pool.grow(total + max(missing, total // 2))
            one.table.reserve(end, one.num_computed)
        return True

    def _share_out(self) -> Plan:
        """Prompts share `prefill_chunk` tokens: those that end with what is for short ones, then the oldest first; whoever is
        past its prompt goes on in any case."""
        short = self._short()
        budget = self._prefill_chunk - sum(short.values())
        step = Plan([], [], [], [])
        for request in self.running:
            one = request.sequence
            left = _left(one)
            chunk = short.get(request.id)
            if chunk is None:
                chunk = min(left, budget)
                budget -= chunk
            if left and not chunk:
                continue
            step.sequences.append(one)
            step.chunks.append(chunk)
            if chunk == left and one.begins_bare:
                step.finishing.append(one)
            elif not left:
                step.drafting.append(one)
        return step

    def _short(self) -> dict[int, int]:
        """By id the prompts that end in the next step within its part for such, the oldest first, with what is left of them."""
        room, found = self._prefill_chunk // self._SHORT_SHARE, dict[int, int]()
        for request in self.running:
            left = _left(request.sequence)
            if 0 < left <= room:
                found[request.id] = left
                room -= left
        return found

    def _release(self, request: Request) -> None:
        self._prefixes.leave(request.sequence)
        request.sequence.table.release()
        if self._drafter is not None:
            self._drafter.forget([request.id])


def _arrival(request: Request) -> int:
    return request.id


def _left(one: Sequence) -> int:
    """Tokens before the root that are still to be computed."""
    return one.root_position - one.num_computed
