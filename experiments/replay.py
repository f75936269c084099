"""Goes along a given text as if it were being generated and shows, at chosen places, what an acceptance rule would see."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch

from specdec.interfaces import Acceptance, Commit, Drafter, Noise, TargetLaws, TreePolicy
from specdec.metrics import StepTimes
from specdec.model import PagedModel
from specdec.noise import CounterNoise
from specdec.off_pages import completed
from specdec.pages import PagePool, PageTable
from specdec.sampling import SamplingParams
from specdec.scheduler import Plan
from specdec.sequence import Sequence
from specdec.tree import TokenTree, TreeSpec
from specdec.verifiers import Verifier


@dataclass(frozen=True)
class Scene:
    """One tree behind the text's token `root`, grown by the policy named `policy` with the noise of request `seed`, and the
    target's laws at its nodes."""

    root: int
    policy: str
    seed: int
    tree: TokenTree
    laws: TargetLaws


class Replay:
    """A target and a drafter that are led along texts, one text at a time.

    Both see what they would see in the engine: the verifier's own forwards, and every final token with the features that
    the drafter asked for. Only the verdict is not the rule's but the text's.
    """

    def __init__(self, target: PagedModel, drafter: Drafter, page_size: int = 16, prefill_chunk: int = 512) -> None:
        self._drafter, self._prefill_chunk = completed(drafter), prefill_chunk
        self._witness = _Witness()
        self._verifier = Verifier(target, self._witness, allow_lossy=True)
        self._pool = PagePool(0, page_size)
        self._cache = self._verifier.new_cache(self._pool)
        self._ids = itertools.count()
        self._drafter.bind(target, self._pool)

    def scenes(
        self,
        prompt: Seq[int],
        output: Seq[int],
        roots: Seq[int],
        params: SamplingParams,
        seed: int,
        policies: Mapping[str, TreePolicy],
    ) -> Iterator[Scene]:
        """A tree of every policy at each of `roots`, ascending indices into prompt + output; noise is keyed by the root."""
        text = [*prompt, *output]
        deepest = max(policy.max_depth for policy in policies.values())
        scratch = max(max(policy.max_nodes, policy.max_expanded) for policy in policies.values())
        table = PageTable(self._pool)
        # No end of the text cuts a tree short; the model's last position may.
        longest = len(text) + deepest + 1
        one = Sequence(next(self._ids), list(prompt), params, seed, table, longest, self._verifier.target.max_positions)
        self._pool.grow(self._pool.num_pages - self._pool.num_free + self._pool.pages_for(len(text) + scratch))
        table.reserve(len(text) + scratch, 0)
        try:
            for root in roots:
                one.token_ids = text[: root + 1]
                self._advance(one)
                for name, policy in policies.items():
                    noise = CounterNoise([seed], [root], [root], self._verifier.target.device)
                    tree = self._drafter.propose([one], policy, noise)
                    plan = Plan([one], [0], [one], [])
                    self._verifier.verify(plan, tree, noise, self._cache, (), StepTimes())
                    yield Scene(root, name, seed, tree, self._witness.laws)
        finally:
            table.release()
            self._drafter.forget([one.id])

    def _advance(self, one: Sequence) -> None:
        """Runs the text up to the root, which itself is left to the trees."""
        while one.num_computed < one.root_position:
            begin, chunk = one.num_computed, min(one.root_position - one.num_computed, self._prefill_chunk)
            noise = CounterNoise([], [], [], self._verifier.target.device)
            layers = tuple(self._drafter.feature_layers)
            verdict = self._verifier.verify(Plan([one], [chunk], [], []), None, noise, self._cache, layers, StepTimes())
            one.num_computed = end = begin + chunk
            hidden: Mapping[int, torch.Tensor] = verdict.hidden.get(one.id) or {}
            self._drafter.observe([Commit(one.id, begin, one.token_ids[begin:end], one.token_ids[end], None, hidden)])


class _Witness:
    """Stands where the rule stands, keeps the laws it is handed, and accepts the root alone, so that nothing is moved."""

    name = "witness"
    lossless = False
    laws: TargetLaws

    def accepts(self, spec: TreeSpec) -> str | None:
        return None

    def __call__(self, tree: TokenTree, laws: TargetLaws, noise: Noise) -> Acceptance:
        self.laws = laws
        root_B = torch.zeros_like(tree.num_nodes_B)
        return Acceptance(root_B[:, None], root_B, root_B)
