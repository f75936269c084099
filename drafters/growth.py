"""Tree policies: how a tree grows from the next-token laws of its nodes."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from specdec.int_tensor import int_tensor
from specdec.interfaces import Noise, TreePolicy
from specdec.tree import DrawKind, TokenTree, TreeSpec


class NextTokens(Protocol):
    """What a drafter thinks follows each of W nodes of B sequences."""

    def top(self, k: int) -> tuple[Tensor, Tensor]:
        """The k likeliest tokens [B, W, k] and their log-probabilities (-inf: no such token)."""
        ...

    def laws(self, paths_BWK: Tensor) -> Tensor:
        """Draft laws [B, W, V] to draw from, processed with the request's parameters along each node's drafted path (-1
        padding); a row of zeros where the drafter has nothing to say."""
        ...


class DraftRound(Protocol):
    """One round of a drafter for B sequences; the policy asks level by level.

    `limits` is the deepest level each sequence can use. Nodes are numbered in the order they are expanded, root 0.
    """

    roots_B: Tensor
    limits: list[int]
    vocab_size: int

    def expand_root(self) -> NextTokens: ...

    def expand(self, tokens_BW: Tensor, parents_BW: Tensor, depth: int) -> NextTokens:
        """Runs W more nodes at `depth` per sequence, children of already expanded nodes `parents_BW`."""
        ...


@dataclass(frozen=True)
class Grown:
    """A tree, and for each node the number under which the drafter expanded it (-1: never run)."""

    tree: TokenTree
    expanded_BN: Tensor

    @staticmethod
    def within(limits_B: Tensor, tree: TokenTree, expanded_BN: Tensor) -> Grown:
        """The nodes at a row's limit count as never run: nothing can follow them, so a drafter may skip them."""
        was_run = tree.is_node_BN & (tree.depth_BN < limits_B[:, None])
        return Grown(tree, torch.where(was_run, expanded_BN, -1))


@runtime_checkable
class ConfidenceRound(Protocol):
    """A round that may know a quicker way to the trees of `TopK`."""

    def confidence_tree(self, max_nodes: int, depth: int, k: int) -> Grown | None:
        """What `TopK(max_nodes, depth, k)` grows, up to rounding; None where there is no quicker way."""
        ...


@runtime_checkable
class GrowingPolicy(TreePolicy, Protocol):
    """A policy that grows trees on any drafter that answers as a `DraftRound`."""

    def grow(self, draft: DraftRound, noise: Noise) -> Grown: ...


class FixedPolicy:
    """Base of the policies whose every node is chosen without chance."""

    spec: TreeSpec
    max_depth: int
    max_nodes: int
    max_expanded: int

    def admits(self, ranks: tuple[int, ...], num_nodes: int) -> bool:
        """Whether a node may be added whose path takes the `ranks`-th best child at each level; for ready-made paths."""
        raise NotImplementedError

    def grow(self, draft: DraftRound, noise: Noise) -> Grown:
        raise NotImplementedError


