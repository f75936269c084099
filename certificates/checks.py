"""What is checked of rules and policies: a certificate is made of these checks, and every mutant has to fail one."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from unittest.mock import patch

import torch

from specdec import SamplingParams
from specdec.certificates.check import Check
from specdec.certificates.oracle import (
    Scripts,
    TokenSpan,
    distance,
    enumerate_outcomes,
    law_of,
    product_law,
    recorded_prob,
)
from specdec.certificates.processes import (
    Case,
    engine_laws,
    one_round,
    outputs_error,
    ragged_cases,
    round_error,
    round_laws,
    toy_engine,
)
from specdec.certificates.worlds import KINDS, TableRound, World
from specdec.drafters.growth import GrowingPolicy
from specdec.interfaces import AcceptanceRule, TreePolicy
from specdec.noise import CounterNoise

# Prompts of one to four tokens; the first names the kind of laws, so that each row has laws of its own.
PROMPTS: list[tuple[Seq[int], ...]] = [((0,),), ((1, 2),), ((2, 1, 0, 1),)]
STOP = 2
EVERYTHING = SamplingParams(
    temperature=0.8,
    top_k=3,
    top_p=0.9,
    min_p=0.12,
    repetition_penalty=1.3,
    presence_penalty=0.4,
    frequency_penalty=0.7,
    logit_bias={0: 0.6, 1: -0.4},
    max_new_tokens=3,
)


def in_one_round(
    rule: AcceptanceRule, policy: GrowingPolicy, kinds: Seq[str] = KINDS, vocabs: Seq[int] = (3,)
) -> Check:
    """The joint law behind one round: all kinds of laws, ragged depths, one batch per vocabulary size.

    Rounds are independent given what has been emitted, so this is the law of every length.
    """
    length = policy.max_depth + 1

    def error(share: bool = False) -> float:
        errors = []
        for vocab in vocabs:
            world = World.tree(vocab, policy.max_depth + 2).select(*kinds)
            cases = ragged_cases(world, policy.max_depth)
            errors.append(round_error(policy, rule, world, cases, length, share=share))
        return max(errors)

    def joint_error() -> float:
        coins = World.tree(2, policy.max_depth + 3).select("independent", "close")
        rows = Case(0, 0, policy.max_depth), Case(1, 1, policy.max_depth)

        def run(pairs: list[tuple[Case, Case]], scripts: Scripts) -> list[tuple[TokenSpan, ...]]:
            return [tuple(one_round(policy, rule, coins, pairs[0], scripts.noise())[1])]

        (outcomes,) = enumerate_outcomes(run, [rows], rows_per_case=2, max_batch=1)
        law: dict[tuple[TokenSpan, TokenSpan], float] = {}
        for prob, pair in outcomes:
            ends = (coins.continued(row.kind, row.state, span, length) for row, span in zip(rows, pair, strict=True))
            for both, q in product_law(*ends).items():
                law[both] = law.get(both, 0.0) + prob * q
        return distance(law, product_law(*(coins.continued(row.kind, row.state, (), length) for row in rows)))

    return Check("one round", error, joint_error)


def in_two_rows(rule: AcceptanceRule, policy: GrowingPolicy, depth: int = 1) -> Check:
    """The joint law of two rows with laws and depths of their own: the product of the target's."""
    length = policy.max_depth + 1

    def error(share: bool = False) -> float:
        world = World.tree(3, policy.max_depth + 3)
        cases = [
            (Case(KINDS.index(one), 0, min(depth, policy.max_depth)), Case(KINDS.index(other), world.walk([1]), 1))
            for one, other in (("sharp", "independent"), ("close", "zeros"), ("one_hot_target", "flat"))
        ]

        def run(batch: list[tuple[Case, Case]], scripts: Scripts) -> list[tuple[TokenSpan, TokenSpan]]:
            emitted = one_round(policy, rule, world, [row for pair in batch for row in pair], scripts.noise())[1]
            return list(zip(emitted[::2], emitted[1::2], strict=True))

        errors = []
        for case, outcomes in zip(cases, enumerate_outcomes(run, cases, rows_per_case=2, share=share), strict=True):
            alone = round_laws(policy, rule, world, case, share=share)
            errors.append(distance(law_of(outcomes), product_law(*alone)))
            for row, law in zip(case, alone, strict=True):
                errors.append(world.continued_error(row.kind, row.state, law, length))
        return max(errors)

    return Check("two rows", error)


