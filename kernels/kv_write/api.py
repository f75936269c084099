"""New keys and values to slots of a layer's cache: checks and dispatch."""

from __future__ import annotations

from torch import Tensor

from specdec.kernels.dispatch import use_triton
from specdec.kernels.kv_write.reference import kv_write_reference


def kv_write(
    key_cache_SGE: Tensor,
    value_cache_SGE: Tensor,
    slots_T: Tensor,
    first_slot: int | None,
    keys_TGE: Tensor,
    values_TGE: Tensor,
) -> None:
    """Stores token t's key and value, in the caches' dtype, at slot `slots_T[t]`, in place; no slot comes twice.

    `first_slot` is given where the slots are one run. Raises ValueError for shapes that do not fit.
    """
    for name, cache, new in (("keys", key_cache_SGE, keys_TGE), ("values", value_cache_SGE, values_TGE)):
        if new.shape != (len(slots_T), *cache.shape[1:]):
            raise ValueError(f"{name} {list(new.shape)} do not fit {len(slots_T)} slots of {list(cache.shape[1:])}")
    if use_triton(key_cache_SGE):
        # Here, since triton need not be installed where it is not used.
        from specdec.kernels.kv_write.triton import kv_write_triton

        kv_write_triton(key_cache_SGE, value_cache_SGE, slots_T, keys_TGE, values_TGE)
    else:
        kv_write_reference(key_cache_SGE, value_cache_SGE, slots_T, first_slot, keys_TGE, values_TGE)
