"""Smaller trees from a policy: a depth of its own for every row, and nodes taken out again where that is free."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.drafters.growth import DraftRound, FixedPolicy, GrowingPolicy, Grown
from specdec.int_tensor import sent
from specdec.interfaces import Noise, TreePolicy
from specdec.tree import DrawKind, TokenTree


@dataclass(frozen=True)
class Pruned:
    """A tree and, per node, its index in the tree that it was pruned from (padding: anything)."""

    tree: TokenTree
    origin_BN: Tensor


def prune(tree: TokenTree, keep_BN: Tensor) -> Pruned:
    """The trees of the kept nodes and the roots.

    Only FIXED nodes may go: a tree that has lost drawn nodes after they were seen is biased under every rule that reads
    draws. Raises ValueError for a drawn node, and for a kept one whose parent is gone.
    """
    if tree.device.type != "cpu" and tree.draft_laws_BNV is None:
        # The host knows the tree, and would wait for whatever it asks the device.
        pruned = prune(tree.on_cpu, keep_BN.cpu())
        return Pruned(pruned.tree.to(tree.device), sent(pruned.origin_BN, tree.device))
    keep_BN = (keep_BN.to(tree.device) & tree.is_node_BN).index_fill(1, torch.tensor([0], device=tree.device), True)
    gone_BN = tree.is_node_BN & ~keep_BN
    if bool((gone_BN & (tree.node_kinds_BN != DrawKind.FIXED)).any()):
        raise ValueError("a drawn node was to be pruned: whether it exists must be decided before it is drawn")
    above_BN = tree.parents_BN.clamp_min(0)
    if bool((keep_BN & gone_BN.gather(1, above_BN)).any()):
        raise ValueError("a node was to be kept without its parent")
    if not bool(gone_BN.any()):
        return Pruned(tree, torch.arange(tree.max_nodes, device=tree.device).expand_as(tree.tokens_BN))
    if tree.spec.is_sampled:
        raise ValueError("a tree with drawn nodes is pruned whole or not at all")
    count_B = keep_BN.sum(1)
    width = int(count_B.max())
    origin_BN = keep_BN.logical_not().sort(dim=1, stable=True).indices[:, :width]
    inside = torch.arange(width, device=tree.device) < count_B[:, None]
    number_BN = keep_BN.cumsum(1) - 1
    parents_BN = number_BN.gather(1, above_BN).gather(1, origin_BN)
    parents_BN = torch.where(inside & (origin_BN > 0), parents_BN, -1)
    tokens_BN = torch.where(inside, tree.tokens_BN.gather(1, origin_BN), 0)
    confidence = None if tree.confidence_BN is None else tree.confidence_BN.gather(1, origin_BN)
    return Pruned(
        TokenTree.from_parents(tokens_BN, parents_BN, count_B, tree.vocab_size, confidence_BN=confidence), origin_BN
    )


class Shallower:
    """A policy whose trees end at `depths` of each row; what is left is decided before anything is drawn.

    `keep` may then take out FIXED nodes of the grown trees (None: none); `was_grown` tells whether it has been asked, for
    drafters that follow a policy without letting it grow.
    """

    def __init__(
        self, policy: TreePolicy, depths: Seq[int], keep: Callable[[TokenTree], Tensor | None] = lambda tree: None
    ) -> None:
        self._policy, self._depths, self._keep = policy, list(depths), keep
        self.spec, self.max_depth = policy.spec, max(max(depths), 1)
        self.max_nodes, self.max_expanded = policy.max_nodes, policy.max_expanded
        self.was_grown = False

    def grow(self, draft: DraftRound, noise: Noise) -> Grown:
        assert isinstance(self._policy, GrowingPolicy)
        self.was_grown = True
        draft.limits = [min(pair) for pair in zip(draft.limits, self._depths, strict=True)]
        if not any(draft.limits):
            return Grown(TokenTree.roots(draft.roots_B, draft.vocab_size), torch.full_like(draft.roots_B[:, None], -1))
        grown = self._policy.grow(draft, noise)
        keep_BN = self._keep(grown.tree)
        if keep_BN is None:
            return grown
        pruned = prune(grown.tree, keep_BN)
        return Grown(pruned.tree, grown.expanded_BN.gather(1, pruned.origin_BN))


class ShallowerFixed(Shallower, FixedPolicy):
    """The same for policies that also admit ready-made paths."""

    def admits(self, ranks: tuple[int, ...], num_nodes: int) -> bool:
        assert isinstance(self._policy, FixedPolicy)
        return self._policy.admits(ranks, num_nodes)


def shallower(
    policy: TreePolicy, depths: Seq[int], keep: Callable[[TokenTree], Tensor | None] = lambda tree: None
) -> Shallower:
    """`policy` with `depths` per row, for whichever drafters follow it."""
    kind = ShallowerFixed if isinstance(policy, FixedPolicy) else Shallower
    return kind(policy, depths, keep)
