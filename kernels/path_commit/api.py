"""Slots to slots in all layers at once, which is how accepted paths reach their positions: checks and dispatch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from specdec.kernels.dispatch import use_triton
from specdec.kernels.path_commit.reference import path_commit_reference


def path_commit(caches_LSGE: Sequence[Tensor], sources_BK: Tensor, targets_BK: Tensor) -> None:
    """Copies slot `sources_BK[b, k]` to `targets_BK[b, k]` in every layer of every cache, in place; -1 in both is padding.

    The moves of one row happen at once: a slot may be source and target, and every target gets what its source held before.
    No slot is a target twice, and a row's targets are no sources of other rows. Raises ValueError for shapes that differ.
    """
    if sources_BK.shape != targets_BK.shape or sources_BK.ndim != 2:
        raise ValueError(f"sources {list(sources_BK.shape)} and targets {list(targets_BK.shape)} must be alike, [B, K]")
    if not sources_BK.numel() or not caches_LSGE:
        return
    if use_triton(caches_LSGE[0]):
        # Here, since triton need not be installed where it is not used.
        from specdec.kernels.path_commit.triton import path_commit_triton

        path_commit_triton(caches_LSGE, sources_BK, targets_BK)
    else:
        path_commit_reference(caches_LSGE, sources_BK, targets_BK)
