"""What an acceptance kernel is told of trees and chance, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class SampledTrees:
    """Token trees with the draws they were made of, as `TokenTree` holds them; all int64 but the laws.

    `kinds_BM`: 0 chosen without chance, 1 i.i.d., 2 without replacement. `laws_BNV` None: all of kind 0.
    """

    tokens_BN: Tensor
    parents_BN: Tensor
    num_nodes_B: Tensor
    draws_BM: Tensor
    kinds_BM: Tensor
    laws_BNV: Tensor | None


@dataclass(frozen=True)
class Coins:
    """What the random numbers of a round are hashed from: int64 [B], and the purposes of coins and of the last draw."""

    seeds_B: Tensor
    rounds_B: Tensor
    accept: int
    residual: int


@dataclass(frozen=True)
class AcceptedPath:
    """Accepted nodes root first, -1 padded to the trees' width; how many of them were drafted; the token behind them."""

    path_BN: Tensor
    num_accepted_B: Tensor
    next_token_B: Tensor
