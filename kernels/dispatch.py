"""Which implementation of an op serves a tensor: the Triton kernel or the eager reference."""

from __future__ import annotations

import importlib.util
import os
from functools import cache

from torch import Tensor


def use_triton(tensor: Tensor) -> bool:
    """Whether the Triton kernel serves this tensor: on CUDA devices where triton can be imported, nowhere else.

    The environment variable SPECDEC_KERNELS overrules that: `reference` or `triton`, the latter on CPU tensors only under
    TRITON_INTERPRET=1. Raises ValueError for another value and where `triton` cannot be had.
    """
    choice = os.environ.get("SPECDEC_KERNELS") or "auto"
    if choice == "auto":
        return tensor.is_cuda and _has_triton()
    if choice == "reference":
        return False
    if choice != "triton":
        raise ValueError(f"SPECDEC_KERNELS={choice!r} is unknown: use auto, reference or triton")
    if not _has_triton():
        raise ValueError("SPECDEC_KERNELS=triton, but triton is not installed: pip install triton, or use reference")
    if not tensor.is_cuda and not (tensor.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        raise ValueError(
            f"SPECDEC_KERNELS=triton cannot serve a tensor on {tensor.device}: use a CUDA device, set TRITON_INTERPRET=1 "
            "to interpret the kernels on the CPU, or leave SPECDEC_KERNELS unset"
        )
    return True


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
