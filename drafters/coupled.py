"""Coupled drafting: the tree holds what would win if the draft's law were the target's, under the target's own noise."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from specdec.drafters.growth import DraftRound, FixedPolicy, Grown, NextTokens, TopK
from specdec.interfaces import Noise
from specdec.noise import GumbelKey

# How often the winner, the runner-up, ... of the draft's race is the target's token; only the shape of the tree follows.
_HITS, _DECAY = math.log(0.75), math.log(0.25)


class Coupled(FixedPolicy):
    """The `k` best of log q + g at each node, g the Gumbel noise that the rule `coupled` draws the target's token with;
    `depth` levels, the `total` most promising nodes (Daliri et al. 2025, "Coupling without communication and
    drafter-invariant speculative decoding"; top-k of perturbed logits: Kool et al. 2019, "Stochastic beams").

    q is the draft law under the request's own sampling parameters; where it has fewer than k tokens, as at temperature 0,
    the likeliest others follow. Given the noise nothing is left to chance, so the nodes are FIXED.
    """

    def __init__(self, total: int = 16, depth: int = 5, k: int = 4) -> None:
        self._shape = TopK(total, depth, k)
        self.spec = self._shape.spec
        self.max_depth, self.max_nodes = self._shape.max_depth, self._shape.max_nodes
        self.max_expanded = self._shape.max_expanded

    def admits(self, ranks: tuple[int, ...], num_nodes: int) -> bool:
        return self._shape.admits(ranks, num_nodes)

    def grow(self, draft: DraftRound, noise: Noise) -> Grown:
        return self._shape.grow(_RacedRound(draft, noise), noise)


class _RacedRound:
    """A drafter's round whose likeliest tokens are those that win under the noise."""

    def __init__(self, draft: DraftRound, noise: Noise) -> None:
        self._draft, self.noise = draft, noise
        self.roots_B, self.limits, self.vocab_size = draft.roots_B, draft.limits, draft.vocab_size
        # The drafted tokens above each expanded node, itself included.
        self._paths_BXK = draft.roots_B.new_full((len(draft.limits), 1, max(max(draft.limits), 1)), -1)

    def expand_root(self) -> _RacedNext:
        return _RacedNext(self, self._draft.expand_root(), self._paths_BXK, 0)

    def expand(self, tokens_BW: Tensor, parents_BW: Tensor, depth: int) -> _RacedNext:
        paths_BWK = self._paths_BXK.gather(1, parents_BW[..., None].expand(-1, -1, self._paths_BXK.shape[2])).clone()
        paths_BWK[..., depth - 1] = tokens_BW
        self._paths_BXK = torch.cat([self._paths_BXK, paths_BWK], 1)
        return _RacedNext(self, self._draft.expand(tokens_BW, parents_BW, depth), paths_BWK, depth)


class _RacedNext:
    def __init__(self, draft: _RacedRound, following: NextTokens, paths_BWK: Tensor, depth: int) -> None:
        self._noise, self._following, self._paths_BWK, self._key = draft.noise, following, paths_BWK, GumbelKey(depth)
        self._is_live_B = torch.tensor(draft.limits, device=paths_BWK.device) > depth

    def laws(self, paths_BWK: Tensor) -> Tensor:
        return self._following.laws(paths_BWK)

    def top(self, k: int) -> tuple[Tensor, Tensor]:
        """The first k of the race, then the likeliest others; scores say what a place in that order is worth."""
        # Rows that may not go so deep have no use for a child, and no law to race by.
        left_BWV = self._following.laws(self._paths_BWK) * self._is_live_B[:, None, None]
        order, exists = [], []
        for _ in range(min(k, left_BWV.shape[2])):
            mass = left_BWV.sum(-1, keepdim=True)
            rows, nodes = (mass[..., 0] > 0).nonzero(as_tuple=True)
            won = self._noise.categorical(left_BWV[rows, nodes] / mass[rows, nodes], self._key, rows)
            order.append(torch.zeros_like(mass[..., 0], dtype=torch.int64).index_put((rows, nodes), won))
            exists.append(mass[..., 0] > 0)
            left_BWV[rows, nodes, won] = 0
        likeliest_BWk, logprobs_BWk = self._following.top(k)
        raced_BWk, is_raced_BWk = torch.stack(order, 2), torch.stack(exists, 2)
        known = ((likeliest_BWk[..., None] == raced_BWk[:, :, None]) & is_raced_BWk[:, :, None]).any(3)
        tokens = torch.cat([raced_BWk, likeliest_BWk], 2)
        usable = torch.cat([is_raced_BWk, ~known & (logprobs_BWk > -torch.inf)], 2)
        first = usable.logical_not().sort(dim=2, stable=True).indices[..., :k]
        worth = _HITS + _DECAY * torch.arange(k, device=tokens.device)
        scores = torch.where(usable.gather(2, first), worth, -torch.inf)
        return tokens.gather(2, first), scores
