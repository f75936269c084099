"""Walks down token trees: what a kernel is told, and the dispatch."""

from __future__ import annotations

from torch import Tensor

from specdec.kernels.acceptance.reference import follow_reference, rejection_reference, traversal_reference
from specdec.kernels.acceptance.trees import AcceptedPath, Coins, SampledTrees
from specdec.kernels.dispatch import use_triton


def follow(tokens_BN: Tensor, parents_BN: Tensor, drawn_T: Tensor, first_B: Tensor) -> AcceptedPath:
    """From the root, on to the child that carries the token drawn at its parent, as long as there is one.

    `drawn_T` holds the target's token at every real node, trees behind one another, that of row b from `first_B[b]` on;
    `parents_BN` is -1 for roots and padding. Raises ValueError for shapes that do not fit.
    """
    _check(tokens_BN, parents_BN, first_B)
    if use_triton(tokens_BN):
        from specdec.kernels.acceptance.triton import follow_triton

        return follow_triton(tokens_BN, parents_BN, drawn_T, first_B)
    return follow_reference(tokens_BN, parents_BN, drawn_T, first_B)


def rejection(trees: SampledTrees, laws_TV: Tensor, first_B: Tensor, coins: Coins) -> AcceptedPath:
    """Token-by-token speculative sampling on chains (Leviathan et al. 2023, algorithm 1) from the target's laws [T, V].

    Raises ValueError for shapes that do not fit.
    """
    _check(trees.tokens_BN, trees.parents_BN, first_B)
    if use_triton(laws_TV):
        from specdec.kernels.acceptance.triton import rejection_triton

        return rejection_triton(trees, laws_TV, first_B, coins)
    return rejection_reference(trees, laws_TV, first_B, coins)


def traversal(trees: SampledTrees, laws_TV: Tensor, first_B: Tensor, coins: Coins) -> AcceptedPath:
    """Traversal verification (Weng et al. 2025, algorithm 1) from the target's laws [T, V], which are left as they are.

    Raises ValueError for shapes that do not fit.
    """
    _check(trees.tokens_BN, trees.parents_BN, first_B)
    if use_triton(laws_TV):
        from specdec.kernels.acceptance.triton import traversal_triton

        return traversal_triton(trees, laws_TV, first_B, coins)
    return traversal_reference(trees, laws_TV, first_B, coins)


def _check(tokens_BN: Tensor, parents_BN: Tensor, first_B: Tensor) -> None:
    if parents_BN.shape != tokens_BN.shape or first_B.shape != tokens_BN.shape[:1]:
        raise ValueError(
            f"tokens {tuple(tokens_BN.shape)}, parents {tuple(parents_BN.shape)} and first rows {tuple(first_B.shape)} "
            "must be [B, N], [B, N] and [B]"
        )
