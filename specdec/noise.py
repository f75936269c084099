"""Every random choice of the library: counter-based, keyed, and the same whoever else is in the batch."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from specdec.int_tensor import int_tensor
from specdec.kernels.dispatch import use_triton
from specdec.kernels.sampling import RowKeys, draw
from specdec.kernels.sampling.reference import gumbel_max

PURPOSES = {"target": 1, "draft": 2, "accept": 3, "residual": 4, "gumbel": 5}


@dataclass(frozen=True)
class PositionKey:
    """The target's own token `depth` + 1 places behind the root, keyed by its absolute position alone.

    Plain decoding draws with the same key, so a rule that follows the target's tokens emits what plain decoding emits.
    It serves `categorical` only: coins keyed by position would reuse numbers that shaped an earlier round. `depth` is one
    for all rows or one each.
    """

    depth: int | Tensor


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

    depth: int | Tensor


Key = PositionKey | GumbelKey | RoundKey


class CounterNoise:
    """Noise of one step: request seed, round and root position per row, hashed with the key into 53 random bits.

    The hash is SplitMix64's finaliser over (seed, purpose, counter, index) (Steele, Lea, Flood 2014, "Fast splittable
    pseudorandom number generators", section 3), so a value depends on its own request and key and nothing else.
    """

    def __init__(
        self, seeds: Seq[int], rounds: Seq[int], positions: Seq[int], device: torch.device | str = "cpu"
    ) -> None:
        self._seeds, self._rounds, self._positions = list(seeds), list(rounds), list(positions)
        self.device = torch.device(device)
        if self.device.type != "cpu":
            # The device takes copies and kernels in turn: these must not come behind a forward.
            _ = self.seeds_B, self.rounds_B, self.positions_B

    def select(self, rows: Seq[int]) -> CounterNoise:
        """The noise of some rows alone, for a drafter that works on part of the batch."""
        each = (self._seeds, self._rounds, self._positions)
        seeds, rounds, positions = ([values[row] for row in rows] for values in each)
        return CounterNoise(seeds, rounds, positions, self.device)

    # On the host made when they are asked for: greedy decoding never does.
    @cached_property
    def seeds_B(self) -> Tensor:
        return int_tensor([_signed(seed) for seed in self._seeds], self.device)

    @cached_property
    def rounds_B(self) -> Tensor:
        return int_tensor(self._rounds, self.device)

    @cached_property
    def positions_B(self) -> Tensor:
        return int_tensor(self._positions, self.device)

    def keys(self, key: Key, rows: Tensor) -> RowKeys:
        """What each row's number is hashed from, for the kernels that do so themselves."""
        seeds = self.seeds_B[rows]
        if isinstance(key, RoundKey):
            return RowKeys(seeds, PURPOSES[key.purpose], self.rounds_B[rows], key.index)
        is_gumbel = isinstance(key, GumbelKey)
        purpose = PURPOSES["gumbel" if is_gumbel else "target"]
        return RowKeys(seeds, purpose, self.positions_B[rows] + (key.depth + 1), is_gumbel=is_gumbel)

    def uniform(self, key: PositionKey | RoundKey, rows: Tensor) -> Tensor:
        """One float64 in [0, 1) per row."""
        return self.keys(key, rows).bits().double() * 2.0**-53

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
        if probs_BV.device.type != "cpu" or use_triton(probs_BV):
            # A parallel sum of floats may fall where nothing is added, and point at a token without mass; integers do not.
            return draw(probs_BV, self.keys(key, rows))
        if isinstance(key, GumbelKey):
            return gumbel_max(probs_BV, self.keys(key, rows))
        cumulative = probs_BV.cumsum(-1, dtype=torch.float64)
        total = cumulative[:, -1:].contiguous()
        token = torch.searchsorted(cumulative, self.uniform(key, rows)[:, None] * total, right=True)
        # Only a law without mass (the residual of a row that needs none) or with a subnormal total points past its last
        # possible token; the caller then gets an index inside the vocabulary.
        return torch.minimum(token, torch.searchsorted(cumulative, total)).squeeze(1)


def _signed(seed: int) -> int:
    return (seed + (1 << 63)) % (1 << 64) - (1 << 63)
