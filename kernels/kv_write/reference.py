"""Eager writing of new keys and values: the reference for the kernel, and what serves the CPU."""

from __future__ import annotations

from torch import Tensor


def kv_write_reference(
    key_cache_SGE: Tensor,
    value_cache_SGE: Tensor,
    slots_T: Tensor,
    first_slot: int | None,
    keys_TGE: Tensor,
    values_TGE: Tensor,
) -> None:
    """See `kv_write`."""
    for cache, new in ((key_cache_SGE, keys_TGE), (value_cache_SGE, values_TGE)):
        if first_slot is not None:
            cache[first_slot : first_slot + new.shape[0]] = new
        else:
            cache.index_copy_(0, slots_T, new.to(cache.dtype))
