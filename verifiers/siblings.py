"""The draws of a tree by parent, in the order they were made, and the law that each was made from."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.tree import DrawKind, TokenTree, TreeSpec


def unproved(spec: TreeSpec) -> str | None:
    """Why no rule that undoes draws can be exact for such trees: it must know the very law that was sampled."""
    if spec.is_sampled and not spec.has_laws:
        return "sampled drafts come without the law they were drawn from"
    if not spec.adapted:
        return "drafts were dropped after they had been drawn, so their law is not the one that was sampled"
    return None


class Siblings:
    """`draws_BNJ[b, n]` lists the draws of node n's children in drawing order (indices into `draws_BM`), -1 padded."""

    def __init__(self, tree: TokenTree) -> None:
        self.tree = tree
        drawn = tree.draws_BM >= 0
        self._reached_BM = tree.draws_BM.clamp_min(0)
        self.parents_BM = torch.where(drawn, tree.parents_BN.gather(1, self._reached_BM), -1)
        self.tokens_BM = tree.tokens_BN.gather(1, self._reached_BM)
        count = tree.draws_BM.shape[1]
        together = (self.parents_BM[:, :, None] == self.parents_BM[:, None]) & drawn[:, None]
        # [b, i, j]: draw j was made before draw i, of the same parent.
        self._before_BMM = together & torch.ones(count, count, dtype=torch.bool, device=tree.device).tril(-1)
        rank_BM = self._before_BMM.sum(2)
        width = int(rank_BM.max()) + 1 if bool(drawn.any()) else 0
        table = tree.draws_BM.new_full((tree.batch_size, tree.max_nodes, width), -1)
        rows, draws = drawn.nonzero(as_tuple=True)
        table[rows, self.parents_BM[rows, draws], rank_BM[rows, draws]] = draws
        self.draws_BNJ = table

    def child(self, rows_R: Tensor, draws_R: Tensor) -> Tensor:
        """The node that each draw reached."""
        return self._reached_BM[rows_R, draws_R]

    def laws(self, rows_R: Tensor, draws_R: Tensor, target_RV: Tensor) -> Tensor:
        """The law [R, V] of each draw given the siblings drawn before it; all mass on the token where there was no chance.

        Width and type are those of the target's laws.
        """
        tokens = self.tokens_BM[rows_R, draws_R][:, None]
        laws_BNV = self.tree.draft_laws_BNV
        one_hot = torch.zeros_like(target_RV).scatter_(1, tokens, 1)
        if laws_BNV is None:
            return one_hot
        kinds = self.tree.kinds_BM[rows_R, draws_R]
        law_RV = laws_BNV[rows_R, self.parents_BM[rows_R, draws_R]].to(target_RV.dtype)
        if bool((kinds == DrawKind.WITHOUT_REPLACEMENT).any()):
            earlier = self._before_BMM[rows_R, draws_R] & (kinds == DrawKind.WITHOUT_REPLACEMENT)[:, None]
            # Of the siblings before it, FIXED ones have no mass in the law, so that they need no exception.
            gone = torch.zeros_like(law_RV).scatter_add_(1, self.tokens_BM[rows_R], earlier.to(law_RV.dtype)) > 0
            left = law_RV.masked_fill(gone, 0)
            law_RV = torch.where(gone.any(1, keepdim=True), normalised(left, law_RV), law_RV)
        return torch.where((kinds == DrawKind.FIXED)[:, None], one_hot, law_RV)


def normalised(weights_RV: Tensor, fallback_RV: Tensor) -> Tensor:
    """Non-negative weights as laws. A row without mass takes its fallback: what is left over is empty only where two laws
    are equal but for rounding, and then either law is right."""
    total = weights_RV.sum(-1, keepdim=True)
    return torch.where(total > 0, weights_RV / total.clamp_min(torch.finfo(total.dtype).tiny), fallback_RV)
