"""K-SEQ: all i.i.d. children of a node tested with one acceptance probability, tuned to their number."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.interfaces import Acceptance, Noise, TargetLaws
from specdec.noise import RoundKey
from specdec.tree import DrawKind, TokenTree, TreeSpec
from specdec.verifiers.siblings import Siblings, normalised, unproved
from specdec.verifiers.walk import Walk


class KSeq:
    """Sequential selection among k i.i.d. drafts (Sun et al. 2023, SpecTr, algorithm 3), at every node of a tree.

    Each draw from q is kept with probability min(1, p / (g q)) until one is; the smallest division factor g in [1, k] with
    1 - (1 - b)^k <= g b, where b is the mass of min(q, p / g), leaves a residual without negative parts. With one draw this
    is the rule `rejection`.
    """

    name = "kseq"
    lossless = True

    def accepts(self, spec: TreeSpec) -> str | None:
        if spec.kinds - {DrawKind.IID}:
            others = ", ".join(sorted(kind.name for kind in spec.kinds - {DrawKind.IID}))
            return (
                f"it is made for i.i.d. draws, and these trees have {others} ones; use the rule traversal or recursive"
            )
        return unproved(spec)

    def __call__(self, tree: TokenTree, laws: TargetLaws, noise: Noise) -> Acceptance:
        if reason := self.accepts(tree.spec):
            raise ValueError(f"rule kseq is not exact for these trees: {reason}")
        siblings = Siblings(tree)
        walk = Walk(tree)
        while len(walk.rows):
            rows, nodes = walk.rows, walk.nodes
            target_RV = laws.at(walk.node_B)[rows]
            draws_RJ = siblings.draws_BNJ[rows, nodes]
            count_R = (draws_RJ >= 0).sum(1)
            child_R, rest_RV = torch.full_like(rows, -1), target_RV
            if bool((count_R > 0).any()):
                on = (count_R > 0).nonzero().squeeze(1)
                draft_RV = siblings.laws(rows[on], draws_RJ[on, 0], target_RV[on])
                kept_RV = _kept(target_RV[on], draft_RV, count_R[on])
                beta_R = kept_RV.sum(-1)
                for draws_R in draws_RJ.unbind(1):
                    waits = ((draws_R >= 0) & (child_R < 0))[on].nonzero().squeeze(1)
                    tested = on[waits]
                    draws, at = draws_R[tested], rows[tested]
                    token = siblings.tokens_BM[at, draws][:, None]
                    part, q = (law[waits].gather(1, token).squeeze(1) for law in (kept_RV, draft_RV))
                    kept = noise.bernoulli((part / q).clamp_max(1), RoundKey("accept", draws), at)
                    child_R = child_R.index_copy(0, tested[kept], siblings.child(at, draws)[kept])
                # What the first kept draw gives each token: its part of one draw, times the draws that are waited for.
                given = (1 - (1 - beta_R) ** count_R[on]) / beta_R.clamp_min(torch.finfo(beta_R.dtype).tiny)
                left = (target_RV[on] - kept_RV * given[:, None]).clamp_min(0)
                rest_RV = target_RV.index_copy(0, on, normalised(left, target_RV[on]))
            token_R = torch.zeros_like(rows)
            ends = child_R < 0
            token_R[ends] = noise.categorical(rest_RV[ends], RoundKey("residual", nodes[ends]), rows[ends])
            walk.step(child_R, token_R)
        return walk.acceptance()


def _kept(target_RV: Tensor, draft_RV: Tensor, count_R: Tensor) -> Tensor:
    """min(q, p / g) for the smallest division factor g that leaves no negative residual, by bisection."""
    count = count_R.to(target_RV.dtype)
    low, high = torch.ones_like(count), count
    # The upper end always holds (Bernoulli's inequality), so whatever the bisection's rounding, the result is exact.
    for _ in range(60 if target_RV.dtype == torch.float64 else 30):
        middle = (low + high) / 2
        beta = torch.minimum(draft_RV, target_RV / middle[:, None]).sum(-1)
        holds = 1 - (1 - beta) ** count <= middle * beta
        low, high = torch.where(holds, low, middle), torch.where(holds, middle, high)
    return torch.minimum(draft_RV, target_RV / high[:, None])
