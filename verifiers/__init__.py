"""Acceptance rules by name, and the verifier that applies them to a target model."""

from specdec.interfaces import AcceptanceRule
from specdec.verifiers.follow import Follow
from specdec.verifiers.rejection import Rejection
from specdec.verifiers.verifier import Verifier

RULES: dict[str, type[AcceptanceRule]] = {rule.name: rule for rule in (Follow, Rejection)}

__all__ = ["RULES", "Follow", "Rejection", "Verifier"]
