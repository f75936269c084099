"""The token tree: what a drafter proposes and the target checks in one forward."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specdec.draws import DrawKind as DrawKind
from specdec.draws import TreeSpec as TreeSpec
from specdec.int_tensor import int_tensor
from specdec.tree_checks import check_tree


@dataclass(frozen=True)
class TokenTree:
    """A batch of padded token trees; node 0 of each is the root, the last committed token.

    Shapes: `tokens_BN`, `parents_BN` (-1 for the root and for padding, which has index >= `num_nodes_B`; a parent comes
    before its children), `num_nodes_B`; `draws_BM` the node each drafted draw reached, siblings in drawing order, -1
    padding; `kinds_BM` a `DrawKind` per draw; `draft_laws_BNV` row n is the law n's non-FIXED children were drawn from
    (None when every draw is FIXED). `adapted` is False where a drawn child may have been dropped after it was seen.
    `vocab_size` bounds the tokens; it is taken from the laws when there are any. `confidence_BN` is the drafter's own opinion
    of how likely each FIXED node is behind its parent (NaN: none), which no rule reads. Raises ValueError naming the broken
    rule.
    """

    tokens_BN: Tensor
    parents_BN: Tensor
    num_nodes_B: Tensor
    draws_BM: Tensor
    kinds_BM: Tensor
    draft_laws_BNV: Tensor | None = None
    adapted: bool = True
    vocab_size: int | None = None
    confidence_BN: Tensor | None = None

    def __post_init__(self) -> None:
        check_tree(self)

    @property
    def batch_size(self) -> int:
        return self.tokens_BN.shape[0]

    @property
    def max_nodes(self) -> int:
        return self.tokens_BN.shape[1]

    @property
    def device(self) -> torch.device:
        return self.tokens_BN.device

    @cached_property
    def is_node_BN(self) -> Tensor:
        return torch.arange(self.max_nodes, device=self.device) < self.num_nodes_B[:, None]

    @cached_property
    def ancestors_BNN(self) -> Tensor:
        """`[b, n, m]` is True iff m is n or one of its ancestors; rows of padding are all False."""
        if self.max_nodes == 1:
            return torch.ones(self.batch_size, 1, 1, dtype=torch.bool, device=self.device)
        if self.device.type == "cpu":
            return torch.from_numpy(_ancestors(self.parents_BN.numpy(), self.is_node_BN.numpy()))
        ancestors = torch.zeros(*self.tokens_BN.shape, self.max_nodes, dtype=torch.bool, device=self.device)
        node = torch.where(self.is_node_BN, torch.arange(self.max_nodes, device=self.device), -1)
        while bool((node >= 0).any()):
            # A finished node writes its own diagonal once more, so the scatter needs no mask.
            at = torch.where(node >= 0, node, 0)
            ancestors |= torch.zeros_like(ancestors).scatter_(2, at[..., None], (node >= 0)[..., None])
            node = torch.where(node >= 0, self.parents_BN.gather(1, at), -1)
        return ancestors

    @cached_property
    def depth_BN(self) -> Tensor:
        """Edges from the root; -1 for padding."""
        if self.max_nodes == 1:
            return torch.zeros_like(self.tokens_BN)
        return self.ancestors_BNN.sum(-1) - 1

    @cached_property
    def spec(self) -> TreeSpec:
        """What these very trees are, for the run-time check of a rule."""
        drawn = self.kinds_BM[self.draws_BM >= 0]
        kinds = frozenset(kind for kind in DrawKind if bool((drawn == kind).any()))
        before = torch.arange(-1, self.max_nodes - 1, device=self.device)
        in_line = bool(((self.parents_BN == before) | ~self.is_node_BN).all())
        single = bool(((self.draws_BM >= 0).sum(1) == self.num_nodes_B - 1).all())
        return TreeSpec(kinds, in_line and single, self.draft_laws_BNV is not None, self.adapted)

    @cached_property
    def node_kinds_BN(self) -> Tensor:
        """The draw kind of every drafted node; FIXED for the root and padding."""
        drawn = self.draws_BM >= 0
        kinds = torch.full_like(self.tokens_BN, DrawKind.FIXED)
        # FIXED is 0 and every draw to one node is of one kind, so the largest entry is that kind.
        return kinds.scatter_reduce(1, self.draws_BM.clamp_min(0), torch.where(drawn, self.kinds_BM, 0), "amax")

    def path(self, node: int, row: int = 0) -> list[int]:
        """Node indices from the root to `node`, both included."""
        parents, path = self.parents_BN[row].tolist(), [node]
        while parents[path[-1]] >= 0:
            path.append(parents[path[-1]])
        return path[::-1]

    @staticmethod
    def roots(tokens_B: Tensor, vocab_size: int | None = None) -> TokenTree:
        """Trees of a root alone: plain decoding."""
        return TokenTree.from_parents(tokens_B[:, None], torch.full_like(tokens_B[:, None], -1), vocab_size=vocab_size)

    @staticmethod
    def from_parents(
        tokens_BN: Tensor,
        parents_BN: Tensor,
        num_nodes_B: Tensor | None = None,
        vocab_size: int | None = None,
        confidence_BN: Tensor | None = None,
    ) -> TokenTree:
        """Trees whose every child is FIXED, from tokens and parent indices."""
        batch, nodes = tokens_BN.shape
        if num_nodes_B is None:
            num_nodes_B = torch.full((batch,), nodes, dtype=torch.int64, device=tokens_BN.device)
        index = torch.arange(1, nodes, device=tokens_BN.device).expand(batch, -1)
        draws = torch.where(index < num_nodes_B[:, None], index, -1) if nodes > 1 else index
        kinds = torch.full_like(draws, DrawKind.FIXED)
        return TokenTree(
            tokens_BN, parents_BN, num_nodes_B, draws, kinds, vocab_size=vocab_size, confidence_BN=confidence_BN
        )

    @staticmethod
    def from_paths(roots: Seq[int], paths: Seq[Seq[Seq[int]]], vocab_size: int | None = None) -> TokenTree:
        """FIXED trees that merge, for each row, the given token paths below `roots[row]` (common prefixes share nodes)."""
        rows: list[tuple[list[int], list[int]]] = []
        for root, row_paths in zip(roots, paths, strict=True):
            tokens, parents, child_of = [root], [-1], {}
            for path in row_paths:
                node = 0
                for token in path:
                    if (node, token) not in child_of:
                        child_of[node, token] = len(tokens)
                        tokens.append(token)
                        parents.append(node)
                    node = child_of[node, token]
            rows.append((tokens, parents))
        return TokenTree.from_lists(rows, vocab_size)

    @staticmethod
    def from_lists(
        rows: Seq[tuple[list[int], list[int]]],
        vocab_size: int | None = None,
        confidence: Seq[list[float]] | None = None,
        device: torch.device | str = "cpu",
    ) -> TokenTree:
        """FIXED trees from ragged host lists of (tokens, parents), padded to the largest."""
        width = max(len(tokens) for tokens, _ in rows)
        tokens_BN = int_tensor([tokens + [0] * (width - len(tokens)) for tokens, _ in rows], device)
        parents_BN = int_tensor([parents + [-1] * (width - len(parents)) for _, parents in rows], device)
        num_nodes_B = int_tensor([len(tokens) for tokens, _ in rows], device)
        confidence_BN = None
        if confidence is not None:
            filled = [[*one, *[torch.nan] * (width - len(one))] for one in confidence]
            confidence_BN = torch.tensor(filled, device=device)
        return TokenTree.from_parents(tokens_BN, parents_BN, num_nodes_B, vocab_size, confidence_BN)

    @staticmethod
    def chain(
        tokens_BN: Tensor,
        draft_laws_BNV: Tensor | None = None,
        kind: DrawKind = DrawKind.FIXED,
        vocab_size: int | None = None,
    ) -> TokenTree:
        """One path per row: root, then each token the child of the one before; `kind` is that of every draw."""
        batch, nodes = tokens_BN.shape
        parents = torch.arange(-1, nodes - 1, device=tokens_BN.device).expand(batch, -1)
        draws = torch.arange(1, nodes, device=tokens_BN.device).expand(batch, -1)
        count = torch.full((batch,), nodes, dtype=torch.int64, device=tokens_BN.device)
        kinds = torch.full_like(draws, kind)
        return TokenTree(tokens_BN, parents, count, draws, kinds, draft_laws_BNV, vocab_size=vocab_size)

    @staticmethod
    def concat(trees: Seq[TokenTree]) -> TokenTree:
        """Stacks batches of trees, padding nodes, draws and laws to the largest."""
        if len(trees) == 1:
            return trees[0]
        nodes = max(tree.max_nodes for tree in trees)
        draws = max(tree.draws_BM.shape[1] for tree in trees)
        with_laws = [tree.draft_laws_BNV for tree in trees if tree.draft_laws_BNV is not None]
        laws = None
        if with_laws:
            vocab = with_laws[0].shape[-1]
            blank = [with_laws[0].new_zeros(tree.batch_size, nodes, vocab) for tree in trees]
            for out, tree in zip(blank, trees, strict=True):
                if tree.draft_laws_BNV is not None:
                    out[:, : tree.max_nodes] = tree.draft_laws_BNV
            laws = torch.cat(blank)
        confidence = None
        if any(tree.confidence_BN is not None for tree in trees):
            unknown = [torch.full(tree.tokens_BN.shape, torch.nan, device=tree.device) for tree in trees]
            found = [
                u if tree.confidence_BN is None else tree.confidence_BN for u, tree in zip(unknown, trees, strict=True)
            ]
            confidence = torch.cat([_pad(one.float(), nodes, torch.nan) for one in found])
        return TokenTree(
            torch.cat([_pad(tree.tokens_BN, nodes, 0) for tree in trees]),
            torch.cat([_pad(tree.parents_BN, nodes, -1) for tree in trees]),
            torch.cat([tree.num_nodes_B for tree in trees]),
            torch.cat([_pad(tree.draws_BM, draws, -1) for tree in trees]),
            torch.cat([_pad(tree.kinds_BM, draws, DrawKind.FIXED) for tree in trees]),
            laws,
            all(tree.adapted for tree in trees),
            next((tree.vocab_size for tree in trees if tree.vocab_size is not None), None),
            confidence,
        )


def _pad(values: Tensor, width: int, fill: float) -> Tensor:
    return torch.nn.functional.pad(values, (0, width - values.shape[1]), value=fill)


def _ancestors(parents_BN: NDArray[np.int64], is_node_BN: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """See `TokenTree.ancestors_BNN`: each node has its parent's and itself."""
    batch, nodes = parents_BN.shape
    ancestors = np.zeros((batch, nodes, nodes), bool)
    rows = np.arange(batch)
    ancestors[:, 0, 0] = is_node_BN[:, 0]
    for node in range(1, nodes):
        inside_B = is_node_BN[:, node]
        ancestors[:, node] = ancestors[rows, parents_BN[:, node]] & inside_B[:, None]
        ancestors[:, node, node] = inside_B
    return ancestors
