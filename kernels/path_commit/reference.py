"""Eager moves of slots: the reference for the kernel, and what serves the CPU."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def path_commit_reference(caches_LSGE: Sequence[Tensor], sources_BK: Tensor, targets_BK: Tensor) -> None:
    """See `path_commit`."""
    is_move_BK = (targets_BK >= 0) & (sources_BK != targets_BK)
    sources, targets = sources_BK[is_move_BK], targets_BK[is_move_BK]
    for cache in caches_LSGE:
        # Reading first makes a copy, so a slot may be both source and target.
        cache.index_copy_(1, targets, cache.index_select(1, sources))
