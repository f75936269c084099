"""What the Triton kernels of tree attention have in common: finding a program's rows, and adding a tile of keys to a softmax.

Shape letters in names: R rows of a program (nodes x heads of one kv head), t keys of a tile, E a head's numbers, padded to a
power of two. Scores are in base 2, scaled by log2(e), since the GPU has exp2.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


def dense_heads(*states_XGE: Tensor) -> list[Tensor]:
    """The tensors with the numbers of each head side by side; copied only where they are not."""
    return [one if one.stride(2) == 1 or one.shape[2] == 1 else one.contiguous() for one in states_XGE]


@triton.jit
def locate_block(
    block: tl.tensor,
    starts: tl.tensor,
    num_sequences: tl.tensor,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    BATCH: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The sequence that a block of rows belongs to, and the block's place in it; HEADS are those of one kv head.

    Sequence b has the blocks from `row_start * HEADS // ROWS + b` on, which are never too few (as every sequence adds one).
    """
    b = tl.arange(0, BATCH)
    first_b = tl.load(starts + b, mask=b < num_sequences, other=0) * HEADS // ROWS + b
    sequence = tl.sum(((first_b <= block) & (b < num_sequences)).to(tl.int32), 0) - 1
    return sequence, block - (tl.load(starts + sequence) * HEADS // ROWS + sequence)


@triton.jit
def load_span(
    starts: tl.tensor, num_sequences: tl.tensor, field: tl.constexpr, sequence: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """Where a sequence's rows, keys or tail (field 0, 1, 2) start, and how many there are."""
    at = starts + field * (num_sequences + 1) + sequence
    start = tl.load(at)
    return start, tl.load(at + 1) - start


@triton.jit
def load_rows(
    query: tl.tensor,
    query_stride: tl.tensor,
    head_stride: tl.tensor,
    first_row: tl.tensor,
    num_queries: tl.tensor,
    block: tl.tensor,
    group: tl.tensor,
    HEADS: tl.constexpr,
    KEY_SIZE: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """A block of a sequence's rows, the heads of one kv head after another for each node: whether a row exists, its node, its
    place among all packed tokens, its head, and its query."""
    flat_R = block * ROWS + tl.arange(0, ROWS)
    is_row_R = flat_R < num_queries * HEADS
    node_R, head_R = flat_R // HEADS, group * HEADS + flat_R % HEADS
    row_R = (first_row + node_R).to(tl.int64)
    e = tl.arange(0, KEY_BLOCK)
    at_RE = query + row_R[:, None] * query_stride + head_R[:, None] * head_stride + e[None, :]
    query_RE = tl.load(at_RE, mask=is_row_R[:, None] & (e < KEY_SIZE)[None, :], other=0.0)
    return is_row_R, node_R, row_R, head_R, query_RE


@triton.jit
def cap(scores: tl.tensor, softcap: tl.tensor) -> tl.tensor:
    """softcap * tanh(scores / softcap)."""
    x = scores / softcap
    square = x * x
    # Near zero the other form cancels; the series is right to float32 there.
    series = x * (1 + square * (-0.33333334 + square * (0.13333334 - square * 0.053968254)))
    # exp2 overflows to inf, which gives 1, as it should.
    tanh = tl.where(tl.abs(x) < 0.2, series, 1 - 2 / (tl.exp2(2.8853900817779268 * x) + 1))
    return softcap * tanh


@triton.jit
def product(left: tl.tensor, right: tl.tensor, acc: tl.tensor, IS_INTERPRETED: tl.constexpr) -> tl.tensor:
    """acc + left @ right in float32, without tf32."""
    if IS_INTERPRETED:
        # Which takes the bits of bfloat16 for integers.
        return tl.dot(left.to(tl.float32), right.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(left, right, acc, input_precision="ieee")


@triton.jit
def add_tile(
    query_RE: tl.tensor,
    max_R: tl.tensor,
    sum_R: tl.tensor,
    acc_RE: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    key_stride: tl.tensor,
    value_stride: tl.tensor,
    slots_t: tl.tensor,
    is_key_t: tl.tensor,
    sees_Rt: tl.tensor,
    scaling: tl.tensor,
    softcap: tl.tensor,
    KEY_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    IS_INTERPRETED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """One step of the online softmax: largest score, sum of weights and weighted values so far, a tile of keys added.

    A row that sees nothing of the tile keeps its bits: it is multiplied by an exact one, and exact zeros are added. Slots are
    only read where `is_key_t`. (Milakov and Gimelshein, 2018, and Dao et al., 2022.)
    """
    e = tl.arange(0, KEY_BLOCK)
    place_t = slots_t.to(tl.int64)[:, None]
    is_number = is_key_t[:, None] & (e < KEY_SIZE)[None, :]
    keys_tE = tl.load(keys + place_t * key_stride + e[None, :], mask=is_number, other=0.0)
    nothing = tl.zeros([query_RE.shape[0], slots_t.shape[0]], tl.float32)
    scores_Rt = product(query_RE, tl.trans(keys_tE), nothing, IS_INTERPRETED) * scaling
    if HAS_SOFTCAP:
        scores_Rt = cap(scores_Rt, softcap)
    scores_Rt = tl.where(sees_Rt, scores_Rt * 1.4426950408889634, float("-inf"))
    new_max_R = tl.maximum(max_R, tl.max(scores_Rt, 1))
    # A row that has seen nothing yet must not compute inf - inf.
    base_R = tl.where(new_max_R == float("-inf"), 0.0, new_max_R)
    weights_Rt = tl.exp2(scores_Rt - base_R[:, None])
    fading_R = tl.exp2(max_R - base_R)
    sum_R = sum_R * fading_R + tl.sum(weights_Rt, 1)
    e = tl.arange(0, VALUE_BLOCK)
    is_number = is_key_t[:, None] & (e < VALUE_SIZE)[None, :]
    values_tE = tl.load(values + place_t * value_stride + e[None, :], mask=is_number, other=0.0)
    acc_RE = product(weights_Rt.to(values_tE.dtype), values_tE, acc_RE * fading_R[:, None], IS_INTERPRETED)
    return new_max_R, sum_R, acc_RE


@triton.jit
def add_sink(largest: tl.tensor, total: tl.tensor, sink: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """One more logit in the softmax's denominator: the new sum of weights, and what the weighted values are multiplied by."""
    sink = sink.to(tl.float32) * 1.4426950408889634
    base = tl.maximum(largest, sink)
    fading = tl.exp2(largest - base)
    return total * fading + tl.exp2(sink - base), fading
