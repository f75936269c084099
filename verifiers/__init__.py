"""Acceptance rules by name, and the verifier that applies them to a target model."""

from specdec.interfaces import AcceptanceRule
from specdec.verifiers.block import Block
from specdec.verifiers.coupled import Coupled
from specdec.verifiers.follow import Follow
from specdec.verifiers.kseq import KSeq
from specdec.verifiers.recursive import Recursive
from specdec.verifiers.rejection import Rejection
from specdec.verifiers.threshold import Threshold
from specdec.verifiers.traversal import Traversal
from specdec.verifiers.typical import Typical
from specdec.verifiers.verifier import Verifier

RULES: dict[str, type[AcceptanceRule]] = {
    rule.name: rule for rule in (Follow, Rejection, Block, Recursive, Traversal, KSeq, Coupled, Typical, Threshold)
}

__all__ = [
    "RULES",
    "Block",
    "Coupled",
    "Follow",
    "KSeq",
    "Recursive",
    "Rejection",
    "Threshold",
    "Traversal",
    "Typical",
    "Verifier",
]