def in_recorded_laws(policy: GrowingPolicy, vocab: int = 3) -> Check:
    """The probability of drawn trees as their own draws, kinds and draft laws tell it."""
    world = World.tree(vocab, policy.max_depth + 1)

    def run(rows: list[Case], scripts: Scripts) -> list[float]:
        kinds_B, states_B = (torch.tensor([getattr(row, name) for row in rows]) for name in ("kind", "state"))
        draft = TableRound(world, kinds_B, states_B, [row.limit for row in rows])
        tree = policy.grow(draft, scripts.noise()).tree
        return [recorded_prob(tree, row) for row in range(len(rows))]

    def error(share: bool = False) -> float:
        outcomes = enumerate_outcomes(run, ragged_cases(world, policy.max_depth), share=share)
        whole = max(abs(sum(prob for prob, _ in case) - 1) for case in outcomes)
        return max(whole, *(abs(prob - recorded) for case in outcomes for prob, recorded in case))

    return Check("recorded law", error)


def in_generations(
    rule: AcceptanceRule,
    policy: TreePolicy,
    length: int,
    kinds: Seq[tuple[str, str, str]] = (("sharp", "independent", "zeros"), ("close", "one_hot_target", "silent_draft")),
) -> Check:
    """The law of whole outputs of the engine: several rounds, a stop token and a length limit inside accepted spans,
    prompts of several chunks, real pages."""
    params = SamplingParams(temperature=1.0, max_new_tokens=length, stop_token_ids=(STOP,))

    def error(share: bool = False) -> float:
        # The longest prompt and all that may be drafted behind it.
        worlds = [World.tree(3, length + 4).select(*three) for three in kinds]
        return max(outputs_error(world, rule, policy, PROMPTS, params, share=share) for world in worlds)

    def joint_error() -> float:
        coins = World.tree(2, length + 4).select("independent", "close")
        short = SamplingParams(temperature=1.0, max_new_tokens=2)
        (law,) = engine_laws(coins, rule, policy, [((0,), (1,))], short, max_batch=1)
        spans = law_of((prob, (one, other)) for ((one, _), (other, _)), prob in law.items())
        return distance(spans, product_law(coins.stopped_law(0, 0, 2), coins.stopped_law(1, 0, 2)))

    return Check("generations", error, joint_error)


def under_all_parameters(
    rule: AcceptanceRule, policy: TreePolicy, vocab: int = 4, params: SamplingParams = EVERYTHING
) -> Check:
    """The law of whole outputs with every sampling parameter on, penalties along each node's own history."""

    def error(share: bool = False) -> float:
        world = World.markov(vocab, order=2).select("sharp", "independent", "flat")
        return outputs_error(world, rule, policy, PROMPTS, params, share=share)

    return Check("sampling parameters", error)


def at_the_edges_of_chance(rule: AcceptanceRule, policy: GrowingPolicy) -> Check:
    """Share of rows that emit an impossible token when every random number is the smallest or the largest there is."""

    def error() -> float:
        world = World.tree(3, policy.max_depth + 2)
        rows = [case for case in ragged_cases(world, policy.max_depth) if case.limit]
        impossible = 0
        for u in (0.0, 1 - 2.0**-53):
            noise = CounterNoise([0] * len(rows), [0] * len(rows), [0] * len(rows))
            with patch.object(CounterNoise, "uniform", lambda self, key, at, u=u: torch.full((len(at),), u).double()):
                _, emitted = one_round(policy, rule, world, rows, noise)
            for row, span in zip(rows, emitted, strict=True):
                states = [world.walk(span[:i], row.state) for i in range(len(span))]
                impossible += any(world.target_KCV[row.kind, s, t] == 0 for s, t in zip(states, span, strict=True))
        return impossible / (2 * len(rows))

    return Check("edges of chance", error)


def with_the_same_seed(rule: AcceptanceRule, policy: TreePolicy) -> Check:
    """The share of requests that a drafted run answers otherwise than a plain one with the same seed: real noise, float32
    laws, many seeds and kinds of laws in one batch. For rules that promise it."""

    def error() -> float:
        world = World.markov(vocab=len(KINDS), order=2)
        prompts = [[kind, seed % world.vocab_size] for kind in range(len(KINDS)) for seed in range(8)]
        params = [
            SamplingParams(
                temperature=(1.0, 0.7, 0.0)[i % 3], seed=i, max_new_tokens=10, stop_token_ids=(3,) if i % 2 else ()
            )
            for i in range(len(prompts))
        ]
        engines = (toy_engine(world, rule, tree) for tree in (None, policy))
        plain, drafted = (
            [(result.token_ids, result.finish_reason) for result in engine.generate(prompts, params)]
            for engine in engines
        )
        return sum(one != other for one, other in zip(plain, drafted, strict=True)) / len(plain)

    return Check("same seed", error)
