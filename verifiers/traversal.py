"""Traversal verification: from the leaves to the root, a node is given up only when everything below it has been."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.interfaces import Acceptance, Noise, TargetLaws
from specdec.noise import RoundKey
from specdec.tree import TokenTree, TreeSpec
from specdec.verifiers import on_device
from specdec.verifiers.siblings import Siblings, normalised, unproved
from specdec.verifiers.walk import path_to


class Traversal:
    """Traversal verification (Weng et al. 2025, "Traversal Verification for Speculative Tree Decoding", algorithm 1): exact
    for any mix of FIXED, i.i.d. and without-replacement children; on chains it is block verification.

    A node carries a weight w and a law r, at first 1 and p at the root. A child drawn from q gets w' = min(1, w r/q) at its
    token. Depth first, a node whose draws are used up passes with probability w: the path to it stays, and the next token is
    drawn from r. Where it fails, its parent goes on with the normalised positive part of w r - q and, R being that part's
    mass, the weight R / (R + (1 - w)). Of an i.i.d. token's second draw only that update is left.
    """

    name = "traversal"
    lossless = True

    def accepts(self, spec: TreeSpec) -> str | None:
        return unproved(spec)

    def __call__(self, tree: TokenTree, laws: TargetLaws, noise: Noise) -> Acceptance:
        if reason := self.accepts(tree.spec):
            raise ValueError(f"rule traversal is not exact for these trees: {reason}")
        if (verdict := on_device.traversal(tree, laws, noise)) is not None:
            return verdict
        state = _State(tree, laws.all())
        rows = torch.arange(tree.batch_size, device=tree.device)
        while len(rows):
            rows = state.descend(rows)
            nodes = state.node_B[rows]
            # The root needs no coin: its weight stays one.
            passed = nodes == 0
            coins = (~passed).nonzero().squeeze(1)
            weights = state.weight_BN[rows[coins], nodes[coins]]
            passed[coins] = noise.bernoulli(weights, RoundKey("accept", nodes[coins]), rows[coins])
            rows = rows[~passed]
            state.give_up(rows)
        everyone = torch.arange(tree.batch_size, device=tree.device)
        final_BV = state.law_BNV[everyone, state.node_B]
        return path_to(tree, state.node_B, noise.categorical(final_BV, RoundKey("residual", state.node_B), everyone))


class _State:
    """Where each row stands, and per node its weight, what is left of its law, and its next draw."""

    def __init__(self, tree: TokenTree, law_BNV: Tensor) -> None:
        # The laws are used up, and they may be the caller's own.
        self._tree, self._siblings, self.law_BNV = tree, Siblings(tree), law_BNV.clone()
        self.node_B = torch.zeros_like(tree.num_nodes_B)
        self.weight_BN = torch.ones_like(law_BNV[..., 0])
        self._place_BN = torch.zeros_like(tree.tokens_BN)
        self._via_BN = torch.full_like(tree.tokens_BN, -1)

    def descend(self, rows: Tensor) -> Tensor:
        """Goes down the next draws until every row stands at a node without any left; returns `rows`."""
        going = rows
        while len(going):
            nodes = self.node_B[going]
            place = self._place_BN[going, nodes]
            width = self._siblings.draws_BNJ.shape[2]
            if width == 0:
                break
            draws = torch.where(place < width, self._siblings.draws_BNJ[going, nodes, place.clamp_max(width - 1)], -1)
            going, nodes, draws = going[draws >= 0], nodes[draws >= 0], draws[draws >= 0]
            self._place_BN[going, nodes] += 1
            children = self._siblings.child(going, draws)
            law_RV = self.law_BNV[going, nodes]
            draft_RV = self._siblings.laws(going, draws, law_RV)
            token = self._tree.tokens_BN[going, children][:, None]
            r, q = (law.gather(1, token).squeeze(1) for law in (law_RV, draft_RV))
            # A token that was given up has nothing left in r, so its second draw gets no weight.
            weight = (self.weight_BN[going, nodes] * r / q).clamp_max(1)
            empty = weight <= 0
            self._take_off(going[empty], nodes[empty], draft_RV[empty])
            down, child = going[~empty], children[~empty]
            self.node_B[down] = child
            self.weight_BN[down, child] = weight[~empty]
            self._via_BN[down, child] = draws[~empty]
        return rows

    def give_up(self, rows: Tensor) -> None:
        """Each row's node has failed: its parent goes on with what the draw leaves over."""
        nodes = self.node_B[rows]
        parents = self._tree.parents_BN[rows, nodes]
        draft_RV = self._siblings.laws(rows, self._via_BN[rows, nodes], self.law_BNV[rows, parents])
        self._take_off(rows, parents, draft_RV)
        self.node_B[rows] = parents

    def _take_off(self, rows: Tensor, nodes: Tensor, draft_RV: Tensor) -> None:
        weight, law_RV = self.weight_BN[rows, nodes], self.law_BNV[rows, nodes]
        left = (weight[:, None] * law_RV - draft_RV).clamp_min(0)
        mass = left.sum(-1)
        # Not mass + 1 - weight, which rounds a small mass away.
        whole = mass + (1 - weight)
        self.weight_BN[rows, nodes] = torch.where(whole > 0, mass / whole.clamp_min(torch.finfo(mass.dtype).tiny), 1)
        self.law_BNV[rows, nodes] = normalised(left, law_RV)
