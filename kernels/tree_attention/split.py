"""Partial results of attention over splits of the keys, and the kernel that makes one result of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec.kernels.tree_attention.launch import pad_size
from specdec.kernels.tree_attention.tiles import add_sink


@dataclass(frozen=True)
class Partials:
    """Of every split, row and head: the largest score, the sum of weights relative to it, and the weighted values, float32."""

    max_sTH: Tensor
    sum_sTH: Tensor
    acc_sTHE: Tensor

    @staticmethod
    def empty(num_splits: int, num_rows: int, heads: int, value_size: int, like: Tensor) -> Partials:
        shape = num_splits, num_rows, heads
        both = like.new_empty(2, *shape, dtype=torch.float32)
        return Partials(both[0], both[1], like.new_empty(*shape, value_size, dtype=torch.float32))

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.max_sTH, self.sum_sTH, self.acc_sTHE


def merge_splits(partials: Partials, sinks_H: Tensor | None, out_THE: Tensor) -> None:
    """Writes one softmax out of all splits' own to `out_THE`, the sinks in its denominator."""
    num_splits, num_rows, heads, value_size = partials.acc_sTHE.shape
    _merge[num_rows, heads](
        *partials.tensors,
        partials.max_sTH if sinks_H is None else sinks_H,
        out_THE,
        num_rows,
        VALUE_SIZE=value_size,
        VALUE_BLOCK=pad_size(value_size),
        NUM_SPLITS=num_splits,
        SPLIT_BLOCK=pad_size(num_splits),
        HAS_SINKS=sinks_H is not None,
        num_warps=4,
    )


@triton.jit(do_not_specialize=["num_rows"])
def _merge(
    partial_max: tl.tensor,
    partial_sum: tl.tensor,
    partial_acc: tl.tensor,
    sinks: tl.tensor,
    out: tl.tensor,
    num_rows: tl.tensor,
    VALUE_SIZE: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    SPLIT_BLOCK: tl.constexpr,
    HAS_SINKS: tl.constexpr,
) -> None:
    row, head, num_heads = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    s, e = tl.arange(0, SPLIT_BLOCK), tl.arange(0, VALUE_BLOCK)
    place_s = (s.to(tl.int64) * num_rows + row) * num_heads + head
    max_s = tl.load(partial_max + place_s, mask=s < NUM_SPLITS, other=float("-inf"))
    sum_s = tl.load(partial_sum + place_s, mask=s < NUM_SPLITS, other=0.0)
    largest = tl.max(max_s, 0)
    base = tl.where(largest == float("-inf"), 0.0, largest)
    weight_s = tl.exp2(max_s - base)
    acc_sE = tl.load(
        partial_acc + place_s[:, None] * VALUE_SIZE + e[None, :],
        mask=(s < NUM_SPLITS)[:, None] & (e < VALUE_SIZE)[None, :],
        other=0.0,
    )
    total, acc_E = tl.sum(sum_s * weight_s, 0), tl.sum(acc_sE * weight_s[:, None], 0)
    if HAS_SINKS:
        total, fading = add_sink(largest, total, tl.load(sinks + head))
        acc_E = acc_E * fading
    out_E = acc_E / tl.where(total > 0, total, 1.0)
    place = (row * num_heads + head) * VALUE_SIZE
    tl.store(out + place + e, out_E.to(out.dtype.element_ty), mask=e < VALUE_SIZE)
