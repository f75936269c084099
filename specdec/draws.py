"""How drafted tokens come to be, and what a kind of tree is as far as exactness goes."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class DrawKind(IntEnum):
    """How a drafted child came to be: without chance, or as one of several draws of its parent's draft law."""

    FIXED = 0
    IID = 1
    WITHOUT_REPLACEMENT = 2


@dataclass(frozen=True)
class TreeSpec:
    """What an acceptance rule must know about trees to say whether it is exact for them.

    `kinds` are the draw kinds that can occur; `is_chain`: every node has at most one child and one draw; `has_laws`:
    stochastic draws come with their law; `adapted`: whether a child exists was decided before it was drawn.
    """

    kinds: frozenset[DrawKind]
    is_chain: bool
    has_laws: bool = True
    adapted: bool = True

    @property
    def is_sampled(self) -> bool:
        return bool(self.kinds - {DrawKind.FIXED})
