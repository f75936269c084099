"""Triton's interpreter, which runs the GPU kernels in Python where there is no GPU: fitted to numpy, and made quicker."""

from __future__ import annotations

from typing import Any

import numpy as np
import triton
from triton.runtime import interpreter


def fit_to_numpy() -> None:
    """Lets loops of interpreted kernels have computed bounds: triton 3.6 calls int() on arrays of one number, which numpy 2.4
    refuses."""
    patch_tensors = interpreter._patch_lang_tensor

    def patch(tensor: type, scope: interpreter._LangPatchScope) -> None:
        patch_tensors(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch


def patch_once() -> None:
    """A kernel finds the language patched already when it calls a function of ours; doing it again takes most of the time."""
    patch_and_call = interpreter.InterpretedFunction.__call__

    def call(function: Any, *args: Any, **options: Any) -> Any:
        if function.fn.__module__.startswith("triton."):
            return patch_and_call(function, *args, **options)
        return function.rewrite()(*args, **options)

    interpreter.InterpretedFunction.__call__ = call


def multiply_exactly() -> None:
    """numpy adds a product's terms in an order that depends on its shape and on the CPU, so a row's bits depend on the rows
    beside it. A GPU's do not; in double precision, rounded once, neither do they here."""

    def dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        product = np.matmul(a.data, b.data, dtype=np.float64).astype(d.data.dtype)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = dot


if triton.knobs.runtime.interpret:
    fit_to_numpy()
    patch_once()
    multiply_exactly()
