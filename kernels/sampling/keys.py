"""The hash behind every random number, and what it is taken of."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


def mix(state: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64 (Steele, Lea, Flood 2014, section 3)."""
    # int64 arithmetic wraps like uint64; a right shift must drop the sign bits it drags in.
    state = state + _GOLDEN
    state = (state ^ ((state >> 30) & ((1 << 34) - 1))) * _MIX_1
    state = (state ^ ((state >> 27) & ((1 << 37) - 1))) * _MIX_2
    return state ^ ((state >> 31) & ((1 << 33) - 1))


@dataclass(frozen=True)
class RowKeys:
    """What the random number of each row is hashed from: int64 [R] each, `purpose` and perhaps `index` one for all.

    With `is_gumbel` a row has a number per token, hashed with the token as its index.
    """

    seeds_R: Tensor
    purpose: int
    counters_R: Tensor
    index: int | Tensor = 0
    is_gumbel: bool = False

    def states(self) -> Tensor:
        """The hash [R] that the index is still to be added to."""
        # The seed is hashed on its own: added to it unhashed, a purpose would be another seed's purpose.
        return mix(mix(mix(self.seeds_R) + self.purpose) ^ self.counters_R)

    def bits(self) -> Tensor:
        """53 random bits per row."""
        return (mix(self.states() + self.index) >> 11) & ((1 << 53) - 1)
