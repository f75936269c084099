"""Tree attention on the GPU by tiles of positions: a token's result depends on its own path alone, to the last bit."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from specdec.kernels.dispatch import is_interpreting
from specdec.kernels.tree_attention.batch import Batch
from specdec.kernels.tree_attention.finish import finish, shared_keys
from specdec.kernels.tree_attention.launch import INVARIANT_SPLIT, choose_invariant_launch, num_row_blocks, pad_size
from specdec.kernels.tree_attention.split import Partials
from specdec.kernels.tree_attention.tiles import add_tile, dense_heads, load_rows, load_span, locate_block


def tree_attention_invariant_triton(
    query_THE: Tensor,
    key_cache_SGE: Tensor,
    value_cache_SGE: Tensor,
    batch: Batch,
    scaling: float,
    window: int | None,
    softcap: float | None,
    sinks_H: Tensor | None,
) -> Tensor:
    """See `tree_attention`: a token gets the bits that it gets when decoded alone, whatever tree, chunk, batch or pages are
    around it.

    A row adds the keys of its path in the order of positions, in tiles that begin at multiples of their size; the tiles of
    `INVARIANT_SPLIT` positions make a partial result, and a row's partial results are added one after another. What others
    see is, to a row, multiplication by one and addition of zero. The first kernel adds the tiles that all rows of a sequence
    share: those before a tree, or all of a prompt. The second goes on, node by node, with the tiles that a tree reaches into,
    each node's own ancestors in their places. Both have products of one shape and the same code for a tile, in which no
    multiplication is fused with an addition, so that no compiler can choose to do it in one of them alone.
    """
    num_rows, heads, key_size = query_THE.shape
    groups, value_size = value_cache_SGE.shape[1:]
    launch = choose_invariant_launch(batch.max_keys, key_size, value_size, query_THE.element_size())
    query_THE, key_cache_SGE, value_cache_SGE = dense_heads(query_THE, key_cache_SGE, value_cache_SGE)
    out_THE = query_THE.new_empty(num_rows, heads, value_size)
    partials = Partials.empty(launch.num_splits, num_rows, heads, value_size, query_THE)
    inputs = (
        query_THE,
        key_cache_SGE,
        value_cache_SGE,
        *partials.tensors,
        batch.starts_4b,
        batch.slots_K,
        batch.positions_T,
        batch.num_sequences,
        num_rows,
        query_THE.stride(0),
        query_THE.stride(1),
        *key_cache_SGE.stride()[:2],
        *value_cache_SGE.stride()[:2],
        scaling,
        0.0 if softcap is None else softcap,
        0 if window is None else window,
    )
    constants = {
        "HEADS": heads // groups,
        "KEY_SIZE": key_size,
        "VALUE_SIZE": value_size,
        "KEY_BLOCK": pad_size(key_size),
        "VALUE_BLOCK": pad_size(value_size),
        "ROWS": launch.block_rows,
        "TILE": launch.tile,
        "SPLIT": INVARIANT_SPLIT,
        "BATCH": pad_size(batch.num_sequences),
        "HAS_WINDOW": window is not None,
        "HAS_SOFTCAP": softcap is not None,
        "IS_INTERPRETED": is_interpreting(),
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        "enable_fp_fusion": False,
    }
    blocks = num_row_blocks(num_rows, batch.num_sequences, heads // groups, launch.block_rows)
    _attend_shared[blocks, groups, launch.num_splits](*inputs, **constants)
    finish[num_rows, groups, triton.cdiv(heads // groups, launch.block_rows)](
        *inputs,
        batch.tail_positions_M,
        batch.words_TW,
        batch.words_TW.shape[1],
        query_THE if sinks_H is None else sinks_H,
        out_THE,
        HAS_SINKS=sinks_H is not None,
        **constants,
    )
    return out_THE


@triton.jit(do_not_specialize=["num_sequences", "num_rows", "window"])
def _attend_shared(
    query: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    partial_max: tl.tensor,
    partial_sum: tl.tensor,
    partial_acc: tl.tensor,
    starts: tl.tensor,
    slots: tl.tensor,
    positions: tl.tensor,
    num_sequences: tl.tensor,
    num_rows: tl.tensor,
    query_stride: tl.tensor,
    head_stride: tl.tensor,
    key_stride: tl.tensor,
    key_group_stride: tl.tensor,
    value_stride: tl.tensor,
    value_group_stride: tl.tensor,
    scaling: tl.tensor,
    softcap: tl.tensor,
    window: tl.tensor,
    HEADS: tl.constexpr,
    KEY_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    SPLIT: tl.constexpr,
    BATCH: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    IS_INTERPRETED: tl.constexpr,
) -> None:
    """Rows x the shared tiles of one split."""
    sequence, block = locate_block(tl.program_id(0), starts, num_sequences, HEADS, ROWS, BATCH)
    first_row, num_queries = load_span(starts, num_sequences, 0, sequence)
    if block * ROWS >= num_queries * HEADS:
        return
    first_key, num_keys = load_span(starts, num_sequences, 1, sequence)
    _, num_tail = load_span(starts, num_sequences, 2, sequence)
    num_shared = shared_keys(starts, num_sequences, sequence, num_keys - num_tail, num_keys, TILE)
    group, split = tl.program_id(1), tl.program_id(2)
    if split * SPLIT >= num_shared:
        return
    is_row_R, _, row_R, head_R, query_RE = load_rows(
        query, query_stride, head_stride, first_row, num_queries, block, group, HEADS, KEY_SIZE, KEY_BLOCK, ROWS
    )
    position_R = tl.load(positions + row_R, mask=is_row_R, other=0)
    keys += group.to(tl.int64) * key_group_stride
    values += group.to(tl.int64) * value_group_stride
    # Tiles of which no row sees anything are left out; to a row it is all the same.
    begin = split * (SPLIT // TILE)
    end = tl.minimum(begin + SPLIT // TILE, tl.cdiv(num_shared, TILE))
    end = tl.minimum(end, tl.max(tl.where(is_row_R, position_R, 0), 0) // TILE + 1)
    if HAS_WINDOW:
        lowest = tl.min(tl.where(is_row_R, position_R, 2147483647), 0) - window + 1
        begin = tl.maximum(begin, tl.maximum(lowest, 0) // TILE)

    max_R = tl.full([ROWS], float("-inf"), tl.float32)
    sum_R = tl.zeros([ROWS], tl.float32)
    acc_RE = tl.zeros([ROWS, VALUE_BLOCK], tl.float32)
    for tile in tl.range(begin, end):
        key_t = tile * TILE + tl.arange(0, TILE)
        is_key_t = key_t < num_shared
        sees_Rt = (key_t[None, :] <= position_R[:, None]) & is_key_t[None, :] & is_row_R[:, None]
        if HAS_WINDOW:
            sees_Rt = sees_Rt & (position_R[:, None] - key_t[None, :] < window)
        slots_t = tl.load(slots + first_key + key_t, mask=is_key_t, other=0)
        max_R, sum_R, acc_RE = add_tile(
            query_RE, max_R, sum_R, acc_RE, keys, values, key_stride, value_stride, slots_t, is_key_t, sees_Rt,
            scaling, softcap, KEY_SIZE, VALUE_SIZE, KEY_BLOCK, VALUE_BLOCK, HAS_SOFTCAP, IS_INTERPRETED,
        )  # fmt: skip
    place_R = (split * num_rows.to(tl.int64) + row_R) * (tl.num_programs(1) * HEADS) + head_R
    e = tl.arange(0, VALUE_BLOCK)
    tl.store(partial_max + place_R, max_R, mask=is_row_R)
    tl.store(partial_sum + place_R, sum_R, mask=is_row_R)
    is_number = is_row_R[:, None] & (e < VALUE_SIZE)[None, :]
    tl.store(partial_acc + place_R[:, None] * VALUE_SIZE + e[None, :], acc_RE, mask=is_number)
