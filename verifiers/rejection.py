"""Speculative sampling on chains: keep a draft with probability p/q, else draw from what the draft left over."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.interfaces import Acceptance, Noise, TargetLaws
from specdec.noise import RoundKey
from specdec.tree import DrawKind, TokenTree, TreeSpec
from specdec.verifiers import on_device


class Rejection:
    """Token-by-token speculative sampling (Leviathan et al. 2023, algorithm 1; Chen et al. 2023, algorithm 2).

    Exact for chains: a draw from law q is kept with probability min(1, p/q) and otherwise replaced by a draw from the
    normalised positive part of p - q. A FIXED draft is the law that puts all mass on it.
    """

    name = "rejection"
    lossless = True

    def accepts(self, spec: TreeSpec) -> str | None:
        if not spec.is_chain:
            return "it tests one draft per node, and these trees branch; use a chain policy or the rule follow"
        if spec.is_sampled and not spec.has_laws:
            return "sampled drafts come without the law they were drawn from"
        if not spec.adapted:
            return "drafts were dropped after they had been drawn, so their law is not the one that was sampled"
        return None

    def __call__(self, tree: TokenTree, laws: TargetLaws, noise: Noise) -> Acceptance:
        if reason := self.accepts(tree.spec):
            raise ValueError(f"rule rejection is not exact for these trees: {reason}")
        if (verdict := on_device.rejection(tree, laws, noise)) is not None:
            return verdict
        batch, device = tree.batch_size, tree.device
        rows = torch.arange(batch, device=device)
        node_B, next_token_B = torch.zeros_like(rows), torch.zeros_like(rows)
        path = [node_B]
        for depth in range(tree.max_nodes):
            target_RV = laws.at(node_B)[rows]
            has_child = tree.num_nodes_B[rows] > depth + 1
            keep, final_RV = has_child.clone(), target_RV
            if bool(has_child.any()):
                draft_RV = _draft_law(tree, rows, depth, target_RV)
                token = tree.tokens_BN[rows, depth + 1 if depth + 1 < tree.max_nodes else depth]
                p, q = (law.gather(1, token[:, None]).squeeze(1) for law in (target_RV, draft_RV))
                tested = rows[has_child]
                coin = noise.bernoulli((p / q)[has_child].clamp_max(1), RoundKey("accept", depth), tested)
                keep[has_child] = coin
                final_RV = torch.where(has_child[:, None], _residual(target_RV, draft_RV), target_RV)
            stop = ~keep
            if bool(stop.any()):
                drawn = noise.categorical(final_RV[stop], RoundKey("residual", depth), rows[stop])
                next_token_B = next_token_B.index_copy(0, rows[stop], drawn)
            rows = rows[keep]
            if not len(rows):
                break
            child = torch.full_like(rows, depth + 1)
            node_B = node_B.index_copy(0, rows, child)
            path.append(torch.full_like(node_B, -1).index_copy(0, rows, child))
        path_BK = torch.stack(path, 1)
        return Acceptance(path_BK, (path_BK >= 0).sum(1) - 1, next_token_B)


def _draft_law(tree: TokenTree, rows: Tensor, depth: int, target_RV: Tensor) -> Tensor:
    """The law that the child of node `depth` was drawn from; one-hot where it was chosen without chance."""
    child = min(depth + 1, tree.max_nodes - 1)
    one_hot = torch.zeros_like(target_RV).scatter_(1, tree.tokens_BN[rows, child][:, None], 1.0)
    if tree.draft_laws_BNV is None:
        return one_hot
    is_fixed = tree.node_kinds_BN[rows, child] == DrawKind.FIXED
    return torch.where(is_fixed[:, None], one_hot, tree.draft_laws_BNV[rows, depth].to(target_RV.dtype))


def _residual(target_RV: Tensor, draft_RV: Tensor) -> Tensor:
    rest = (target_RV - draft_RV).clamp_min(0)
    total = rest.sum(-1, keepdim=True)
    # Equal laws never reject; rounding may leave nothing over all the same, and then any draw from p is right.
    return torch.where(total > 0, rest / total.clamp_min(torch.finfo(total.dtype).tiny), target_RV)
