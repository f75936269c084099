"""A batch of walks down token trees: which rows still go, where they stand, and what they emit."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.interfaces import Acceptance
from specdec.tree import TokenTree


class Walk:
    """Starts every row at its root; `rows` are those that still go on, `nodes` where each of them stands."""

    def __init__(self, tree: TokenTree) -> None:
        self.rows = torch.arange(tree.batch_size, device=tree.device)
        self._node_B = torch.zeros_like(self.rows)
        self._next_token_B = torch.zeros_like(self.rows)
        self._path = [self._node_B]

    @property
    def node_B(self) -> Tensor:
        """Where every row stands or has stopped."""
        return self._node_B

    @property
    def nodes(self) -> Tensor:
        return self._node_B[self.rows]

    def step(self, children_R: Tensor, tokens_R: Tensor) -> None:
        """Rows of `rows` with a child >= 0 go there; the others stop and emit their token."""
        goes = children_R >= 0
        stopped = self.rows[~goes]
        self._next_token_B = self._next_token_B.index_copy(0, stopped, tokens_R[~goes])
        self.rows = self.rows[goes]
        self._node_B = self._node_B.index_copy(0, self.rows, children_R[goes])
        if len(self.rows):
            self._path.append(torch.full_like(self._node_B, -1).index_copy(0, self.rows, children_R[goes]))

    def acceptance(self) -> Acceptance:
        path_BK = torch.stack(self._path, 1)
        return Acceptance(path_BK, (path_BK >= 0).sum(1) - 1, self._next_token_B)


def path_to(tree: TokenTree, node_B: Tensor, next_token_B: Tensor) -> Acceptance:
    """The verdict that accepts one node of each row with all its ancestors."""
    on_path_BN = tree.ancestors_BNN[torch.arange(tree.batch_size, device=tree.device), node_B]
    accepted_B = on_path_BN.sum(1) - 1
    width = int(accepted_B.max()) + 1
    # Parents come before children, so the nodes of a path in order of their index are in order of depth.
    order = on_path_BN.logical_not().sort(dim=1, stable=True).indices[:, :width]
    inside = torch.arange(width, device=tree.device) <= accepted_B[:, None]
    return Acceptance(torch.where(inside, order, -1), accepted_B, next_token_B)
