"""Eager acceptance, one tree at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.kernels.acceptance.trees import AcceptedPath, Coins, SampledTrees
from specdec.kernels.sampling.keys import RowKeys
from specdec.kernels.sampling.reference import invert_integers

FIXED, WITHOUT_REPLACEMENT = 0, 2


def follow_reference(tokens_BN: Tensor, parents_BN: Tensor, drawn_T: Tensor, first_B: Tensor) -> AcceptedPath:
    """See `follow`."""
    paths, extra = [], []
    for tokens, parents, first in zip(tokens_BN.tolist(), parents_BN.tolist(), first_B.tolist(), strict=True):
        path = [0]
        while True:
            token = int(drawn_T[first + path[-1]])
            found = [n for n, parent in enumerate(parents) if parent == path[-1] and tokens[n] == token]
            if not found:
                break
            path.append(found[0])
        paths.append(path)
        extra.append(token)
    return _accepted(paths, torch.tensor(extra, device=tokens_BN.device), tokens_BN)


def rejection_reference(trees: SampledTrees, laws_TV: Tensor, first_B: Tensor, coins: Coins) -> AcceptedPath:
    """See `rejection`."""
    paths, weights = [], []
    for b, (first, count) in enumerate(zip(first_B.tolist(), trees.num_nodes_B.tolist(), strict=True)):
        one = _Tree(trees, b)
        for depth in range(count):
            weight_V = target_V = laws_TV[first + depth]
            if depth + 1 == count:
                break
            token, draft_V = one.tokens[depth + 1], one.draft_law(one.draws.index(depth + 1), target_V)
            ratio = (target_V[token] / draft_V[token]).clamp_max(1)
            if not bool(_uniform(coins, coins.accept, b, depth) < ratio):
                left_V = (target_V - draft_V).clamp_min(0)
                weight_V = left_V if bool((left_V > 0).any()) else target_V
                break
        paths.append(list(range(depth + 1)))
        weights.append(weight_V)
    return _accepted(paths, _last(coins, paths, weights), trees.tokens_BN)


def traversal_reference(trees: SampledTrees, laws_TV: Tensor, first_B: Tensor, coins: Coins) -> AcceptedPath:
    """See `traversal`."""
    paths, weights = [], []
    for b, (first, count) in enumerate(zip(first_B.tolist(), trees.num_nodes_B.tolist(), strict=True)):
        one = _Tree(trees, b)
        law_NV = laws_TV[first : first + count].clone()
        weight_N, via, node = [law_NV.new_ones(())] * count, [-1] * count, 0
        waiting = [one.children(n) for n in range(count)]
        while True:
            if waiting[node]:
                draw, token = (drawn := waiting[node].pop(0)), one.tokens[one.draws[drawn]]
                draft_V = one.draft_law(draw, law_NV[node])
                weight = (weight_N[node] * law_NV[node, token] / draft_V[token]).clamp_max(1)
                if weight > 0:
                    node = one.draws[draw]
                    weight_N[node], via[node] = weight, draw
                    continue
            elif node == 0 or bool(_uniform(coins, coins.accept, b, node) < weight_N[node]):
                break
            else:
                node, draw = one.parents[node], via[node]
                draft_V = one.draft_law(draw, law_NV[node])
            left_V = (weight_N[node] * law_NV[node] - draft_V).clamp_min(0)
            mass = left_V.sum()
            whole = mass + (1 - weight_N[node])
            weight_N[node] = mass / whole if whole > 0 else torch.ones_like(mass)
            law_NV[node] = left_V / mass if mass > 0 else law_NV[node]
        path = [node]
        while path[0]:
            path.insert(0, one.parents[path[0]])
        paths.append(path)
        weights.append(law_NV[node])
    return _accepted(paths, _last(coins, paths, weights, by_node=True), trees.tokens_BN)


class _Tree:
    """One tree on the host; its laws stay where they are."""

    def __init__(self, trees: SampledTrees, b: int) -> None:
        self.tokens, self.parents = trees.tokens_BN[b].tolist(), trees.parents_BN[b].tolist()
        self.draws, self.kinds = trees.draws_BM[b].tolist(), trees.kinds_BM[b].tolist()
        self._laws_NV = None if trees.laws_BNV is None else trees.laws_BNV[b]

    def children(self, node: int) -> list[int]:
        """The draws of its children, as they were drawn."""
        return [m for m, child in enumerate(self.draws) if child >= 0 and self.parents[child] == node]

    def draft_law(self, draw: int, target_V: Tensor) -> Tensor:
        """The law [V] of a draw given the siblings drawn before it."""
        child = self.draws[draw]
        if self._laws_NV is None or self.kinds[draw] == FIXED:
            return torch.zeros_like(target_V).index_fill_(
                0, torch.tensor(self.tokens[child], device=target_V.device), 1
            )
        law_V = self._laws_NV[self.parents[child]].to(target_V.dtype)
        earlier = [m for m in self.children(self.parents[child]) if m < draw and self.kinds[m] == WITHOUT_REPLACEMENT]
        if self.kinds[draw] != WITHOUT_REPLACEMENT or not earlier:
            return law_V
        gone = torch.tensor([self.tokens[self.draws[m]] for m in earlier], device=target_V.device)
        left_V = law_V.index_fill(0, gone, 0)
        return left_V / left_V.sum() if bool((left_V > 0).any()) else law_V


def _uniform(coins: Coins, purpose: int, b: int, index: int) -> Tensor:
    return RowKeys(coins.seeds_B[b], purpose, coins.rounds_B[b], index).bits().double() * 2.0**-53


def _last(coins: Coins, paths: list[list[int]], weights: list[Tensor], by_node: bool = False) -> Tensor:
    """The token behind each path, its draw keyed by the depth or the node where it ends."""
    ends = [path[-1] if by_node else len(path) - 1 for path in paths]
    keys = RowKeys(coins.seeds_B, coins.residual, coins.rounds_B, torch.tensor(ends, device=coins.seeds_B.device))
    return invert_integers(torch.stack(weights), keys.bits())


def _accepted(paths: list[list[int]], extra_B: Tensor, tokens_BN: Tensor) -> AcceptedPath:
    padded = [path + [-1] * (tokens_BN.shape[1] - len(path)) for path in paths]
    count_B = torch.tensor([len(path) - 1 for path in paths], device=tokens_BN.device)
    return AcceptedPath(torch.tensor(padded, device=tokens_BN.device), count_B, extra_B)