class Static(FixedPolicy):
    """A tree of fixed shape: `choices` lists the rank path of every node (Cai et al. 2024, Medusa, section 2.1.2).

    `[[0], [1], [0, 0]]` is the best and second-best child of the root and the best child of the former. Raises ValueError
    where a path's parent is missing.
    """

    def __init__(self, choices: Seq[Seq[int]]) -> None:
        paths = sorted({tuple(path) for path in choices}, key=lambda path: (len(path), path))
        known = {(), *paths}
        for path in paths:
            if not path or path[:-1] not in known or min(path) < 0:
                raise ValueError(
                    f"choice {list(path)} needs non-negative ranks and its parent {list(path[:-1])} in the list"
                )
        if not paths:
            raise ValueError("choices is empty: a static tree needs at least one node besides the root")
        self._known, self.max_depth, self.max_nodes = known, len(paths[-1]), len(paths) + 1
        nodes = [(), *paths]
        parents = {path[:-1] for path in paths}
        # Per level: the nodes to expand, and for each child of the next level its parent's place among them and its rank.
        self._levels: list[tuple[list[int], list[int], list[int]]] = []
        for depth in range(self.max_depth):
            internal = [path for path in nodes if len(path) == depth and path in parents]
            children = [path for path in nodes if len(path) == depth + 1]
            where = {path: i for i, path in enumerate(internal)}
            self._levels.append(
                ([nodes.index(path) for path in internal], [where[c[:-1]] for c in children], [c[-1] for c in children])
            )
        order = [node for internal, _, _ in self._levels for node in internal]
        self._expanded = [order.index(i) if i in order else -1 for i in range(len(nodes))]
        self._parents = [-1, *(nodes.index(path[:-1]) for path in paths)]
        self._num_within = [sum(len(path) <= depth for path in nodes) for depth in range(self.max_depth + 1)]
        self.max_expanded = len(order)
        self.spec = TreeSpec(frozenset({DrawKind.FIXED}), is_chain=all(max(path) == 0 for path in paths))

    def admits(self, ranks: tuple[int, ...], num_nodes: int) -> bool:
        return ranks in self._known

    def grow(self, draft: DraftRound, noise: Noise) -> Grown:
        device = draft.roots_B.device
        tokens_BN = draft.roots_B[:, None]
        confidence_BN = torch.full(tokens_BN.shape, torch.nan, device=device)
        for depth, (internal, owner, ranks) in enumerate(self._levels[: max(draft.limits)]):
            if depth == 0:
                following = draft.expand_root()
            else:
                above = int_tensor([self._expanded[self._parents[node]] for node in internal], device)
                own = tokens_BN.index_select(1, int_tensor(internal, device))
                following = draft.expand(own, above.expand(len(tokens_BN), -1), depth)
            if max(ranks) >= draft.vocab_size:
                raise ValueError(f"choices use rank {max(ranks)}, the vocabulary has {draft.vocab_size} tokens")
            width = max(ranks) + 1
            best_BWk, logprobs_BWk = following.top(width)
            places = int_tensor([at * width + rank for at, rank in zip(owner, ranks, strict=True)], device)
            tokens_BN = torch.cat([tokens_BN, best_BWk.flatten(1).index_select(1, places)], 1)
            confidences = logprobs_BWk.flatten(1).index_select(1, places).exp().float()
            confidence_BN = torch.cat([confidence_BN, confidences], 1)
        # Nodes are in order of depth, so a row that must stay shallower keeps a prefix. All but the tokens the host knows.
        nodes = tokens_BN.shape[1]
        counts = [self._num_within[min(limit, self.max_depth)] for limit in draft.limits]
        parents_BN = int_tensor([self._parents[:count] + [-1] * (nodes - count) for count in counts])
        count_B, expanded_BN = int_tensor(counts), int_tensor(self._expanded[:nodes], device)
        tree = TokenTree.from_parents(tokens_BN, parents_BN, count_B, draft.vocab_size, confidence_BN)
        return Grown.within(int_tensor(draft.limits, device), tree, expanded_BN)


