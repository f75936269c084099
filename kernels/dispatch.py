"""Which of an op's two ways a tensor takes: its Triton kernel or its eager reference."""

from __future__ import annotations

import functools
import importlib.util
import os

from torch import Tensor

VARIABLE = "SPECDEC_KERNELS"


def use_triton(tensor: Tensor, obstacle: str | None = None) -> bool:
    """Whether an op on `tensor` runs its Triton kernel: on CUDA where triton can be imported, if the kernel can do it.

    `obstacle` says why the op's kernel cannot. The environment variable SPECDEC_KERNELS overrides: `reference` never, `triton`
    always. Raises ValueError for other values, and where `triton` cannot be had: for an obstacle, without triton, or on the CPU
    unless TRITON_INTERPRET=1.
    """
    wanted = os.environ.get(VARIABLE) or "auto"
    if wanted == "auto":
        return tensor.is_cuda and obstacle is None and has_triton()
    if wanted == "reference":
        return False
    if wanted != "triton":
        raise ValueError(f"{VARIABLE}={wanted!r} is unknown; use auto, reference or triton")
    if not has_triton():
        obstacle = "triton cannot be imported; install specdec[triton]"
    elif obstacle is None and not tensor.is_cuda and not is_interpreting():
        obstacle = f"the tensors are on {tensor.device.type}; set TRITON_INTERPRET=1 before Python starts"
    if obstacle is not None:
        raise ValueError(f"{VARIABLE}=triton, but {obstacle}, or unset {VARIABLE}")
    return True


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def is_interpreting() -> bool:
    """Whether triton runs kernels in Python, as it decided when they were defined."""
    from triton import knobs

    return bool(knobs.runtime.interpret)
