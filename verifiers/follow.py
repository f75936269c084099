"""The rule that follows the target: draw the target's own token, keep the path as long as the tree foresaw it."""

from __future__ import annotations

import torch

from specdec.interfaces import Acceptance, Noise, TargetLaws
from specdec.noise import PositionKey
from specdec.sampling import ModelLaws
from specdec.tree import TokenTree, TreeSpec
from specdec.verifiers import on_device


class Follow:
    """Exact for any tree, whatever drew it, and optimal for FIXED ones: at each node the target's token is drawn from the
    target's law and the path goes on where a child carries it.

    The draw is keyed by absolute position alone, as in plain decoding, so both emit the same tokens for the same seed.
    """

    name = "follow"
    lossless = True

    def accepts(self, spec: TreeSpec) -> str | None:
        return None

    def __call__(self, tree: TokenTree, laws: TargetLaws, noise: Noise) -> Acceptance:
        if (verdict := on_device.follow(tree, laws, noise)) is not None:
            return verdict
        # Laws that leave no choice are never written out.
        certain = laws if isinstance(laws, ModelLaws) and laws.sampling.is_argmax else None
        rows = torch.arange(tree.batch_size, device=tree.device)
        node_B = torch.zeros_like(rows)
        next_token_B = torch.zeros_like(rows)
        path = [node_B]
        for depth in range(tree.max_nodes):
            if certain is not None:
                tokens = certain.largest(node_B[rows], rows)
            else:
                tokens = noise.categorical(laws.at(node_B)[rows], PositionKey(depth), rows)
            next_token_B = next_token_B.index_copy(0, rows, tokens)
            # Padding has parent -1 and is never a child, so it needs no mask.
            is_child = (tree.parents_BN[rows] == node_B[rows][:, None]) & (tree.tokens_BN[rows] == tokens[:, None])
            found = is_child.any(1)
            rows = rows[found]
            if not len(rows):
                break
            child = is_child[found].int().argmax(1)
            node_B = node_B.index_copy(0, rows, child)
            path.append(torch.full_like(node_B, -1).index_copy(0, rows, child))
        path_BK = torch.stack(path, 1)
        return Acceptance(path_BK, (path_BK >= 0).sum(1) - 1, next_token_B)