class TopK(FixedPolicy):
    """The confidence tree of EAGLE-2 (Li et al. 2024, sections 4.1-4.2): expand the `k` likeliest nodes of each level, `k`
    children each, `depth` levels; keep the `total` likeliest nodes of all, the root included."""

    def __init__(self, total: int = 16, depth: int = 5, k: int = 4) -> None:
        if min(total - 1, depth, k) < 1:
            raise ValueError(
                f"total={total}, depth={depth}, k={k}: a top-k tree needs total >= 2, depth >= 1 and k >= 1"
            )
        self.k, self.max_depth = k, depth
        self.max_nodes = min(total, 1 + k + (depth - 1) * k * k)
        self.max_expanded = 1 + (depth - 1) * k
        self.spec = TreeSpec(frozenset({DrawKind.FIXED}), is_chain=k == 1)

    def admits(self, ranks: tuple[int, ...], num_nodes: int) -> bool:
        return num_nodes < self.max_nodes and len(ranks) <= self.max_depth and max(ranks) < self.k

    def grow(self, draft: DraftRound, noise: Noise) -> Grown:
        device = draft.roots_B.device
        batch, depths = len(draft.limits), min(self.max_depth, max(draft.limits))
        if isinstance(draft, ConfidenceRound):
            grown = draft.confidence_tree(self.max_nodes, depths, self.k)
            if grown is not None:
                return grown
        limits = int_tensor(draft.limits, device)
        # Candidates in the order they arise: token, score (log-probability of the path), parent candidate, own expansion.
        tokens_BC, scores_BC = (values[:, 0] for values in draft.expand_root().top(self.k))
        scores_BC = scores_BC.masked_fill((limits < 1)[:, None], -torch.inf)
        parents_BC, expanded_BC = (torch.full_like(tokens_BC, -1) for _ in range(2))
        first = 0
        for depth in range(1, depths):
            if self._is_complete(scores_BC, first):
                break
            width = min(self.k, tokens_BC.shape[1] - first)
            frontier = scores_BC[:, first:].topk(width).indices + first
            own = torch.arange(width, device=device).expand(batch, -1) + 1 + (depth - 1) * self.k
            parents = parents_BC.gather(1, frontier)
            parent_number = torch.where(parents >= 0, expanded_BC.gather(1, parents.clamp_min(0)), 0)
            following = draft.expand(tokens_BC.gather(1, frontier), parent_number, depth)
            expanded_BC = expanded_BC.scatter(1, frontier, own)
            best_BWk, logprobs_BWk = following.top(self.k)
            scores = (scores_BC.gather(1, frontier)[..., None] + logprobs_BWk).flatten(1)
            scores = scores.masked_fill((limits <= depth)[:, None], -torch.inf)
            first = tokens_BC.shape[1]
            tokens_BC = torch.cat([tokens_BC, best_BWk.flatten(1)], 1)
            scores_BC = torch.cat([scores_BC, scores], 1)
            parents_BC = torch.cat([parents_BC, frontier.repeat_interleave(best_BWk.shape[2], 1)], 1)
            expanded_BC = torch.cat([expanded_BC, torch.full_like(expanded_BC[:, :1], -1).expand_as(scores)], 1)
        return self._keep_best(draft, tokens_BC, scores_BC, parents_BC, expanded_BC)

    def _is_complete(self, scores_BC: Tensor, first: int) -> bool:
        """Whether no node below the last level, which begins at `first`, can be among those that are kept.

        A path is never likelier than its beginning, so the tree stays what it is. Asked on the CPU alone: elsewhere the
        answer costs a wait for the device.
        """
        kept = self.max_nodes - 1
        if scores_BC.device.type != "cpu" or scores_BC.shape[1] < kept:
            return False
        least_B = scores_BC.topk(kept).values[:, -1]
        return bool((scores_BC[:, first:].amax(1) <= least_B).all())

    def _keep_best(self, draft: DraftRound, tokens: Tensor, scores: Tensor, parents: Tensor, expanded: Tensor) -> Grown:
        # A parent scores at least its child and stands before it, so a stable sort keeps parents with their children.
        size = tokens.shape[1]
        order = scores.sort(dim=1, descending=True, stable=True)
        keep = order.indices[:, : self.max_nodes - 1]
        kept_score = order.values[:, : self.max_nodes - 1]
        keep = torch.where(kept_score > -torch.inf, keep, size).sort(1).values
        valid = keep < size
        at = keep.clamp_max(size - 1)
        # Padding writes its number into a column of its own, behind the candidates.
        number = torch.arange(1, keep.shape[1] + 1, device=keep.device).expand_as(keep)
        node_of = torch.zeros(len(keep), size + 1, dtype=torch.int64, device=keep.device).scatter(1, keep, number)
        above = parents.gather(1, at)
        parent_node = torch.where(above >= 0, node_of.gather(1, above.clamp_min(0)), 0)
        root = draft.roots_B[:, None]
        tokens_BN = torch.cat([root, torch.where(valid, tokens.gather(1, at), 0)], 1)
        parents_BN = torch.cat([torch.full_like(root, -1), torch.where(valid, parent_node, -1)], 1)
        expanded_BN = torch.cat([torch.zeros_like(root), expanded.gather(1, at)], 1)
        behind = scores.gather(1, at) - torch.where(above >= 0, scores.gather(1, above.clamp_min(0)), 0.0)
        unknown = torch.full(root.shape, torch.nan, device=keep.device)
        confidence_BN = torch.cat([unknown, behind.exp().float()], 1)
        tree = TokenTree.from_parents(tokens_BN, parents_BN, 1 + valid.sum(1), draft.vocab_size, confidence_BN)
        return Grown.within(int_tensor(draft.limits, keep.device), tree, expanded_BN)
