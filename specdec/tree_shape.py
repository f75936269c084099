"""TreeShape: what the host knows of token trees without asking a device for anything."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specdec.draws import DrawKind

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class TreeShape:
    """Parents, sizes and draws of a batch of trees, as `TokenTree` has them, on the host; not who carries which token."""

    parents_BN: Ints
    num_nodes_B: Ints
    draws_BM: Ints
    kinds_BM: Ints

    @staticmethod
    def of(columns: Seq[Tensor]) -> TreeShape:
        """Of parents, sizes, draws and kinds on the CPU, whose memory it shares."""
        parents_BN, num_nodes_B, draws_BM, kinds_BM = (one.numpy() for one in columns)
        return TreeShape(parents_BN, num_nodes_B, draws_BM, kinds_BM)

    @property
    def columns(self) -> list[Tensor]:
        """As they were given."""
        return [torch.from_numpy(one) for one in (self.parents_BN, self.num_nodes_B, self.draws_BM, self.kinds_BM)]

    @cached_property
    def sizes(self) -> list[int]:
        """The number of nodes of each tree, root included."""
        sizes: list[int] = self.num_nodes_B.tolist()
        return sizes

    @cached_property
    def ancestors_BNN(self) -> NDArray[np.bool_]:
        """See `TokenTree.ancestors_BNN`: each node has its parent's and itself."""
        batch, nodes = self.parents_BN.shape
        is_node_BN = np.arange(nodes) < self.num_nodes_B[:, None]
        ancestors = np.zeros((batch, nodes, nodes), bool)
        rows = np.arange(batch)
        ancestors[:, 0, 0] = is_node_BN[:, 0]
        for node in range(1, nodes):
            inside_B = is_node_BN[:, node]
            ancestors[:, node] = ancestors[rows, self.parents_BN[:, node]] & inside_B[:, None]
            ancestors[:, node, node] = inside_B
        return ancestors

    @cached_property
    def depth_BN(self) -> Ints:
        """Edges from the root; -1 for padding."""
        return self.ancestors_BNN.sum(-1) - 1

    @property
    def kinds(self) -> frozenset[DrawKind]:
        """The kinds of draws that occur."""
        drawn = self.kinds_BM[self.draws_BM >= 0]
        return frozenset(kind for kind in DrawKind if (drawn == kind).any())

    @property
    def is_chain(self) -> bool:
        """Whether every node has at most one child, and one draw."""
        nodes = self.parents_BN.shape[1]
        index_N = np.arange(nodes)
        in_line = (self.parents_BN == index_N - 1) | (index_N >= self.num_nodes_B[:, None])
        return bool(in_line.all() and ((self.draws_BM >= 0).sum(1) == self.num_nodes_B - 1).all())

    @staticmethod
    def concat(shapes: Seq[TreeShape]) -> TreeShape:
        """One batch after another, nodes and draws padded to the most there are."""
        nodes = max(one.parents_BN.shape[1] for one in shapes)
        draws = max(one.draws_BM.shape[1] for one in shapes)
        return TreeShape(
            np.concatenate([_pad(one.parents_BN, nodes, -1) for one in shapes]),
            np.concatenate([one.num_nodes_B for one in shapes]),
            np.concatenate([_pad(one.draws_BM, draws, -1) for one in shapes]),
            np.concatenate([_pad(one.kinds_BM, draws, DrawKind.FIXED) for one in shapes]),
        )


def _pad(values: Ints, width: int, fill: int) -> Ints:
    return np.pad(values, ((0, 0), (0, width - values.shape[1])), constant_values=fill)
