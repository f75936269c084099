"""Every random choice of the library: counter-based, keyed, and the same whoever else is in the batch."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)
_PURPOSES = {"target": 1, "draft": 2, "accept": 3, "residual": 4, "gumbel": 5}


@dataclass(frozen=True)
class PositionKey:
    """The target's own token `depth` + 1 places behind the root, keyed by its absolute position alone.

    Plain decoding draws with the same key, so a rule that follows the target's tokens emits what plain decoding emits.
    It serves `categorical` only: coins keyed by position would reuse numbers that shaped an earlier round.
    """

    depth: int


@dataclass(frozen=True)
class RoundKey:
    """A choice that belongs to one round: its purpose and the node or draw it is about (an int, or one per row)."""

    purpose: Literal["draft", "accept", "residual"]
    index: int | Tensor

    def __post_init__(self) -> None:
        if self.purpose not in ("draft", "accept", "residual"):
            raise ValueError(f"purpose {self.purpose!r} is not keyed by round; use draft, accept or residual")


@dataclass(frozen=True)
class GumbelKey:
    """The target's own token as for `PositionKey`, drawn by Gumbel noise: argmax of log p(v) + g(v), g keyed by position.

    The one key that may serve many choices, all decided by the same g: that is how a drafter looks at the noise that the
    target will be drawn with (argmax of log q(v) + g(v), the runners-up by removing the winner and asking again).
    """

    depth: int


Key = PositionKey | GumbelKey | RoundKey


class CounterNoise:
    """Noise of one step: request seed, round and root position per row, hashed with the key into 53 random bits.

    The hash is SplitMix64's finaliser over (seed, purpose, counter, index) (Steele, Lea, Flood 2014, "Fast splittable
    pseudorandom number generators", section 3), so a value depends on its own request and key and nothing else.
    """

    def __init__(
        self, seeds: Seq[int], rounds: Seq[int], positions: Seq[int], device: torch.device | str = "cpu"
    ) -> None:
        self.seeds_B = torch.tensor([_signed(seed) for seed in seeds], dtype=torch.int64, device=device)
        self.rounds_B = torch.tensor(list(rounds), dtype=torch.int64, device=device)
        self.positions_B = torch.tensor(list(positions), dtype=torch.int64, device=device)

    def select(self, rows: Seq[int]) -> CounterNoise:
        """The noise of some rows alone, for a drafter that works on part of the batch."""
        part = object.__new__(CounterNoise)
        index = torch.tensor(list(rows), dtype=torch.int64, device=self.seeds_B.device)
        part.seeds_B, part.rounds_B, part.positions_B = (
            self.seeds_B[index],
            self.rounds_B[index],
            self.positions_B[index],
        )
        return part

    def uniform(self, key: PositionKey | RoundKey, rows: Tensor) -> Tensor:
        """One float64 in [0, 1) per row."""
        index: int | Tensor
        if isinstance(key, PositionKey):
            purpose, counter, index = "target", self.positions_B[rows] + (key.depth + 1), 0
        else:
            purpose, counter, index = key.purpose, self.rounds_B[rows], key.index
        # The seed is hashed on its own: added to it unhashed, a purpose would be another seed's purpose.
        state = _mix(_mix(self.seeds_B[rows]) + _PURPOSES[purpose])
        state = _mix(_mix(state ^ counter) + index)
        return ((state >> 11) & ((1 << 53) - 1)).double() * 2.0**-53

    def bernoulli(self, prob_B: Tensor, key: RoundKey, rows: Tensor) -> Tensor:
        """True with probability `prob_B`: iff u < prob, strictly, so that probability zero never passes."""
        if not isinstance(key, RoundKey):
            raise TypeError(
                f"coins are keyed by round, not by {key!r}: position keys would reuse an earlier round's numbers"
            )
        return self.uniform(key, rows) < prob_B

    def categorical(self, probs_BV: Tensor, key: Key, rows: Tensor) -> Tensor:
        """One token per row by inversion of the cumulative law in float64, or by Gumbel noise under a `GumbelKey`; a token of
        probability zero is never drawn."""
        if isinstance(key, GumbelKey):
            return self._gumbel_max(probs_BV, key, rows)
        cumulative = probs_BV.cumsum(-1, dtype=torch.float64)
        total = cumulative[:, -1:].contiguous()
        token = torch.searchsorted(cumulative, self.uniform(key, rows)[:, None] * total, right=True)
        # Only a law without mass (the residual of a row that needs none) or with a subnormal total points past its last
        # possible token; the caller then gets an index inside the vocabulary.
        return torch.minimum(token, torch.searchsorted(cumulative, total)).squeeze(1)

    def _gumbel_max(self, probs_BV: Tensor, key: GumbelKey, rows: Tensor) -> Tensor:
        # argmax of log p + g is argmin of e / p with e exponential; only tokens with mass need a number.
        at, token = (probs_BV > 0).nonzero(as_tuple=True)
        state = _mix(_mix(self.seeds_B[rows]) + _PURPOSES["gumbel"]) ^ (self.positions_B[rows] + (key.depth + 1))
        bits = _mix(_mix(state)[at] + token) >> 11 & ((1 << 53) - 1)
        # Between the grid points of 53 bits, so that the logarithm is of neither 0 nor 1.
        exponential = -((bits.double() + 0.5) * 2.0**-53).log()
        times = torch.full(probs_BV.shape, torch.inf, dtype=torch.float64, device=probs_BV.device)
        return times.index_put((at, token), exponential / probs_BV[at, token].double()).argmin(-1)


def _mix(state: Tensor) -> Tensor:
    # int64 arithmetic wraps like uint64; a right shift must drop the sign bits it drags in.
    state = state + _GOLDEN
    state = (state ^ ((state >> 30) & ((1 << 34) - 1))) * _MIX_1
    state = (state ^ ((state >> 27) & ((1 << 37) - 1))) * _MIX_2
    return state ^ ((state >> 31) & ((1 << 33) - 1))


def _signed(seed: int) -> int:
    return (seed + (1 << 63)) % (1 << 64) - (1 << 63)
