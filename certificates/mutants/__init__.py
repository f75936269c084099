"""Known-wrong variants of the production code: each must be caught, and the code as it is must pass the same check."""

from specdec.certificates.mutants import chains, drawing, engine, following
from specdec.certificates.mutants.mutant import Mutant, Trial, attempt, mutated

MUTANTS: list[Mutant] = [*chains.MUTANTS, *following.MUTANTS, *drawing.MUTANTS, *engine.MUTANTS]

__all__ = ["MUTANTS", "Mutant", "Trial", "attempt", "mutated"]
