"""Block verification: the longest prefix of a chain that passes, all prefixes tested with coins of their own."""

from __future__ import annotations

import torch

from specdec.interfaces import Acceptance, Noise, TargetLaws
from specdec.noise import RoundKey
from specdec.tree import TokenTree, TreeSpec
from specdec.verifiers.siblings import Siblings, normalised, unproved
from specdec.verifiers.walk import path_to


class Block:
    """Block verification (Sun et al. 2024, "Block Verification Accelerates Speculative Decoding", algorithm 2): exact for
    chains and, among rules for sampled chains, optimal.

    A prefix of i drafts carries the weight w_i = min(1, w_(i-1) p(x_i) / q(x_i)), w_0 = 1. It passes with probability
    R / (R + (1 - w_i)), where R is the mass of the positive part of w_i p - q behind it; the whole chain with w. The longest
    prefix that passes stays, and the next token is drawn from that positive part, or from p behind the whole chain.
    """

    name = "block"
    lossless = True

    def accepts(self, spec: TreeSpec) -> str | None:
        if not spec.is_chain:
            return "it tests prefixes of one path, and these trees branch; use a chain policy or the rule traversal"
        return unproved(spec)

    def __call__(self, tree: TokenTree, laws: TargetLaws, noise: Noise) -> Acceptance:
        if reason := self.accepts(tree.spec):
            raise ValueError(f"rule block is not exact for these trees: {reason}")
        rows = torch.arange(tree.batch_size, device=tree.device)
        target_BNV = laws.all()
        siblings = Siblings(tree)
        weight_B = target_BNV.new_ones(tree.batch_size)
        longest_B = torch.zeros_like(rows)
        final_BV = target_BNV[:, 0]
        for node in range(tree.max_nodes):
            rows = rows[tree.num_nodes_B[rows] > node]
            target_RV, weight_R = target_BNV[rows, node], weight_B[rows]
            goes_on = tree.num_nodes_B[rows] > node + 1
            rest_RV, passes_R = target_RV, weight_R.clone()
            if bool(goes_on.any()):
                on = rows[goes_on]
                draws = siblings.draws_BNJ[on, node, 0]
                draft_RV = siblings.laws(on, draws, target_RV[goes_on])
                left = (weight_R[goes_on, None] * target_RV[goes_on] - draft_RV).clamp_min(0)
                mass = left.sum(-1)
                short = mass + (1 - weight_R[goes_on])
                passes_R[goes_on] = torch.where(short > 0, mass / short.clamp_min(torch.finfo(mass.dtype).tiny), 0)
                rest_RV = target_RV.index_copy(0, goes_on.nonzero().squeeze(1), normalised(left, target_RV[goes_on]))
                token = tree.tokens_BN[on, node + 1][:, None]
                p, q = (law.gather(1, token).squeeze(1) for law in (target_RV[goes_on], draft_RV))
                weight_B = weight_B.index_copy(0, on, (weight_R[goes_on] * p / q).clamp_max(1))
            # The root needs no coin: the empty prefix is there when nothing longer passes.
            passed = (
                torch.ones_like(goes_on) if node == 0 else noise.bernoulli(passes_R, RoundKey("accept", node), rows)
            )
            longest_B = longest_B.index_copy(0, rows[passed], torch.full_like(rows[passed], node))
            final_BV = final_BV.index_copy(0, rows[passed], rest_RV[passed])
        everyone = torch.arange(tree.batch_size, device=tree.device)
        return path_to(tree, longest_B, noise.categorical(final_BV, RoundKey("residual", 0), everyone))
