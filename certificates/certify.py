"""Certify a rule with a policy: the joint law of what they emit, enumerated on the production code."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from specdec.certificates.checks import TOLERANCE, generation_error, parameters_error
from specdec.certificates.optimum import optimum
from specdec.certificates.oracle import (
    BatchDependentError,
    KeyReusedError,
    NotALawError,
    Scripts,
    TokenSpan,
    distance,
    enumerate_outcomes,
    product_law,
)
from specdec.certificates.processes import Case, one_round, ragged_cases, round_laws
from specdec.certificates.worlds import World, WrongContextError
from specdec.drafters.growth import GrowingPolicy
from specdec.interfaces import AcceptanceRule

# Laws whose expected lengths are averaged: what a draft and its target look like, without the degenerate cases.
TYPICAL_LAWS = ("sharp", "flat", "close", "independent", "zeros")
# What the oracle and the toy model refuse to go on with: no law comes out, so there is no error to measure.
FAULTS = (KeyReusedError, NotALawError, BatchDependentError, WrongContextError)


@dataclass(frozen=True)
class Certificate:
    """What was found: the largest error of each check, and the mean over `TYPICAL_LAWS` of the tokens expected of a round
    (the extra one included) beside the most that any lossless rule could reach on the same drafts. `total_variation` is that
    of a round's joint law, the largest over all cases: what a LOSSY rule does to the law in small worlds.

    A check that a fault cut short (a number used twice, a choice without a law, a row that depends on its batch mates) has an
    infinite error, and `faults` says why; without `round` there is no expected length and no variation. `optimum` is NaN where
    it was not asked for.
    """

    rule: str
    lossless: bool
    errors: dict[str, float] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)
    expected_accepted: float = math.nan
    optimum: float = math.nan
    total_variation: float = math.nan

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
    accepted spans) and `parameters` (every sampling parameter, penalties along the drafted path). Raises ValueError where the
    rule says that it is not exact for the policy's trees.
    """
    if reason := rule.accepts(policy.spec):
        raise ValueError(f"rule {rule.name} is not exact for this policy: {reason}")
    world = World.tree(vocab_size, policy.max_depth + 2)
    cases = ragged_cases(world, policy.max_depth)
    laws: list[dict[TokenSpan, float]] = []

    def worst(measure: Callable[[int, int, dict[TokenSpan, float], int], float]) -> float:
        return max(
            measure(case.kind, case.state, law, policy.max_depth + 1) for case, law in zip(cases, laws, strict=True)
        )

    def round_error() -> float:
        laws.extend(round_laws(policy, rule, world, cases))
        return worst(world.continued_error)

    checks: dict[str, Callable[[], float]] = {"round": round_error, "pair": lambda: _pair_error(rule, policy)}
    if generations:
        behind = World.tree(3, 3 + 4).select("sharp", "independent", "zeros")
        checks["generation"] = lambda: generation_error(behind, rule, policy, 3)
        checks["parameters"] = lambda: parameters_error(rule, policy)
    errors, faults = dict[str, float](), dict[str, str]()
    for name, check in checks.items():
        try:
            errors[name] = check()
        except FAULTS as fault:
            errors[name], faults[name] = math.inf, f"{type(fault).__name__}: {fault}"
    best = best_length(policy, vocab_size) if with_optimum else math.nan
    variation = worst(world.continued_variation) if laws else math.nan
    return Certificate(rule.name, rule.lossless, errors, faults, _expected(world, policy, cases, laws), best, variation)


def best_length(policy: GrowingPolicy, vocab_size: int = 3) -> float:
    """The optimum that goes with a certificate's `expected_accepted`."""
    world = World.tree(vocab_size, policy.max_depth + 2)
    full = [Case(world.kinds.index(kind), 0, policy.max_depth) for kind in TYPICAL_LAWS]
    return sum(optimum(policy, world, case) for case in full) / len(full)


def _expected(world: World, policy: GrowingPolicy, cases: list[Case], laws: list[dict[TokenSpan, float]]) -> float:
    if not laws:
        return math.nan
    full = [laws[cases.index(Case(world.kinds.index(kind), 0, policy.max_depth))] for kind in TYPICAL_LAWS]
    return sum(prob * len(span) for law in full for span, prob in law.items()) / len(full)


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
