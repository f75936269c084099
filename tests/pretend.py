"""A CUDA device that is not there: tensors that say they are on it, computed on the CPU, with every wait of the host noted."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("cuda", 0)
TO_HOST, TO_DEVICE = "to the host", "to the device"
# The numbers of c10's DeviceType.
_CUDA, _META = 1, 14
# Results whose size or value the host must know.
_LOOKS = (
    "_local_scalar_dense",
    "nonzero",
    "is_nonzero",
    "equal",
    "masked_select",
    "bincount",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
)


class OnDevice(Tensor):
    """A tensor that says it is on the device; `inner` holds its numbers."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnDevice:
        one = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        one.inner = inner
        return one

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} where there is no such device")

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"OnDevice({self.inner})"


class PretendedCuda(TorchDispatchMode):
    """While it lasts there is a device. `waits` names the operations in which the host would have waited for it."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), func.overloadpacket.__name__
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        is_here = any(isinstance(one, OnDevice) for one in given)
        is_there = is_here
        if kwargs.get("device") is not None:
            is_there = torch.device(kwargs["device"]).type == "cuda"
            kwargs["device"] = torch.device("cpu")
        if wait := _wait(name, args, kwargs, is_here, is_there):
            self.waits.append(wait)
        elif is_here and name != "_to_copy" and any(one.ndim and not isinstance(one, OnDevice) for one in given):
            raise RuntimeError(f"{func}: tensors on the host and on the device in one operation")
        if name == "_pin_memory":
            return args[0].clone()
        kwargs.pop("pin_memory", None)
        found = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
        if func._schema.is_mutable:
            # What is changed in place is the tensor that was given.
            return args[0] if isinstance(found, Tensor) and "out" not in kwargs else found
        return tree_map(lambda one: OnDevice(one) if isinstance(one, Tensor) else one, found) if is_there else found


def _wait(name: str, args: Any, kwargs: Any, is_here: bool, is_there: bool) -> str | None:
    """What the host waits for in an operation, if it does."""
    if name == "_to_copy" and is_here != is_there:
        return None if kwargs.get("non_blocking") else TO_HOST if is_here else TO_DEVICE
    if name == "copy_" and isinstance(args[0], OnDevice) != isinstance(args[1], OnDevice):
        return TO_HOST if isinstance(args[1], OnDevice) else TO_DEVICE
    if not is_here:
        return None
    if name in _LOOKS or (name == "repeat_interleave" and kwargs.get("output_size") is None):
        return name
    if name.startswith(("index", "_index")) and len(args) > 1 and isinstance(args[1], (list, tuple)):
        places = [one for one in args[1] if isinstance(one, Tensor)]
        if any(one.dtype in (torch.bool, torch.uint8) for one in places):
            return "a mask as index"
        if any(one.ndim and not isinstance(one, OnDevice) for one in places):
            return TO_DEVICE
    return None


def _inner(one: Any) -> Any:
    return one.inner if isinstance(one, OnDevice) else one


def moved(module: Any) -> Any:
    """The module with its parameters and buffers on the device."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(OnDevice(parameter.detach()), requires_grad=False)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = OnDevice(buffer)
    return module


@contextlib.contextmanager
def pretended_cuda() -> Iterator[PretendedCuda]:
    """Triton's kernels run interpreted, on what the tensors hold. Skips the test where that cannot be."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    if torch.cuda.is_available():
        pytest.skip("there is a device, and kernels are not interpreted")
    run = interpreter.GridExecutor.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return run(self, *map(_inner, args), **{name: _inner(one) for name, one in kwargs.items()})

    def enter(self: Any) -> None:
        # Inference tensors have no versions, for which views of such tensors are asked.
        self._inference_mode_context = torch.no_grad()
        self._inference_mode_context.__enter__()

    with pytest.MonkeyPatch.context() as patch, _guard():
        patch.setenv("SPECDEC_KERNELS", "triton")
        patch.setattr(interpreter.GridExecutor, "__call__", call)
        patch.setattr(torch.inference_mode, "__enter__", enter)
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        patch.setattr(torch.cuda, "device_of", lambda tensor: contextlib.nullcontext())
        patch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=8))
        with PretendedCuda() as mode:
            yield mode


@contextlib.contextmanager
def _guard() -> Iterator[None]:
    """Whenever torch turns to a device it asks that type's guard, and without CUDA there is none: here that of `meta`, which
    does nothing, stands for it. And `torch.tensor` makes its tensor on the host before it copies, as it does for a device."""
    library = ctypes.CDLL(str(Path(torch.__path__[0]) / "lib" / "libc10.so"))
    try:
        guards = (ctypes.c_void_p * (_META + 1)).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    except ValueError:
        pytest.skip("this torch does not show its device guards")
    torch._C._set_only_lift_cpu_tensors(True)
    guards[_CUDA] = guards[_META]
    try:
        yield
    finally:
        guards[_CUDA] = None
        torch._C._set_only_lift_cpu_tensors(False)
