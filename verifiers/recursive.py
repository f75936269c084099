"""Recursive rejection: the children of a node tested one after another, each against what the ones before left over."""

from __future__ import annotations

import torch

from specdec.interfaces import Acceptance, Noise, TargetLaws
from specdec.noise import RoundKey
from specdec.tree import TokenTree, TreeSpec
from specdec.verifiers.siblings import Siblings, normalised, unproved
from specdec.verifiers.walk import Walk


class Recursive:
    """Multi-round rejection on trees: exact for any mix of FIXED, i.i.d. and without-replacement children.

    i.i.d. draws: multi-step speculative sampling (Miao et al. 2023, SpecInfer, algorithm 2); without replacement: recursive
    rejection sampling (Jeon et al. 2024, RSD, algorithm 1; Chen et al. 2024, Sequoia, algorithm 2). At each node r starts as
    the target's law; the next draw, from law q, is kept with probability min(1, r/q), else r becomes the normalised positive
    part of r - q. A FIXED child is a draw from the law that puts all mass on it.
    """

    name = "recursive"
    lossless = True

    def accepts(self, spec: TreeSpec) -> str | None:
        return unproved(spec)

    def __call__(self, tree: TokenTree, laws: TargetLaws, noise: Noise) -> Acceptance:
        if reason := self.accepts(tree.spec):
            raise ValueError(f"rule recursive is not exact for these trees: {reason}")
        siblings = Siblings(tree)
        walk = Walk(tree)
        while len(walk.rows):
            rows, nodes = walk.rows, walk.nodes
            rest_RV = laws.at(walk.node_B)[rows]
            child_R = torch.full_like(rows, -1)
            for draws_R in siblings.draws_BNJ[rows, nodes].unbind(1):
                tested = ((draws_R >= 0) & (child_R < 0)).nonzero().squeeze(1)
                if not len(tested):
                    break
                draws, at = draws_R[tested], rows[tested]
                draft_RV = siblings.laws(at, draws, rest_RV[tested])
                token = siblings.tokens_BM[at, draws][:, None]
                r, q = (law.gather(1, token).squeeze(1) for law in (rest_RV[tested], draft_RV))
                kept = noise.bernoulli((r / q).clamp_max(1), RoundKey("accept", draws), at)
                child_R = child_R.index_copy(0, tested[kept], siblings.child(at, draws)[kept])
                lost = tested[~kept]
                left = (rest_RV[lost] - draft_RV[~kept]).clamp_min(0)
                rest_RV = rest_RV.index_copy(0, lost, normalised(left, rest_RV[lost]))
            token_R = torch.zeros_like(rows)
            ends = child_R < 0
            token_R[ends] = noise.categorical(rest_RV[ends], RoundKey("residual", nodes[ends]), rows[ends])
            walk.step(child_R, token_R)
        return walk.acceptance()
