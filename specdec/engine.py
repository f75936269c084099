"""The engine: draft, verify, observe, emit, until every sequence of a batch has ended."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from collections.abc import Sequence as Seq

import torch

from specdec.interfaces import Commit, Drafter, Speculation, TreePolicy, Verdict, Verifier
from specdec.metrics import StepTimes
from specdec.noise import CounterNoise
from specdec.pages import OutOfPages, PagePool, PageTable
from specdec.request import Request, Result, Token, encode
from specdec.sampling import SamplingParams
from specdec.scheduler import Plan, plan
from specdec.tree import TokenTree


class Engine:
    """Generates for many prompts at once; without a drafter every tree is a root alone, which is plain decoding.

    Args: `verifier` holds target and rule, `drafter` and `policy` go together. `max_batch_size` sequences run at once,
    prompts go in pieces of `prefill_chunk` tokens. `num_pages` bounds the KV cache (None: it grows with the need).
    `speculation` decides how much of the policy's trees each step drafts and verifies (None: all).
    Raises ValueError where rule, policy, drafter and target do not fit together.
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
        speculation: Speculation | None = None,
    ) -> None:
        if (drafter is None) != (policy is None):
            raise ValueError(
                "a drafter needs a tree policy and a policy a drafter: give both, or neither for plain decoding"
            )
        if max_batch_size < 1 or prefill_chunk < 1:
            raise ValueError(f"max_batch_size={max_batch_size} and prefill_chunk={prefill_chunk} must be >= 1")
        if policy is not None:
            verifier.require(policy.spec)
        self.verifier, self.target, self.drafter, self.policy = verifier, verifier.target, drafter, policy
        self.speculation = speculation
        self.max_batch_size, self.prefill_chunk = max_batch_size, prefill_chunk
        self._may_grow = num_pages is None
        self.pool = PagePool(num_pages or 0, page_size)
        self.cache = verifier.new_cache(self.pool)
        self.times = StepTimes()
        self._ids = itertools.count()
        if drafter is not None:
            drafter.bind(self.target, self.pool)

    def generate(
        self,
        prompts: Seq[str | Seq[int]],
        params: SamplingParams | Seq[SamplingParams] | None = None,
        *,
        chat: bool = False,
    ) -> list[Result]:
        """One result per prompt, in order; see `stream`."""
        results = [token.result for token in self.stream(prompts, params, chat=chat) if token.result is not None]
        return sorted(results, key=lambda result: result.index)

    def stream(
        self,
        prompts: Seq[str | Seq[int]],
        params: SamplingParams | Seq[SamplingParams] | None = None,
        *,
        chat: bool = False,
    ) -> Iterator[Token]:
        """Tokens as they become final; the last one of a prompt carries its result.

        Prompts are text or token ids; `chat` wraps text as a user's message in the model's chat template. `params` is one
        for all or one each. Raises ValueError for a prompt that is empty, too long or out of the vocabulary, OutOfPages
        where a batch cannot fit; both before anything is generated.
        """
        each = [params or SamplingParams()] * len(prompts) if not isinstance(params, Seq) else list(params)
        if len(each) != len(prompts):
            raise ValueError(
                f"{len(each)} sampling parameters for {len(prompts)} prompts: give one for all or one each"
            )
        requests = [
            Request(
                next(self._ids), i, prompt, encode(self.target, prompt, chat), one, self.target, PageTable(self.pool)
            )
            for i, (prompt, one) in enumerate(zip(prompts, each, strict=True))
        ]
        for batch in self._batches(requests):
            yield from self._run_batch(batch)

    def _run_batch(self, batch: list[Request]) -> Iterator[Token]:
        need = sum(self._pages_for(request) for request in batch)
        if self._may_grow and need > self.pool.num_free:
            self.pool.grow(self.pool.num_pages + need - self.pool.num_free)
        for request in batch:
            request.metrics.start_s = time.perf_counter()
        running = batch
        try:
            while running:
                yield from self.step(running)
                running = [request for request in running if request.result is None]
        finally:
            # Also when the caller stops listening: pages and drafter state never outlive the batch.
            for request in batch:
                self._release(request)

    def step(self, running: list[Request]) -> list[Token]:
        """One forward of the target for all running requests."""
        start = time.perf_counter()
        step = plan([request.sequence for request in running], self.prefill_chunk)
        noise = CounterNoise(
            [one.seed for one in step.verifying],
            [one.round for one in step.verifying],
            [one.root_position for one in step.verifying],
            self.target.device,
        )
        self._reserve(step)
        drafting = time.perf_counter()
        tree = self._propose(step, noise)
        drafted = time.perf_counter()
        verdict = self.verifier.verify(step, tree, noise, self.cache, self._feature_layers, self.times)
        verified = time.perf_counter()
        tokens = self._emit(step, running, tree, verdict)
        observing = time.perf_counter()
        self._observe(step, running, verdict)
        end = time.perf_counter()
        self.times.draft_s += drafted - drafting + end - observing
        self.times.other_s += drafting - start + observing - verified
        self.times.num_steps += 1
        if self.speculation is not None:
            self.speculation.learn(step, tree, verdict, end - start)
        return tokens

    @property
    def _feature_layers(self) -> tuple[int, ...]:
        return () if self.drafter is None else tuple(self.drafter.feature_layers)

    def _propose(self, step: Plan, noise: CounterNoise) -> TokenTree | None:
        trees = []
        if step.drafting and self.drafter is not None and self.policy is not None:
            drafting = noise.select(range(len(step.drafting)))
            if self.speculation is None:
                trees.append(self.drafter.propose(step.drafting, self.policy, drafting))
            else:
                trees.append(self.speculation.propose(step, self.drafter, self.policy, drafting))
            bare = step.finishing
        else:
            bare = step.verifying
        if bare:
            roots = torch.tensor([one.root for one in bare], device=self.target.device)
            trees.append(TokenTree.roots(roots, self.target.vocab_size))
        return TokenTree.concat(trees) if trees else None

    def _emit(self, step: Plan, running: list[Request], tree: TokenTree | None, verdict: Verdict) -> list[Token]:
        """Hands out new tokens one by one; whatever ends a request cuts inside an accepted span."""
        requests = {request.sequence.id: request for request in running}
        for one, chunk in zip(step.sequences, step.chunks, strict=True):
            one.num_computed += chunk
        out: list[Token] = []
        if tree is None:
            return out
        depths = tree.depth_BN.amax(1).tolist()
        counts = tree.num_nodes_B.tolist()
        for row, one in enumerate(step.verifying):
            request, path = requests[one.id], verdict.paths[row]
            one.num_computed += len(path)
            one.round += 1
            request.metrics.count_tree(depths[row], len(path) - 1, counts[row])
            out += request.append(verdict.tokens[row], verdict.logprobs[row])
        return out

    def _observe(self, step: Plan, running: list[Request], verdict: Verdict) -> None:
        for request in running:
            if request.result is not None:
                self._release(request)
        if self.drafter is None:
            return
        place = {one.id: row for row, one in enumerate(step.verifying)}
        commits = []
        for one, chunk in zip(step.sequences, step.chunks, strict=True):
            if one.finish_reason is not None:
                continue
            row = place.get(one.id)
            path = verdict.paths[row] if row is not None else []
            computed = chunk + len(path)
            begin = one.num_computed - computed
            commits.append(
                Commit(
                    one.id,
                    begin,
                    one.token_ids[begin : begin + computed],
                    one.token_ids[begin + computed],
                    path if chunk == 0 and row is not None else None,
                    verdict.hidden.get(one.id, {}),
                )
            )
        self.drafter.observe(commits)

    @property
    def _scratch(self) -> int:
        """Slots behind the computed tokens that a step may write: the tree, or what was run to draft it."""
        return 1 if self.policy is None else max(self.policy.max_nodes, self.policy.max_expanded)

    def _reserve(self, step: Plan) -> None:
        for one, chunk in zip(step.sequences, step.chunks, strict=True):
            end = one.num_computed + chunk + (self._scratch if one.is_prefilled else 1)
            one.table.reserve(end, one.num_computed)

    def _pages_for(self, request: Request) -> int:
        """Pages for the longest that a request can become."""
        return self.pool.pages_for(request.sequence.max_tokens + self._scratch)

    def _batches(self, requests: list[Request]) -> list[list[Request]]:
        """Requests in order, as many at once as size and pages allow. Raises OutOfPages for one that fits never."""
        batches: list[list[Request]] = []
        room = 0
        for request in requests:
            need = self._pages_for(request)
            if not self._may_grow and need > self.pool.num_pages:
                raise OutOfPages(need, self.pool.num_pages, self.pool.num_pages, self.pool.page_size)
            if not batches or len(batches[-1]) == self.max_batch_size or (not self._may_grow and need > room):
                batches.append([])
                room = self.pool.num_pages
            batches[-1].append(request)
            room -= need
        return batches

    def _release(self, request: Request) -> None:
        if request.released:
            return
        request.released = True
        request.sequence.table.release()
        if self.drafter is not None:
            self.drafter.forget([request.sequence.id])
