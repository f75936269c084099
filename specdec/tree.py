"""The token tree: what a drafter proposes and the target checks in one forward."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import InitVar, dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from specdec.draws import DrawKind as DrawKind
from specdec.draws import TreeSpec as TreeSpec
from specdec.int_tensor import fetched, int_tensor, sent, sent_together
from specdec.tree_checks import check_tree
from specdec.tree_shape import TreeShape


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

    Off the CPU the host keeps a copy, since whatever it asks a device it waits for: `known` is what it knows before, the trees
    on the CPU or their shape (None: they are fetched, at once). Tokens that it does not know are checked where they come
    along with something else (`check_tokens`).
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
    known: InitVar[TokenTree | TreeShape | None] = None

    def __post_init__(self, known: TokenTree | TreeShape | None) -> None:
        if isinstance(known, TreeShape):
            self.__dict__["shape"] = known
        elif known is not None:
            self.__dict__["on_cpu"], self.__dict__["shape"] = known, known.shape
        elif self.device.type == "cpu" or self.draft_laws_BNV is not None:
            # Laws stay where they are, and are looked at there.
            check_tree(self)
        else:
            self.__dict__["shape"] = self.on_cpu.shape

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
    def shape(self) -> TreeShape:
        """What the host knows of the trees, whatever their device."""
        columns = self._columns
        if self.device.type != "cpu":
            columns = fetched(columns)
        return TreeShape.of(columns)

    @cached_property
    def on_cpu(self) -> TokenTree:
        """The same trees on the CPU, of FIXED nodes alone; fetched where the host does not know their tokens."""
        if self.device.type == "cpu":
            return self
        columns, confidence_BN = [] if "shape" in self.__dict__ else self._columns, self.confidence_BN
        # Bits of floats travel as integers: one transfer for all.
        bits = [] if confidence_BN is None else [confidence_BN.float().view(torch.int32)]
        tokens_BN, *found = fetched([self.tokens_BN, *columns, *bits])
        if confidence_BN is not None:
            confidence_BN = found.pop().to(torch.int32).view(torch.float32)
        return self._elsewhere(tokens_BN, found or self.shape.columns, confidence_BN)

    @property
    def is_known(self) -> bool:
        """Whether the host has the tokens."""
        return self.device.type == "cpu" or "on_cpu" in self.__dict__

    def check_tokens(self, tokens_BN: Tensor) -> None:
        """Tokens that the host did not know and that came along with something else. Raises ValueError as construction does."""
        if not self.is_known and self.draft_laws_BNV is None:
            self._elsewhere(tokens_BN, self.shape.columns, None)

    def to(self, device: torch.device | str) -> TokenTree:
        """These trees of the CPU on a device, as one copy that the host need not wait for; of FIXED nodes alone."""
        if torch.device(device).type == "cpu":
            return self
        assert self.device.type == "cpu" and self.draft_laws_BNV is None
        confidence_BN = None if self.confidence_BN is None else sent(self.confidence_BN, device)
        tokens_BN, *columns = sent_together([self.tokens_BN, *self._columns], device)
        return self._elsewhere(tokens_BN, columns, confidence_BN, self)

    @property
    def _columns(self) -> list[Tensor]:
        return [self.parents_BN, self.num_nodes_B, self.draws_BM, self.kinds_BM]

    def _elsewhere(
        self, tokens_BN: Tensor, columns: Seq[Tensor], confidence_BN: Tensor | None, known: TokenTree | None = None
    ) -> TokenTree:
        """The same trees in tensors of another device; `columns` as in `_columns`."""
        parents_BN, num_nodes_B, draws_BM, kinds_BM = columns
        return replace(
            self,
            tokens_BN=tokens_BN,
            parents_BN=parents_BN,
            num_nodes_B=num_nodes_B,
            draws_BM=draws_BM,
            kinds_BM=kinds_BM,
            confidence_BN=confidence_BN,
            known=known,
        )

    @cached_property
    def ancestors_BNN(self) -> Tensor:
        """`[b, n, m]` is True iff m is n or one of its ancestors; rows of padding are all False."""
        if self.max_nodes == 1:
            return torch.ones(self.batch_size, 1, 1, dtype=torch.bool, device=self.device)
        return sent(torch.from_numpy(self.shape.ancestors_BNN), self.device)

    @cached_property
    def depth_BN(self) -> Tensor:
        """Edges from the root; -1 for padding."""
        if self.max_nodes == 1:
            return torch.zeros_like(self.tokens_BN)
        return sent(torch.from_numpy(self.shape.depth_BN), self.device)

    @cached_property
    def spec(self) -> TreeSpec:
        """What these very trees are, for the run-time check of a rule."""
        return TreeSpec(self.shape.kinds, self.shape.is_chain, self.draft_laws_BNV is not None, self.adapted)

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
        parents_B1 = torch.full((len(tokens_B), 1), -1, dtype=torch.int64)
        return TokenTree.from_parents(tokens_B[:, None], parents_B1, vocab_size=vocab_size)

    @staticmethod
    def from_parents(
        tokens_BN: Tensor,
        parents_BN: Tensor,
        num_nodes_B: Tensor | None = None,
        vocab_size: int | None = None,
        confidence_BN: Tensor | None = None,
    ) -> TokenTree:
        """Trees whose every child is FIXED, from tokens and parent indices; where these and the counts lie on the host, the
        trees of a device do not ask it for their shape."""
        batch, nodes = tokens_BN.shape
        place = parents_BN.device
        if num_nodes_B is None:
            num_nodes_B = torch.full((batch,), nodes, dtype=torch.int64, device=place)
        index = torch.arange(1, nodes, device=place).expand(batch, -1)
        draws = torch.where(index < num_nodes_B[:, None], index, -1) if nodes > 1 else index
        kinds = torch.full_like(draws, DrawKind.FIXED)
        known = None
        if place != tokens_BN.device:
            columns = parents_BN, num_nodes_B, draws, kinds
            known = TreeShape.of(columns)
            parents_BN, num_nodes_B, draws, kinds = sent_together(columns, tokens_BN.device)
        return TokenTree(
            tokens_BN,
            parents_BN,
            num_nodes_B,
            draws,
            kinds,
            vocab_size=vocab_size,
            confidence_BN=confidence_BN,
            known=known,
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
        tokens_BN = int_tensor([tokens + [0] * (width - len(tokens)) for tokens, _ in rows])
        parents_BN = int_tensor([parents + [-1] * (width - len(parents)) for _, parents in rows])
        num_nodes_B = int_tensor([len(tokens) for tokens, _ in rows])
        confidence_BN = None
        if confidence is not None:
            filled = [[*one, *[torch.nan] * (width - len(one))] for one in confidence]
            confidence_BN = torch.tensor(filled)
        return TokenTree.from_parents(tokens_BN, parents_BN, num_nodes_B, vocab_size, confidence_BN).to(device)

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
        device = trees[0].device
        if device.type != "cpu" and all(tree.is_known for tree in trees):
            return TokenTree.concat([tree.on_cpu for tree in trees]).to(device)
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
            None if device.type == "cpu" else TreeShape.concat([tree.shape for tree in trees]),
        )


def _pad(values: Tensor, width: int, fill: float) -> Tensor:
    return torch.nn.functional.pad(values, (0, width - values.shape[1]), value=fill)
