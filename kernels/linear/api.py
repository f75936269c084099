"""Packed weights: which layout serves here, and what it can do."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from specdec.kernels.cpu import BlockedWeight, can_run
from specdec.kernels.linear.arena import Arena
from specdec.kernels.linear.onednn import OneDnnWeight


class PackedWeight(Protocol):
    """A weight [outputs, inputs] and its bias in a layout of their own."""

    def multiply(self, input: Tensor) -> Tensor:
        """[..., inputs] to [..., outputs], as `torch.nn.functional.linear`."""
        ...

    def plain(self) -> Tensor:
        """The weight [outputs, inputs], unpacked: a copy."""
        ...

    def set_invariant(self, is_invariant: bool) -> None:
        """Whether a row of the input gets the same bits whatever rows are beside it."""
        ...


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether packing pays here: bfloat16 on a CPU that our kernels know, or whose oneDNN multiplies it natively."""
    if device.type != "cpu" or dtype != torch.bfloat16:
        return False
    return can_run() or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def room_for(outputs: int, inputs: int, int8: bool = False) -> int:
    """Numbers that `pack` takes of the arena for a weight of this shape."""
    return BlockedWeight.room_for(outputs, inputs, int8) if can_run() else 0


def pack(weight_OI: Tensor, bias_O: Tensor | None, arena: Arena, int8: bool = False) -> PackedWeight:
    """Our own blocks where the CPU has kernels for them, in 8 bits where wanted, else oneDNN's layout of bfloat16."""
    if can_run():
        outputs, inputs = weight_OI.shape
        return BlockedWeight(weight_OI, bias_O, arena.take(room_for(outputs, inputs, int8)), int8)
    return OneDnnWeight(weight_OI, bias_O)
