"""Certify a rule with a policy: the joint law of what they emit, enumerated on the production code."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from specdec.certificates.checks import TOLERANCE, generation_error, penalised_error
from specdec.certificates.optimum import optimum
from specdec.certificates.oracle import Scripts, TokenSpan, distance, enumerate_outcomes, product_law
from specdec.certificates.processes import Case, one_round, ragged_cases, round_laws
from specdec.certificates.worlds import World
from specdec.drafters.growth import GrowingPolicy
from specdec.interfaces import AcceptanceRule

# Laws whose expected lengths are averaged: what a draft and its target look like, without the degenerate cases.
TYPICAL_LAWS = ("sharp", "flat", "close", "independent", "zeros")


@dataclass(frozen=True)
class Certificate:
    """What was found: the largest error of each check, and the mean over `TYPICAL_LAWS` of the tokens expected of a round
    (the extra one included) beside the most that any lossless rule could reach on the same drafts.

    `optimum` is NaN where it was not asked for.
    """

    rule: str
    lossless: bool
    errors: dict[str, float] = field(default_factory=dict)
    expected_accepted: float = math.nan
    optimum: float = math.nan

    @property
    def max_error(self) -> float:
        return max(self.errors.values())

    @property
    def passed(self) -> bool:
        """Exact to 1e-12; a rule that is LOSSY by its own account does not have to be."""
        return not self.lossless or self.max_error < TOLERANCE


def certify(
    rule: AcceptanceRule,
    policy: GrowingPolicy,
    *,
    vocab_size: int = 3,
    generations: bool = True,
    with_optimum: bool = True,
) -> Certificate:
    """Runs rule and policy under every outcome of their random choices, in float64, and compares joint laws with the target's.

    Checks: `round` (all kinds of laws, ragged depths, strangers as batch mates), `pair` (two rows at once) and, unless
    `generations` is off, whole outputs of the engine over several rounds: `generation` (stop token and length limit inside
    accepted spans) and `parameters` (temperature, top-k and penalties along the drafted path). Raises ValueError where the
    rule says that it is not exact for the policy's trees.
    """
    if reason := rule.accepts(policy.spec):
        raise ValueError(f"rule {rule.name} is not exact for this policy: {reason}")
    depth = policy.max_depth
    world = World.tree(vocab_size, depth + 2)
    cases = ragged_cases(world, depth)
    laws = round_laws(policy, rule, world, cases)
    rounds = (
        world.continued_error(case.kind, case.state, law, depth + 1) for case, law in zip(cases, laws, strict=True)
    )
    errors = {"round": max(rounds), "pair": _pair_error(rule, policy)}
    if generations:
        behind = World.tree(3, 3 + 4).select("sharp", "independent", "zeros")
        errors["generation"] = generation_error(behind, rule, policy, 3)
        errors["parameters"] = penalised_error(rule, policy)
    full = [Case(world.kinds.index(kind), 0, depth) for kind in TYPICAL_LAWS]
    expected = [_expected(laws[cases.index(case)]) for case in full]
    best = best_length(policy, vocab_size) if with_optimum else math.nan
    return Certificate(rule.name, rule.lossless, errors, sum(expected) / len(full), best)


def best_length(policy: GrowingPolicy, vocab_size: int = 3) -> float:
    """The optimum that goes with a certificate's `expected_accepted`."""
    world = World.tree(vocab_size, policy.max_depth + 2)
    full = [Case(world.kinds.index(kind), 0, policy.max_depth) for kind in TYPICAL_LAWS]
    return sum(optimum(policy, world, case) for case in full) / len(full)


def _expected(law: dict[TokenSpan, float]) -> float:
    return sum(prob * len(span) for span, prob in law.items())


def _pair_error(rule: AcceptanceRule, policy: GrowingPolicy) -> float:
    """Error of the joint law of two rows, with laws and contexts of their own, in one batch."""
    world = World.tree(2, policy.max_depth + 3).select("independent", "close")
    length = 2
    pair = (Case(0, 0, min(policy.max_depth, 2)), Case(1, 1, 1))

    def run(batch: list[tuple[Case, Case]], scripts: Scripts) -> list[tuple[TokenSpan, ...]]:
        emitted = one_round(policy, rule, world, [row for case in batch for row in case], scripts.noise())[1]
        return list(zip(emitted[::2], emitted[1::2], strict=True))

    (outcomes,) = enumerate_outcomes(run, [pair], rows_per_case=2)
    law: dict[tuple[TokenSpan, TokenSpan], float] = {}
    for prob, spans in outcomes:
        ends = (world.continued(row.kind, row.state, span, length) for row, span in zip(pair, spans, strict=True))
        for both, behind in product_law(*ends).items():
            law[both] = law.get(both, 0.0) + prob * behind
    return distance(law, product_law(*(world.continued(row.kind, row.state, (), length) for row in pair)))
