"""The second kernel of invariant tree attention: node by node, the tiles of its own path, and all partial results in order."""

from __future__ import annotations

import triton
import triton.language as tl

from specdec.kernels.tree_attention.tiles import add_sink, add_tile, load_rows, load_span


@triton.jit
def shared_keys(
    starts: tl.tensor,
    num_sequences: tl.tensor,
    sequence: tl.tensor,
    num_visible: tl.tensor,
    num_keys: tl.tensor,
    TILE: tl.constexpr,
) -> tl.tensor:
    """How many of a sequence's keys lie in tiles that all its rows share."""
    is_tree = tl.load(starts + 3 * (num_sequences + 1) + sequence) != 0
    return tl.where(is_tree, num_visible // TILE * TILE, num_keys)


@triton.jit
def path_keys(
    position_t: tl.tensor,
    row: tl.tensor,
    num_visible: tl.tensor,
    num_tail: tl.tensor,
    tail_positions: tl.tensor,
    words: tl.tensor,
    num_words: tl.tensor,
) -> tl.tensor:
    """Which of its sequence's keys lie at these positions of a row's path."""
    j = tl.arange(0, 64)
    key_t = tl.where(position_t < num_visible, position_t, num_visible)
    for word in tl.range(0, tl.cdiv(num_tail, 64)):
        node_j = word * 64 + j
        position_j = tl.load(tail_positions + node_j, mask=node_j < num_tail, other=-1)
        bit_j = (tl.load(words + row * num_words + word) >> j.to(tl.int64)) & 1
        is_here_tj = (position_j[None, :] == position_t[:, None]) & (bit_j != 0)[None, :]
        key_t += tl.sum(tl.where(is_here_tj, node_j[None, :], 0), 1)
    return key_t


@triton.jit(do_not_specialize=["num_sequences", "num_rows", "window", "num_words"])
def finish(
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
    tail_positions: tl.tensor,
    words: tl.tensor,
    num_words: tl.tensor,
    sinks: tl.tensor,
    out: tl.tensor,
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
    HAS_SINKS: tl.constexpr,
    IS_INTERPRETED: tl.constexpr,
) -> None:
    """One node: its splits in order, each gone on with by the tiles of its own path; a block of heads as its rows."""
    row, group, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b = tl.arange(0, BATCH)
    sequence = tl.sum((tl.load(starts + b, mask=b < num_sequences, other=2147483647) <= row).to(tl.int32), 0) - 1
    if row >= tl.load(starts + num_sequences):
        return
    first_key, num_keys = load_span(starts, num_sequences, 1, sequence)
    first_tail, num_tail = load_span(starts, num_sequences, 2, sequence)
    num_visible = num_keys - num_tail
    num_shared = shared_keys(starts, num_sequences, sequence, num_visible, num_keys, TILE)
    position = tl.load(positions + row)
    is_row_R, _, row_R, head_R, query_RE = load_rows(
        query, query_stride, head_stride, row, 1, block, group, HEADS, KEY_SIZE, KEY_BLOCK, ROWS
    )
    keys += group.to(tl.int64) * key_group_stride
    values += group.to(tl.int64) * value_group_stride
    num_heads = tl.num_programs(1) * HEADS
    e = tl.arange(0, VALUE_BLOCK)
    is_number = is_row_R[:, None] & (e < VALUE_SIZE)[None, :]
    lowest = 0
    if HAS_WINDOW:
        lowest = tl.maximum(position - window + 1, 0)

    all_max_R = tl.full([ROWS], float("-inf"), tl.float32)
    all_sum_R = tl.zeros([ROWS], tl.float32)
    all_acc_RE = tl.zeros([ROWS, VALUE_BLOCK], tl.float32)
    for split in tl.range(lowest // SPLIT, position // SPLIT + 1):
        is_begun = split * SPLIT < num_shared
        place_R = (split * num_rows.to(tl.int64) + row_R) * num_heads + head_R
        max_R = tl.load(partial_max + place_R, mask=is_row_R & is_begun, other=float("-inf"))
        sum_R = tl.load(partial_sum + place_R, mask=is_row_R & is_begun, other=0.0)
        at_RE = partial_acc + place_R[:, None] * VALUE_SIZE + e[None, :]
        acc_RE = tl.load(at_RE, mask=is_number & is_begun, other=0.0)
        first_own = tl.maximum(tl.maximum(split * SPLIT, num_shared), lowest // TILE * TILE)
        end_own = tl.minimum((split + 1) * SPLIT, position + 1)
        for tile in tl.range(tl.cdiv(first_own, TILE), tl.cdiv(end_own, TILE)):
            position_t = tile * TILE + tl.arange(0, TILE)
            is_key_t = position_t <= position
            sees_t = is_key_t
            if HAS_WINDOW:
                sees_t = sees_t & (position - position_t < window)
            key_t = path_keys(position_t, row, num_visible, num_tail, tail_positions + first_tail, words, num_words)
            slots_t = tl.load(slots + first_key + key_t, mask=is_key_t, other=0)
            max_R, sum_R, acc_RE = add_tile(
                query_RE, max_R, sum_R, acc_RE, keys, values, key_stride, value_stride, slots_t, is_key_t,
                sees_t[None, :] & is_row_R[:, None],
                scaling, softcap, KEY_SIZE, VALUE_SIZE, KEY_BLOCK, VALUE_BLOCK, HAS_SOFTCAP, IS_INTERPRETED,
            )  # fmt: skip
        new_max_R = tl.maximum(all_max_R, max_R)
        base_R = tl.where(new_max_R == float("-inf"), 0.0, new_max_R)
        fading_R, weight_R = tl.exp2(all_max_R - base_R), tl.exp2(max_R - base_R)
        all_sum_R = all_sum_R * fading_R + sum_R * weight_R
        all_acc_RE = all_acc_RE * fading_R[:, None] + acc_RE * weight_R[:, None]
        all_max_R = new_max_R
    if HAS_SINKS:
        sink_R = tl.load(sinks + head_R, mask=is_row_R, other=0.0)
        all_sum_R, fading_R = add_sink(all_max_R, all_sum_R, sink_R)
        all_acc_RE = all_acc_RE * fading_R[:, None]
    out_RE = all_acc_RE / tl.where(all_sum_R > 0, all_sum_R, 1.0)[:, None]
    place_R = row_R * num_heads + head_R
    tl.store(out + place_R[:, None] * VALUE_SIZE + e[None, :], out_RE.to(out.dtype.element_ty), mask=is_number)
