"""What is enumerated: one round of policy and rule on table laws, and the whole engine on a toy model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from specdec import Engine, SamplingParams
from specdec.certificates.oracle import Scripts, TokenSpan, enumerate_outcomes, law_of, spans
from specdec.certificates.worlds import FixedLaws, TableRound, ToyModel, World
from specdec.drafters import SmallModelDrafter
from specdec.drafters.growth import GrowingPolicy
from specdec.interfaces import AcceptanceRule, Drafter, Speculation, TreePolicy
from specdec.sampling import BatchSampling, ModelLaws
from specdec.tree import TokenTree
from specdec.verifiers import Verifier


@dataclass(frozen=True)
class Case:
    """A row: the kind of its laws, the context of its root, and the deepest level its tree may have."""

    kind: int
    state: int
    limit: int


def ragged_cases(world: World, depth: int) -> list[Case]:
    """For every kind a full tree, one from another context that may not go so deep, and a root alone."""
    return [
        Case(kind, world.walk(context), limit)
        for kind in range(len(world.kinds))
        for context, limit in (((), depth), ((1,), depth - 1), ((2,), 0))
    ]


def one_round(
    policy: GrowingPolicy, rule: AcceptanceRule, world: World, rows: Seq[Case], noise: Any
) -> tuple[TokenTree, list[TokenSpan]]:
    """Drafts a batch and has it judged: the trees, and the tokens each row emits."""
    kinds_B, states_B = (torch.tensor([getattr(row, name) for row in rows]) for name in ("kind", "state"))
    tree = policy.grow(TableRound(world, kinds_B, states_B, [row.limit for row in rows]), noise).tree
    acceptance = rule(tree, FixedLaws(world, tree, kinds_B, states_B), noise)
    return tree, spans(tree, acceptance)


def round_laws(
    policy: GrowingPolicy, rule: AcceptanceRule, world: World, cases: Seq[Case], **options: Any
) -> list[dict[TokenSpan, float]]:
    """Per case the law of the tokens that one round emits."""

    def run(rows: list[Case], scripts: Scripts) -> list[TokenSpan]:
        return one_round(policy, rule, world, rows, scripts.noise())[1]

    return [law_of(outcomes) for outcomes in enumerate_outcomes(run, cases, **options)]


def round_error(
    policy: GrowingPolicy, rule: AcceptanceRule, world: World, cases: Seq[Case], length: int, **options: Any
) -> float:
    """The largest error of the joint law of `length` tokens over all cases."""
    laws = round_laws(policy, rule, world, cases, **options)
    return max(world.continued_error(case.kind, case.state, law, length) for case, law in zip(cases, laws, strict=True))


@contextmanager
def float64_laws() -> Iterator[None]:
    """Makes target and draft laws float64 where production computes them in float32."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(BatchSampling.probabilities, "__defaults__", (None, torch.float64)))
        stack.enter_context(patch("specdec.verifiers.verifier.ModelLaws", partial(ModelLaws, dtype=torch.float64)))
        yield


def toy_engine(
    world: World, rule: AcceptanceRule, policy: TreePolicy | None, drafter: Drafter | None = None, **options: Any
) -> Engine:
    """An engine on a toy model that follows the world's target laws; without a `drafter` of its own another one drafts that
    follows the draft laws. No policy drafts nothing."""
    if policy is not None and drafter is None:
        drafter = SmallModelDrafter(ToyModel(world, world.draft_KCV, "draft"))  # type: ignore[arg-type]
    target = ToyModel(world, world.target_KCV, "target")
    return Engine(Verifier(target, rule, allow_lossy=True), drafter, policy, max_batch_size=1 << 20, **options)  # type: ignore[arg-type]


def engine_laws(
    world: World,
    rule: AcceptanceRule,
    policy: TreePolicy | None,
    cases: Seq[tuple[Seq[int], ...]],
    params: SamplingParams,
    page_size: int = 3,
    prefill_chunk: int = 2,
    drafter: Drafter | None = None,
    speculation: Callable[[], Speculation] | None = None,
    **options: Any,
) -> list[dict[tuple[tuple[TokenSpan, str], ...], float]]:
    """Per case, a tuple of prompts, the joint law of what their requests give: tokens and finish reason each.

    A step computes `prefill_chunk` prompt tokens for every request that runs. `speculation` makes one for each batch; what it
    learns from batch mates makes rows depend on each other, so it needs batches of one case (`max_batch=1`).
    """
    width = len(cases[0])

    def run(batch: list[tuple[Seq[int], ...]], scripts: Scripts) -> list[tuple[tuple[TokenSpan, str], ...]]:
        prompts = [list(prompt) for case in batch for prompt in case]
        # A request's seed tells the oracle whose choice it is.
        each = [replace(params, seed=owner) for owner in range(len(prompts))]
        chunk = prefill_chunk * len(prompts)
        engine = toy_engine(world, rule, policy, drafter, page_size=page_size, prefill_chunk=chunk)
        engine.speculation = None if speculation is None else speculation()
        with patch("specdec.engine.CounterNoise", lambda *noise: scripts.noise(*noise[:3])), float64_laws():
            results = [(tuple(one.token_ids), one.finish_reason) for one in engine.generate(prompts, each)]
        engine.check()
        assert engine.is_idle, "a request was left"
        return [tuple(results[i : i + width]) for i in range(0, len(results), width)]

    return [law_of(outcomes) for outcomes in enumerate_outcomes(run, cases, rows_per_case=width, **options)]
