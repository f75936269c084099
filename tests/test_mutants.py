"""Known-wrong variants of the production code: each must be caught, and the code as it is must pass the same check."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

from specdec.certificates.catalogue import MUTANTS
from specdec.certificates.mutants import Check, Mutant, in_one_round, mutated, verdict
from specdec.drafters import Sampled
from specdec.drafters.growth import DraftRound, Grown
from specdec.interfaces import Noise
from specdec.verifiers import Follow, Rejection, Verifier


@cache
def unmodified(check: Check) -> tuple[str, float]:
    return verdict(check)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_is_caught(mutant: Mutant) -> None:
    by, error = unmodified(mutant.check)
    assert by == "nothing" and error < 1e-12
    with mutated(mutant):
        by, effect = verdict(mutant.check)
    assert by == (mutant.by or mutant.check.by)
    # Another row's number is as good as one's own where nobody uses it twice: the law stays, the seed's promise does not.
    assert by == "batch mates" or not effect <= 1e-6


def test_mutants_are_gone_afterwards() -> None:
    with mutated(MUTANTS[0]):
        pass
    assert unmodified(MUTANTS[0].check)[0] == verdict(MUTANTS[0].check)[0] == "nothing"


def test_dropping_what_was_drawn_is_refused_where_it_is_told() -> None:
    """The honest form of the mutant that drops unlikely drafts: trees that say so meet a ValueError, early and late."""

    class Dropping(Sampled):
        def __init__(self) -> None:
            super().__init__([1, 1])
            self.spec = replace(self.spec, adapted=False)

        def grow(self, draft: DraftRound, noise: Noise) -> Grown:
            grown = super().grow(draft, noise)
            return replace(grown, tree=replace(grown.tree, adapted=False))

    policy = Dropping()
    with pytest.raises(ValueError, match=r"not exact for this policy: .*dropped"):
        Verifier(None, Rejection()).require(policy.spec)  # type: ignore[arg-type]
    assert verdict(in_one_round(Rejection(), policy))[0] == "construction"
    assert verdict(in_one_round(Follow(), policy))[0] == "nothing"
