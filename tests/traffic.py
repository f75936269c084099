"""Random traffic through a small engine, every text checked against the same request alone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from conftest import make_tiny
from head_cases import eagle_config

from specdec import Engine, Handle, PagedModel, SamplingParams
from specdec.cost import CostModel, DraftCost, TargetCost
from specdec.drafters import (
    EagleDrafter,
    MedusaDrafter,
    NGramDrafter,
    Sampled,
    SmallModelDrafter,
    TopK,
    UnionDrafter,
    chain,
)
from specdec.drafters.adaptive import AdaptiveSpeculation
from specdec.drafters.heads import EagleHead, MedusaConfig, MedusaHeads
from specdec.interfaces import Drafter, TreePolicy
from specdec.verifiers import RULES, Verifier

VOCAB = 13


def model(noise: float = 0.0) -> PagedModel:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return PagedModel(make_tiny(5, noise, vocab_size=VOCAB, num_key_value_heads=1, **sizes), name="target")


@functools.cache
def target() -> PagedModel:
    return model()


def ngram() -> Drafter:
    return NGramDrafter()


def small() -> Drafter:
    return SmallModelDrafter(_draft())


@functools.cache
def _draft() -> PagedModel:
    return model(0.05)


def eagle() -> Drafter:
    torch.manual_seed(1)
    changes = {"num_heads": 2, "num_kv_heads": 1, "intermediate_size": 16, "feature_layers": (1,)}
    return EagleDrafter(EagleHead(eagle_config(target(), 1, **changes)).eval())


def medusa() -> Drafter:
    torch.manual_seed(1)
    heads = MedusaHeads.initial(MedusaConfig(target().hidden_size, VOCAB, 3), target().model.lm_head.weight)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return MedusaDrafter(heads.eval())


def union() -> Drafter:
    return UnionDrafter([ngram(), small(), eagle()], enough=0.5)


@dataclass(frozen=True)
class System:
    """A drafter, a policy and a rule."""

    drafter: Callable[[], Drafter] | None = None
    policy: TreePolicy | None = None
    rule: str = "follow"
    is_adaptive: bool = False

    def engine(self, **options: Any) -> Engine:
        verifier = Verifier(target(), RULES[self.rule]())
        if self.is_adaptive and self.policy is not None:
            # Drafts are cheap at first; what steps really take is learned on the way.
            costs = CostModel(TargetCost((1, 64), (1e-3, 1.5e-3)), DraftCost(1e-5))
            options["speculation"] = AdaptiveSpeculation(self.policy, costs, verifier.rule.accepts)
        return Engine(verifier, None if self.drafter is None else self.drafter(), self.policy, **options)


PLAIN = System()
SYSTEMS = {
    "plain": PLAIN,
    "ngram": System(ngram, TopK(6, 3, 2)),
    "small": System(small, TopK(6, 3, 2)),
    "eagle": System(eagle, TopK(6, 3, 2)),
    "medusa": System(medusa, TopK(6, 3, 2)),
    "union": System(union, TopK(6, 3, 2)),
    "union adaptive": System(union, TopK(6, 3, 2), is_adaptive=True),
    "eagle adaptive": System(eagle, TopK(6, 3, 2), is_adaptive=True),
    "ngram rejection": System(ngram, chain(3), "rejection"),
    "small rejection": System(small, chain(3, "iid"), "rejection"),
    "eagle rejection": System(eagle, chain(3, "iid"), "rejection"),
    "medusa rejection": System(medusa, chain(3, "iid"), "rejection"),
    "small block": System(small, chain(3, "iid"), "block"),
    "eagle traversal": System(eagle, Sampled([2, 1], "iid"), "traversal"),
    "small recursive": System(small, Sampled([2, 1], "without_replacement"), "recursive"),
    "medusa recursive": System(medusa, Sampled([2, 1], "without_replacement"), "recursive"),
}
STEMS = ([3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 3, 5, 7, 9], [4, 4, 6, 6, 4, 4, 6, 6, 4, 4, 6, 6, 4, 4])
PROMPTS = [stem[:cut] + end for stem in STEMS for cut in (1, 5, 8, 9, 14) for end in ([], [10], [11, 3])]
PARAMS = [
    SamplingParams(max_new_tokens=12),
    SamplingParams(temperature=1.0, seed=1, max_new_tokens=12, ignore_eos=True),
    SamplingParams(temperature=0.8, seed=2, max_new_tokens=7, stop_token_ids=(8,)),
    SamplingParams(temperature=1.0, seed=3, max_new_tokens=9, repetition_penalty=1.2, presence_penalty=0.3),
    SamplingParams(temperature=1.0, seed=4, max_new_tokens=1, ignore_eos=True),
    SamplingParams(temperature=1.2, seed=5, max_new_tokens=20, ignore_eos=True),
]
# Positions of the longest request, and the slots behind them.
LONGEST = 16 + 20 + 8


# Not all of them: a soak is to show that memory does not grow.
@functools.lru_cache(1024)
def alone(system: System, prompt: tuple[int, ...], params: int) -> tuple[list[int], str]:
    """What one request gives that has an engine for itself; under `follow` by plain decoding."""
    engine = (PLAIN if system.rule == "follow" else system).engine(max_batch_size=1, share_prefixes=False)
    result = engine.generate([list(prompt)], PARAMS[params])[0]
    return result.token_ids, result.finish_reason


class Traffic:
    """An engine under load; `step` also proves the accounting and compares what has ended."""

    def __init__(self, system: System, **options: Any) -> None:
        self.system, self.engine = system, system.engine(**options)
        self.open: dict[int, tuple[Handle, tuple[int, ...], int]] = {}
        self.num_compared = self.num_cancelled = self.num_prefix_tokens = 0

    def submit(self, prompt: int, params: int) -> None:
        self._submit(tuple(PROMPTS[prompt]), params)

    def follow_up(self, number: int, cut: int) -> None:
        """Asks on behind an open request: its prompt, what it is going to answer, and more."""
        if self.open:
            _, prompt, params = self.open[sorted(self.open)[number % len(self.open)]]
            text = (*prompt, *alone(self.system, prompt, params)[0])
            more = (4, 5, 6, 7)
            # Short enough for any pool that holds the longest.
            room = LONGEST - 8 - PARAMS[2].max_new_tokens - len(more)
            self._submit((*text[: min(len(text) - cut, room)], *more), 2)

    def _submit(self, prompt: tuple[int, ...], params: int) -> None:
        handle = self.engine.submit(list(prompt), PARAMS[params])
        self.open[handle.id] = handle, prompt, params

    def cancel(self, number: int) -> None:
        if self.open:
            handle, prompt, params = self.open.pop(sorted(self.open)[number % len(self.open)])
            handle.cancel()
            handle.cancel()
            assert handle.result is not None and handle.result.finish_reason == "cancelled"
            wanted, _ = alone(self.system, prompt, params)
            assert handle.result.token_ids == wanted[: len(handle.result.token_ids)]
            self.num_cancelled += 1
            self.num_prefix_tokens += handle.metrics.num_prefix_tokens
            self.engine.check()

    def step(self) -> None:
        for token in self.engine.step():
            assert self.open[token.id][0].id == token.id
            if token.result is not None:
                handle, prompt, params = self.open.pop(token.id)
                assert handle.result is token.result
                found = token.result.token_ids, token.result.finish_reason
                assert found == alone(self.system, prompt, params), (prompt, PARAMS[params])
                assert [one.token_id for one in handle] == token.result.token_ids
                self.num_compared += 1
                self.num_prefix_tokens += handle.metrics.num_prefix_tokens
        self.engine.check()

    def finish(self) -> None:
        """Runs until nobody is left; then only prefixes hold pages, and no drafter remembers anybody. Pages that a preempted
        request finds again are its own, no shared ones."""
        for _ in range(10_000):
            if self.engine.is_idle:
                break
            self.step()
        assert self.engine.is_idle and not self.open
        assert self.engine.pool.num_pages - self.engine.pool.num_free == self.engine.prefixes.num_idle
        assert self.engine.metrics.num_prefix_tokens == self.num_prefix_tokens
        assert not self.engine.prefixes._paths and not self.engine.prefixes._announced
        for one in (self.engine.drafter, *getattr(self.engine.drafter, "drafters", [])):
            assert not any(getattr(one, name, None) for name in ("_states", "_indexes"))
