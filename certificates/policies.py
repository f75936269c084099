"""A policy that no configuration offers and every rule should meet: drafts of two kinds in one chain."""

from __future__ import annotations

import torch

from specdec.drafters.growth import DraftRound, Grown
from specdec.interfaces import Noise
from specdec.noise import RoundKey
from specdec.tree import DrawKind, TokenTree, TreeSpec


class Alternating:
    """Chains of `depth` tokens that are drawn and chosen without chance by turns: a tree's draws need not be of one kind.

    A chosen token's parent keeps its draft law, which a rule must not take for the law that the token was drawn from.
    """

    def __init__(self, depth: int, starts_drawn: bool) -> None:
        self.max_depth, self.max_nodes, self.max_expanded = depth, depth + 1, depth
        self._starts_drawn = starts_drawn
        self.spec = TreeSpec(frozenset({DrawKind.FIXED, DrawKind.IID}), is_chain=True)

    def grow(self, draft: DraftRound, noise: Noise) -> Grown:
        limits_B = torch.tensor(draft.limits, device=draft.roots_B.device)
        live_B = torch.ones_like(draft.roots_B, dtype=torch.bool)
        tokens, laws, inside = [draft.roots_B], [], [live_B]
        path_BK = draft.roots_B.new_full((len(limits_B), self.max_depth), -1)
        following = draft.expand_root()
        for depth in range(min(self.max_depth, max(draft.limits))):
            law_BV = following.laws(path_BK[:, None])[:, 0]
            live_B = live_B & (limits_B > depth) & (law_BV.sum(1) > 0)
            token_B = law_BV.argmax(1)
            if self._is_drawn(depth):
                rows = live_B.nonzero()[:, 0]
                drawn = noise.categorical(law_BV[rows], RoundKey("draft", depth), rows)
                token_B = token_B.index_copy(0, rows, drawn)
            path_BK[:, depth] = token_B
            tokens.append(token_B)
            laws.append(law_BV)
            inside.append(live_B)
            if depth + 1 < min(self.max_depth, max(draft.limits)):
                following = draft.expand(token_B[:, None], torch.full_like(token_B[:, None], depth), depth + 1)
        is_node_BN = torch.stack(inside, 1)
        nodes_N = torch.arange(len(tokens), device=limits_B.device)
        kinds_M = torch.tensor(
            [DrawKind.IID if self._is_drawn(depth) else DrawKind.FIXED for depth in range(len(laws))]
        )
        tree = TokenTree(
            torch.where(is_node_BN, torch.stack(tokens, 1), 0),
            torch.where(is_node_BN, nodes_N - 1, -1),
            is_node_BN.sum(1),
            torch.where(is_node_BN, nodes_N, -1)[:, 1:],
            torch.where(is_node_BN[:, 1:], kinds_M.to(limits_B.device), DrawKind.FIXED),
            torch.stack([*laws, torch.zeros_like(laws[0])], 1) * is_node_BN[..., None],
        )
        return Grown.within(limits_B, tree, torch.where(nodes_N < self.max_depth, nodes_N, -1).expand_as(is_node_BN))

    def _is_drawn(self, depth: int) -> bool:
        return (depth % 2 == 0) == self._starts_drawn
