"""Tree attention on the GPU: a program takes rows of one sequence and kv head, and a split of the keys."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from specdec.kernels.dispatch import is_interpreting
from specdec.kernels.tree_attention.batch import Batch
from specdec.kernels.tree_attention.launch import Launch, choose_launch, num_row_blocks, num_sms, pad_size
from specdec.kernels.tree_attention.split import Partials, merge_splits
from specdec.kernels.tree_attention.tiles import add_sink, add_tile, dense_heads, load_rows, load_span, locate_block


def tree_attention_triton(
    query_THE: Tensor,
    key_cache_SGE: Tensor,
    value_cache_SGE: Tensor,
    batch: Batch,
    scaling: float,
    window: int | None,
    softcap: float | None,
    sinks_H: Tensor | None,
    launch: Launch | None = None,
) -> Tensor:
    """See `tree_attention`; `launch` is chosen by the shapes unless given. Weights are rounded to the values' dtype, sums are
    float32.

    Every key and value is read once per block of rows: the heads of its kv head for all nodes of the sequence, where these are
    few enough for one block. Long contexts are split among programs, whose results a second kernel merges (Dao et al.,
    Flash-Decoding, 2023).
    """
    num_rows, heads, key_size = query_THE.shape
    groups, value_size = value_cache_SGE.shape[1:]
    if launch is None:
        launch = choose_launch(
            num_rows,
            batch.num_sequences,
            groups,
            heads // groups,
            batch.max_queries,
            batch.max_keys,
            key_size,
            value_size,
            query_THE.element_size(),
            num_sms(query_THE.device),
        )
    query_THE, key_cache_SGE, value_cache_SGE = dense_heads(query_THE, key_cache_SGE, value_cache_SGE)
    out_THE = query_THE.new_empty(num_rows, heads, value_size)
    # Where nothing is split, the buffers of partial results are never touched.
    partials = Partials.empty(launch.num_splits if launch.num_splits > 1 else 0, num_rows, heads, value_size, query_THE)
    blocks = num_row_blocks(num_rows, batch.num_sequences, heads // groups, launch.block_rows)
    _attend[blocks, groups, launch.num_splits](
        query_THE,
        key_cache_SGE,
        value_cache_SGE,
        out_THE,
        *partials.tensors,
        batch.starts_4b,
        batch.slots_K,
        batch.tail_positions_M,
        batch.positions_T,
        batch.words_TW,
        query_THE if sinks_H is None else sinks_H,
        batch.num_sequences,
        num_rows,
        batch.words_TW.shape[1],
        query_THE.stride(0),
        query_THE.stride(1),
        *key_cache_SGE.stride()[:2],
        *value_cache_SGE.stride()[:2],
        scaling,
        0.0 if softcap is None else softcap,
        0 if window is None else window,
        HEADS=heads // groups,
        KEY_SIZE=key_size,
        VALUE_SIZE=value_size,
        KEY_BLOCK=pad_size(key_size),
        VALUE_BLOCK=pad_size(value_size),
        ROWS=launch.block_rows,
        TILE=launch.tile,
        NUM_SPLITS=launch.num_splits,
        BATCH=pad_size(batch.num_sequences),
        HAS_TREES=batch.words_TW.shape[1] > 0,
        HAS_WINDOW=window is not None,
        HAS_SOFTCAP=softcap is not None,
        HAS_SINKS=sinks_H is not None,
        IS_INTERPRETED=is_interpreting(),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    if launch.num_splits > 1:
        merge_splits(partials, sinks_H, out_THE)
    return out_THE


@triton.jit(do_not_specialize=["num_sequences", "num_rows", "num_words", "window"])
def _attend(
    query: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    out: tl.tensor,
    partial_max: tl.tensor,
    partial_sum: tl.tensor,
    partial_acc: tl.tensor,
    starts: tl.tensor,
    slots: tl.tensor,
    tail_positions: tl.tensor,
    positions: tl.tensor,
    words: tl.tensor,
    sinks: tl.tensor,
    num_sequences: tl.tensor,
    num_rows: tl.tensor,
    num_words: tl.tensor,
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
    NUM_SPLITS: tl.constexpr,
    BATCH: tl.constexpr,
    HAS_TREES: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    IS_INTERPRETED: tl.constexpr,
) -> None:
    """Rows x all keys that any of them sees in one split: tiles of the visible keys, then tiles of the tail."""
    sequence, block = locate_block(tl.program_id(0), starts, num_sequences, HEADS, ROWS, BATCH)
    first_row, num_queries = load_span(starts, num_sequences, 0, sequence)
    if block * ROWS >= num_queries * HEADS:
        return
    first_key, num_keys = load_span(starts, num_sequences, 1, sequence)
    first_tail, num_tail = load_span(starts, num_sequences, 2, sequence)
    is_tree = tl.load(starts + 3 * (num_sequences + 1) + sequence) != 0
    num_visible = num_keys - num_tail
    group, split = tl.program_id(1), tl.program_id(2)

    is_row_R, node_R, row_R, head_R, query_RE = load_rows(
        query, query_stride, head_stride, first_row, num_queries, block, group, HEADS, KEY_SIZE, KEY_BLOCK, ROWS
    )
    # The queries are the last keys of the tail.
    tail_R = num_tail - num_queries + node_R
    position_R = tl.load(positions + row_R, mask=is_row_R, other=0)
    keys += group.to(tl.int64) * key_group_stride
    values += group.to(tl.int64) * value_group_stride

    # Tiles count from the first one that a row's window reaches; a chunk's rows see nothing behind the last of them.
    first_tile = 0
    if HAS_WINDOW:
        lowest = tl.min(tl.where(is_row_R, position_R, 2147483647), 0) - window + 1
        first_tile = tl.minimum(tl.maximum(lowest, 0), num_visible) // TILE
    visible_tiles = tl.cdiv(num_visible, TILE)
    seen_tail = tl.where(is_tree, num_tail, tl.max(tl.where(is_row_R, tail_R, 0), 0) + 1)
    last_tile = visible_tiles + tl.cdiv(seen_tail, TILE)
    per_split = tl.cdiv(last_tile - first_tile, NUM_SPLITS)
    begin = first_tile + split * per_split
    end = tl.minimum(begin + per_split, last_tile)

    max_R = tl.full([ROWS], float("-inf"), tl.float32)
    sum_R = tl.zeros([ROWS], tl.float32)
    acc_RE = tl.zeros([ROWS, VALUE_BLOCK], tl.float32)
    t = tl.arange(0, TILE)
    for tile in tl.range(begin, tl.minimum(end, visible_tiles)):
        key_t = tile * TILE + t
        is_key_t = key_t < num_visible
        sees_Rt = is_key_t[None, :] & is_row_R[:, None]
        if HAS_WINDOW:
            sees_Rt = sees_Rt & (position_R[:, None] - key_t[None, :] < window)
        slots_t = tl.load(slots + first_key + key_t, mask=is_key_t, other=0)
        max_R, sum_R, acc_RE = add_tile(
            query_RE, max_R, sum_R, acc_RE, keys, values, key_stride, value_stride, slots_t, is_key_t, sees_Rt,
            scaling, softcap, KEY_SIZE, VALUE_SIZE, KEY_BLOCK, VALUE_BLOCK, HAS_SOFTCAP, IS_INTERPRETED,
        )  # fmt: skip
    for tile in tl.range(tl.maximum(begin, visible_tiles), end):
        tail_t = (tile - visible_tiles) * TILE + t
        is_key_t = tail_t < num_tail
        sees_Rt = tail_t[None, :] <= tail_R[:, None]
        if HAS_TREES:
            word = (tile - visible_tiles) * TILE // 64
            word_R = tl.load(words + row_R * num_words + word, mask=is_row_R & is_tree, other=0)
            bit_Rt = (word_R[:, None] >> (tail_t % 64).to(tl.int64)[None, :]) & 1
            sees_Rt = tl.where(is_tree, bit_Rt != 0, sees_Rt)
        sees_Rt = sees_Rt & is_key_t[None, :] & is_row_R[:, None]
        if HAS_WINDOW:
            position_t = tl.load(tail_positions + first_tail + tail_t, mask=is_key_t, other=0)
            sees_Rt = sees_Rt & (position_R[:, None] - position_t[None, :] < window)
        slots_t = tl.load(slots + first_key + num_visible + tail_t, mask=is_key_t, other=0)
        max_R, sum_R, acc_RE = add_tile(
            query_RE, max_R, sum_R, acc_RE, keys, values, key_stride, value_stride, slots_t, is_key_t, sees_Rt,
            scaling, softcap, KEY_SIZE, VALUE_SIZE, KEY_BLOCK, VALUE_BLOCK, HAS_SOFTCAP, IS_INTERPRETED,
        )  # fmt: skip

    e = tl.arange(0, VALUE_BLOCK)
    is_number = is_row_R[:, None] & (e < VALUE_SIZE)[None, :]
    num_heads = tl.num_programs(1) * HEADS
    if NUM_SPLITS == 1:
        if HAS_SINKS:
            sum_R, fading_R = add_sink(max_R, sum_R, tl.load(sinks + head_R, mask=is_row_R, other=0.0))
            acc_RE = acc_RE * fading_R[:, None]
        out_RE = acc_RE / tl.where(sum_R > 0, sum_R, 1.0)[:, None]
        place_R = row_R * num_heads + head_R
        tl.store(out + place_R[:, None] * VALUE_SIZE + e[None, :], out_RE.to(out.dtype.element_ty), mask=is_number)
    else:
        place_R = (split * num_rows.to(tl.int64) + row_R) * num_heads + head_R
        tl.store(partial_max + place_R, max_R, mask=is_row_R)
        tl.store(partial_sum + place_R, sum_R, mask=is_row_R)
        tl.store(partial_acc + place_R[:, None] * VALUE_SIZE + e[None, :], acc_RE, mask=is_number)
