"""The engine: requests come and go; each step drafts, verifies, observes and emits for all that run."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import replace

from specdec.graphs import ForwardGraphs
from specdec.handle import Handle
from specdec.int_tensor import int_tensor
from specdec.interfaces import Commit, Drafter, Speculation, TreePolicy, Verdict, Verifier
from specdec.kv_cache import KVCache
from specdec.metrics import EngineMetrics, StepTimes
from specdec.noise import CounterNoise
from specdec.off_pages import completed
from specdec.pages import PagePool, PageTable
from specdec.prefix import PrefixCache
from specdec.request import Prompt, Request, Result, Token, encode
from specdec.sampling import SamplingParams
from specdec.scheduler import Plan, Scheduler
from specdec.tree import TokenTree


class Engine:
    """Generates for requests that come and go; without a drafter every tree is a root alone, which is plain decoding.

    Args: `verifier` holds target and rule; `drafter`, which needs no more than the verbs of `interfaces.Drafter`, and `policy`
    go together; `speculation` may depart from the policy step by step. `max_batch_size` sequences run at once; prompts go in
    pieces, `prefill_chunk` tokens of all of them per step. `num_pages` bounds the KV cache (None: it grows with the need);
    `share_prefixes` keeps the pages of what has been computed for requests that begin alike. On CUDA, `cuda_graphs` records the
    forwards of trees and replays them; give `num_pages` there, for graphs are recorded anew when the cache grows. Not thread
    safe. Raises ValueError where rule, policy, drafter and target do not fit together.
    """

    def __init__(
        self,
        verifier: Verifier,
        drafter: Drafter | None = None,
        policy: TreePolicy | None = None,
        *,
        max_batch_size: int = 8,
        prefill_chunk: int = 512,
        page_size: int = 16,
        num_pages: int | None = None,
        share_prefixes: bool = True,
        speculation: Speculation | None = None,
        cuda_graphs: bool = True,
    ) -> None:
        if (drafter is None) != (policy is None):
            raise ValueError(
                "a drafter needs a tree policy and a policy a drafter: give both, or neither for plain decoding"
            )
        if max_batch_size < 1 or prefill_chunk < 1:
            raise ValueError(f"max_batch_size={max_batch_size} and prefill_chunk={prefill_chunk} must be >= 1")
        if policy is not None:
            verifier.require(policy.spec)
        self.verifier, self.target, self.policy = verifier, verifier.target, policy
        self.drafter = None if drafter is None else completed(drafter)
        self.speculation = speculation
        self.max_batch_size, self.prefill_chunk = max_batch_size, prefill_chunk
        self.pool = PagePool(num_pages or 0, page_size)
        self.cache = verifier.new_cache(self.pool)
        self.times = StepTimes()
        self.prefixes = PrefixCache(self.pool, share_prefixes)
        self._counts = EngineMetrics(max_batch_size)
        # Behind the computed tokens a step writes the tree, or what was run to draft it.
        scratch = 1 if policy is None else max(policy.max_nodes, policy.max_expanded)
        self._scheduler = Scheduler(
            self.pool,
            self.prefixes,
            self.drafter,
            self._counts,
            prefill_chunk=prefill_chunk,
            scratch=scratch,
            may_grow=num_pages is None,
        )
        self._ids = itertools.count()
        if self.drafter is not None:
            self.drafter.bind(self.target, self.pool)
        if cuda_graphs:
            for storage in self.pool.storages:
                if isinstance(storage, KVCache) and storage.device.type == "cuda":
                    storage.graphs = ForwardGraphs(storage.device)

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        chat: bool = False,
        index: int | None = None,
        token_ids: Seq[int] | None = None,
    ) -> Handle:
        """Takes in a request, which waits for its turn; nothing is computed yet.

        A prompt is text (`chat`: as a user's message in the model's chat template), token ids, or the messages of a chat.
        `index` is what its tokens and result call it (None: its id); `token_ids` are the prompt's where `encode` has made them
        already. Raises ValueError for a prompt that is empty, too long or out of the vocabulary, OutOfPages for one that would
        not fit the cache alone.
        """
        id = next(self._ids)
        own_ids = encode(self.target, prompt, chat) if token_ids is None else list(token_ids)
        index, table = id if index is None else index, PageTable(self.pool)
        request = Request(id, index, prompt, own_ids, params or SamplingParams(), self.target, table)
        self._scheduler.submit(request)
        self._counts.num_requests += 1
        return Handle(self, request)

    def cancel(self, handle: Handle) -> None:
        """Ends a request unless it has ended; its pages are free then."""
        request = handle.request
        if request.result is None:
            self._scheduler.remove(request)
            request.end("cancelled")
            self._counts.num_cancelled += 1
            self._counts.count_ended(request.metrics)

    @property
    def is_idle(self) -> bool:
        return not (self._scheduler.running or self._scheduler.waiting)

    @property
    def waiting(self) -> tuple[Request, ...]:
        """Requests in the order of their arrival that hold no pages yet, or no longer."""
        return tuple(self._scheduler.waiting)

    @property
    def running(self) -> tuple[Request, ...]:
        return tuple(self._scheduler.running)

    @property
    def metrics(self) -> EngineMetrics:
        """Counts since the engine was made, and the pages as they stand."""
        used = self.pool.num_pages - self.pool.num_free
        return replace(
            self._counts,
            num_pages=self.pool.num_pages,
            num_used_pages=used,
            num_prefix_pages=len(self.prefixes.pages),
            num_idle_prefix_pages=self.prefixes.num_idle,
            times=replace(self.times),
        )

    def check(self) -> None:
        """Proves that every page is free or held by whom it should be, and that nobody can write to a shared one.

        Raises AssertionError.
        """
        self.pool.check([*(request.sequence.table for request in self._scheduler.running), self.prefixes])
        self.prefixes.check()
        for request in self._scheduler.running:
            one = request.sequence
            covered = one.num_computed if self.drafter is None else self.drafter.covered(one.id)
            writable = one.table.pages[min(one.num_computed, covered) // self.pool.page_size :]
            assert all(self.pool.references(page) == 1 for page in writable), "a page that is shared may be written to"
        assert not any(request.sequence.table.pages for request in self._scheduler.waiting), (
            "one that waits holds pages"
        )

    def generate(
        self,
        prompts: Seq[Prompt],
        params: SamplingParams | Seq[SamplingParams] | None = None,
        *,
        chat: bool = False,
    ) -> list[Result]:
        """One result per prompt, in order; see `stream`."""
        results = [token.result for token in self.stream(prompts, params, chat=chat) if token.result is not None]
        return sorted(results, key=lambda result: result.index)

    def stream(
        self,
        prompts: Seq[Prompt],
        params: SamplingParams | Seq[SamplingParams] | None = None,
        *,
        chat: bool = False,
    ) -> Iterator[Token]:
        """Tokens as they become final; the last one of a prompt carries its result.

        Prompts are those of `submit`, `params` one for all or one each. Raises what `submit` does for any of them before
        anything is generated. Whoever stops listening cancels what goes on.
        """
        each = [params or SamplingParams()] * len(prompts) if not isinstance(params, Seq) else list(params)
        if len(each) != len(prompts):
            raise ValueError(
                f"{len(each)} sampling parameters for {len(prompts)} prompts: give one for all or one each"
            )
        handles: dict[int, Handle] = {}
        try:
            for i, (prompt, one) in enumerate(zip(prompts, each, strict=True)):
                handle = self.submit(prompt, one, chat=chat, index=i)
                handles[handle.id] = handle
            ahead = deque(handles.values())
            while ahead:
                if ahead[0].is_done:
                    ahead.popleft()
                else:
                    yield from (token for token in self.step() if token.id in handles)
        finally:
            for handle in handles.values():
                handle.cancel()

    def step(self) -> list[Token]:
        """One forward of the target for everything that runs, and the tokens that became final; none when idle.

        Where it raises, the requests that it computed have ended, `failed` unless they had come to their end, and hold nothing
        any more; the others can go on.
        """
        start = time.perf_counter()
        if self.is_idle:
            return []
        step = None
        try:
            step = self._scheduler.plan()
            return self._advance(step, start)
        except BaseException:
            self._scheduler.abandon(step)
            raise

    def _advance(self, step: Plan, start: float) -> list[Token]:
        noise = CounterNoise(
            [one.seed for one in step.verifying],
            [one.round for one in step.verifying],
            [one.root_position for one in step.verifying],
            self.target.device,
        )
        drafting = time.perf_counter()
        tree = self._propose(step, noise)
        drafted = time.perf_counter()
        verdict = self.verifier.verify(step, tree, noise, self.cache, self._feature_layers, self.times)
        verified = time.perf_counter()
        requests = {request.id: request for request in self._scheduler.running}
        tokens = self._emit(step, requests, tree, verdict)
        observing = time.perf_counter()
        self._observe(step, verdict)
        end = time.perf_counter()
        if self.speculation is not None:
            # What a tree makes of work behind its verdict is part of its price.
            self.speculation.learn(step, tree, verdict, end - drafting)
        self._scheduler.settle([requests[one.id] for one in step.sequences])
        self.times.draft_s += drafted - drafting + end - observing
        self.times.other_s += drafting - start + observing - verified + time.perf_counter() - end
        self.times.num_steps += 1
        return tokens

    @property
    def _feature_layers(self) -> tuple[int, ...]:
        return () if self.drafter is None else tuple(self.drafter.feature_layers)

    def _propose(self, step: Plan, noise: CounterNoise) -> TokenTree | None:
        trees = []
        if step.drafting and self.drafter is not None and self.policy is not None:
            own = noise.select(range(len(step.drafting)))
            if self.speculation is None:
                trees.append(self.drafter.propose(step.drafting, self.policy, own))
            else:
                trees.append(self.speculation.propose(step, self.drafter, self.policy, own))
            bare = step.finishing
        else:
            bare = step.verifying
        if bare:
            roots = TokenTree.roots(int_tensor([one.root for one in bare]), self.target.vocab_size)
            trees.append(roots.to(self.target.device))
        return TokenTree.concat(trees) if trees else None

    def _emit(self, step: Plan, requests: dict[int, Request], tree: TokenTree | None, verdict: Verdict) -> list[Token]:
        """Hands out new tokens one by one; whatever ends a request cuts inside an accepted span."""
        counts = self._counts
        counts.num_steps += 1
        counts.num_sequence_steps += len(step.sequences)
        counts.num_prefill_tokens += sum(step.chunks)
        counts.num_computed_tokens += sum(step.chunks)
        for one, chunk in zip(step.sequences, step.chunks, strict=True):
            one.num_computed += chunk
        out: list[Token] = []
        if tree is None:
            return out
        depths = tree.shape.depth_BN.max(1).tolist() if tree.max_nodes > 1 else [0] * tree.batch_size
        sizes = tree.shape.sizes
        for row, one in enumerate(step.verifying):
            request, path = requests[one.id], verdict.paths[row]
            one.num_computed += len(path)
            one.round += 1
            request.metrics.count_tree(depths[row], len(path) - 1, sizes[row])
            out += request.append(verdict.tokens[row], verdict.logprobs[row])
        counts.num_computed_tokens += sum(sizes)
        counts.num_output_tokens += len(out)
        return out

    def _observe(self, step: Plan, verdict: Verdict) -> None:
        if self.drafter is None:
            return
        place = {one.id: row for row, one in enumerate(step.verifying)}
        commits = []
        for one, chunk in zip(step.sequences, step.chunks, strict=True):
            row = place.get(one.id)
            path = verdict.paths[row] if row is not None else []
            begin = one.num_computed - chunk - len(path)
            # What lies behind the end of a request is in no text.
            end = min(one.num_computed, one.root_position)
            hidden = verdict.hidden.get(one.id)
            commits.append(
                Commit(
                    one.id,
                    begin,
                    one.token_ids[begin:end],
                    one.token_ids[end],
                    path[: end - begin] if chunk == 0 and row is not None else None,
                    {} if hidden is None else hidden.first(end - begin),
                    one if one.finish_reason is None else None,
                )
            )
        self.drafter.observe(commits)
