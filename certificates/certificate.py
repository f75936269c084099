"""The certificate of a rule on a policy's trees: the error of every check, and what it accepts beside the optimum."""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from specdec.certificates.check import Check, Finding, examine
from specdec.certificates.checks import (
    at_the_edges_of_chance,
    in_generations,
    in_one_round,
    in_recorded_laws,
    in_two_rows,
    under_all_parameters,
)
from specdec.certificates.optimum import drafting_laws, optimum
from specdec.certificates.processes import Case, round_laws
from specdec.certificates.worlds import KINDS, World
from specdec.drafters.growth import GrowingPolicy
from specdec.interfaces import AcceptanceRule
from specdec.tree import TreeSpec

# The laws on which accepted lengths are measured; a one-hot law would tell nothing.
MEASURED = ("sharp", "flat", "close", "independent", "zeros")


@dataclass(frozen=True)
class Length:
    """Expected accepted tokens of one round, the extra one not counted, and the most that a lossless rule can reach."""

    expected: float
    optimum: float


@dataclass(frozen=True)
class Certificate:
    """What was found of `rule` on trees of `tree`, drawn as `kind` says; `holds` where nothing is wrong.

    `findings` by name of the check; `lengths` by kind of laws, empty where a fault kept them from being measured. A rule
    that is not `lossless` owes nothing but to say so.
    """

    rule: str
    lossless: bool
    kind: str
    tree: str
    findings: Mapping[str, Finding]
    lengths: Mapping[str, Length]

    @property
    def max_error(self) -> float:
        """The largest error of all checks; NaN where a fault left one unmeasured."""
        errors = [finding.error for finding in self.findings.values()]
        return math.nan if any(math.isnan(error) for error in errors) else max(errors)

    @property
    def faults(self) -> dict[str, str]:
        """Check by check what is wrong, where anything is."""
        return {name: finding.by for name, finding in self.findings.items() if finding.by is not None}

    @property
    def holds(self) -> bool:
        return not self.lossless or not self.faults

    @property
    def expected_accepted(self) -> float:
        """The mean over the kinds of laws; NaN where a fault kept it from being measured."""
        return _mean([length.expected for length in self.lengths.values()])

    @property
    def optimum(self) -> float:
        return _mean([length.optimum for length in self.lengths.values()])


def certify(
    rule: AcceptanceRule,
    policy: GrowingPolicy,
    *,
    vocabs: Seq[int] = (3, 4),
    length: int = 3,
    tree: str | None = None,
) -> Certificate:
    """Runs a rule on a policy's trees under every outcome of chance, in float64, and compares with the target's law.

    One round is enumerated on each of the `vocabs`; the engine generates `length` tokens. The work grows with the number
    of drawn trees: a policy that draws a lot wants `vocabs=(3,)` and `length=2`. `tree` is what the certificate calls the
    policy. Raises ValueError where the rule itself refuses such trees.
    """
    if reason := rule.accepts(policy.spec):
        raise ValueError(f"rule {rule.name} is not exact for this policy, and says so: {reason}")
    findings = {check.name: examine(check) for check in checks(rule, policy, vocabs, length)}
    # A rule that cannot be enumerated has no length, and one that is biased could accept more than any honest one.
    faulty = any(math.isnan(finding.error) or finding.by == "key reuse" for finding in findings.values())
    lengths = {} if faulty else accepted_lengths(rule, policy, max(vocabs))
    name = type(policy).__name__ if tree is None else tree
    return Certificate(rule.name, rule.lossless, draw_kind(policy.spec), name, findings, lengths)


def checks(rule: AcceptanceRule, policy: GrowingPolicy, vocabs: Seq[int], length: int) -> list[Check]:
    """What a certificate is made of."""
    vocab = max(vocabs)
    return [
        *([in_recorded_laws(policy, vocab)] if policy.spec.is_sampled else []),
        in_one_round(rule, policy, vocabs=vocabs),
        in_two_rows(rule, policy),
        in_generations(rule, policy, length),
        under_all_parameters(rule, policy, vocab),
        at_the_edges_of_chance(rule, policy),
    ]


def accepted_lengths(rule: AcceptanceRule, policy: GrowingPolicy, vocab: int) -> dict[str, Length]:
    """What one round of full depth accepts, for each of the `MEASURED` kinds of laws: the mean over three contexts."""
    world = World.tree(vocab, policy.max_depth + 2)
    contexts = [(), (1,), (2,)]
    kinds = [KINDS.index(kind) for kind in MEASURED]
    cases = [Case(kind, world.walk(context), policy.max_depth) for kind in kinds for context in contexts]
    spans = round_laws(policy, rule, world, cases)
    trees = drafting_laws(policy, world, cases)
    expected = [sum(prob * (len(span) - 1) for span, prob in law.items()) for law in spans]
    best = [optimum(world, case.kind, case.state, law) for case, law in zip(cases, trees, strict=True)]
    width = len(contexts)
    return {
        kind: Length(_mean(expected[i * width : (i + 1) * width]), _mean(best[i * width : (i + 1) * width]))
        for i, kind in enumerate(MEASURED)
    }


def draw_kind(spec: TreeSpec) -> str:
    """How a tree's drafts are drawn, in a word: `fixed`, `iid`, `without_replacement`, `fixed+iid`."""
    return "+".join(kind.name.lower() for kind in sorted(spec.kinds))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan
