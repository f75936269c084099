"""Writing new keys and values on the GPU: one launch for both, a program per token and block of its numbers."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

# Numbers per program: 16 bytes for each thread of four warps.
BLOCK = 1024


def kv_write_triton(
    key_cache_SGE: Tensor, value_cache_SGE: Tensor, slots_T: Tensor, keys_TGE: Tensor, values_TGE: Tensor
) -> None:
    """See `kv_write`. New tensors may have any strides, as attention hands them over as views."""
    if not len(slots_T):
        return
    keys_TGE, values_TGE = keys_TGE.to(key_cache_SGE.dtype), values_TGE.to(value_cache_SGE.dtype)
    groups, key_size = key_cache_SGE.shape[1:]
    value_size = value_cache_SGE.shape[2]
    blocks = triton.cdiv(groups * max(key_size, value_size), BLOCK)
    _write[len(slots_T), blocks](
        key_cache_SGE,
        value_cache_SGE,
        slots_T,
        keys_TGE,
        values_TGE,
        *keys_TGE.stride(),
        *values_TGE.stride(),
        *key_cache_SGE.stride(),
        *value_cache_SGE.stride(),
        GROUPS=groups,
        KEY_SIZE=key_size,
        VALUE_SIZE=value_size,
        BLOCK=BLOCK,
    )


@triton.jit
def _copy(
    source: tl.tensor,
    source_group: tl.tensor,
    source_number: tl.tensor,
    target: tl.tensor,
    target_group: tl.tensor,
    target_number: tl.tensor,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    group, number, is_number = at // SIZE, at % SIZE, at < GROUPS * SIZE
    new = tl.load(source + group * source_group + number * source_number, mask=is_number)
    tl.store(target + group * target_group + number * target_number, new, mask=is_number)


@triton.jit
def _write(
    key_cache: tl.tensor,
    value_cache: tl.tensor,
    slots: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    key_token: tl.tensor,
    key_group: tl.tensor,
    key_number: tl.tensor,
    value_token: tl.tensor,
    value_group: tl.tensor,
    value_number: tl.tensor,
    key_cache_slot: tl.tensor,
    key_cache_group: tl.tensor,
    key_cache_number: tl.tensor,
    value_cache_slot: tl.tensor,
    value_cache_group: tl.tensor,
    value_cache_number: tl.tensor,
    GROUPS: tl.constexpr,
    KEY_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    _copy(
        keys + token * key_token, key_group, key_number,
        key_cache + slot * key_cache_slot, key_cache_group, key_cache_number, GROUPS, KEY_SIZE, BLOCK,
    )  # fmt: skip
    _copy(
        values + token * value_token, value_group, value_number,
        value_cache + slot * value_cache_slot, value_cache_group, value_cache_number, GROUPS, VALUE_SIZE, BLOCK,
    )  # fmt: skip
