"""Moves of slots on the GPU: a program takes all moves of one row, in one layer, for a block of a slot's numbers."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from specdec.kernels.path_commit.reference import path_commit_reference

# Numbers that a program holds at once, in the registers of four warps.
NUMBERS = 8192
# Rows longer than this leave less than 16 numbers side by side; such moves are rare, and large enough to go eagerly.
MAX_MOVES = NUMBERS // 16


def path_commit_triton(caches_LSGE: Sequence[Tensor], sources_BK: Tensor, targets_BK: Tensor) -> None:
    """See `path_commit`. A launch per cache; nothing waits for the device."""
    rows, moves = sources_BK.shape
    if moves > MAX_MOVES:
        path_commit_reference(caches_LSGE, sources_BK, targets_BK)
        return
    sources_BK, targets_BK = sources_BK.contiguous(), targets_BK.contiguous()
    moves_block = triton.next_power_of_2(moves)
    for cache in caches_LSGE:
        layers, _, groups, size = cache.shape
        block = min(triton.next_power_of_2(groups * size), max(16, NUMBERS // moves_block), 1024)
        if not layers:
            continue
        _move[rows, layers, triton.cdiv(groups * size, block)](
            cache,
            sources_BK,
            targets_BK,
            moves,
            cache.stride(0),
            NUMBERS=groups * size,
            MOVES=moves_block,
            BLOCK=block,
        )


@triton.jit(do_not_specialize=["num_moves"])
def _move(
    cache: tl.tensor,
    sources: tl.tensor,
    targets: tl.tensor,
    num_moves: tl.tensor,
    layer_stride: tl.tensor,
    NUMBERS: tl.constexpr,
    MOVES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row, layer = tl.program_id(0), tl.program_id(1).to(tl.int64)
    k, at = tl.arange(0, MOVES), tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    source_k = tl.load(sources + row * num_moves + k, mask=k < num_moves, other=-1).to(tl.int64)
    target_k = tl.load(targets + row * num_moves + k, mask=k < num_moves, other=-1).to(tl.int64)
    is_moved = ((target_k >= 0) & (source_k != target_k))[:, None] & (at < NUMBERS)[None, :]
    cache += layer * layer_stride
    held = tl.load(cache + source_k[:, None] * NUMBERS + at[None, :], mask=is_moved)
    # Other threads may hold what this one overwrites: all have read before any writes.
    tl.debug_barrier()
    tl.store(cache + target_k[:, None] * NUMBERS + at[None, :], held, mask=is_moved)
