"""Triton's interpreter, which runs the GPU kernels in Python where there is no GPU: fitted to numpy, and made quicker."""

from __future__ import annotations

from typing import Any

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
    """A kernel finds the language patched already when it calls a function; doing it again takes most of the time."""

    def call(function: Any, *args: Any, **options: Any) -> Any:
        return function.rewrite()(*args, **options)

    interpreter.InterpretedFunction.__call__ = call


if triton.knobs.runtime.interpret:
    fit_to_numpy()
    patch_once()
