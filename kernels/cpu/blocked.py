"""A linear layer's weight in blocks, as tiles of AMX and vectors of 16 outputs read it."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.nn.functional import pad

from specdec.kernels.cpu.build import library

OUTPUTS, INPUTS = 16, 32


class WeightStruct(ctypes.Structure):
    """`Weight` of weight.h."""

    _fields_ = (
        ("blocks", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("inputs", ctypes.c_long),
        ("outputs", ctypes.c_long),
    )


class BlockedWeight:
    """A weight [outputs, inputs] as blocks of 16 outputs and 32 inputs, a block's pairs of inputs behind one another.

    `room` is where the blocks go, `room_for` numbers of bfloat16; zeros fill up the last ones. A row of a product has the
    same bits whatever rows are beside it: each sum runs over the inputs in one order.
    """

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, room: Tensor) -> None:
        self.outputs, self.inputs = weight_OI.shape
        outputs, inputs = _padded(self.outputs, OUTPUTS), _padded(self.inputs, INPUTS)
        weight_OI = pad(weight_OI.detach(), (0, inputs - self.inputs, 0, outputs - self.outputs))
        self._blocks = room.view(outputs // OUTPUTS, inputs // INPUTS, INPUTS // 2, OUTPUTS, 2)
        self._blocks.copy_(weight_OI.view(-1, OUTPUTS, inputs // INPUTS, INPUTS // 2, 2).permute(0, 2, 3, 1, 4))
        self._bias_O = None if bias_O is None else pad(bias_O.detach(), (0, outputs - self.outputs)).contiguous()
        self.struct = WeightStruct(
            self._blocks.data_ptr(), None if self._bias_O is None else self._bias_O.data_ptr(), inputs, self.outputs
        )
        self._run, self._address = library().specdec_linear, ctypes.addressof(self.struct)

    @staticmethod
    def room_for(outputs: int, inputs: int) -> int:
        return _padded(outputs, OUTPUTS) * _padded(inputs, INPUTS)

    def multiply(self, input: Tensor) -> Tensor:
        input = input.contiguous()
        out = input.new_empty(*input.shape[:-1], self.outputs)
        # Addresses as plain integers: two conversions less in the call that a step makes most.
        self._run(
            input.data_ptr(),
            input.numel() // self.inputs,
            self.inputs,
            self._address,
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return out

    def plain(self) -> Tensor:
        rows = self._blocks.permute(0, 3, 1, 2, 4).flatten(0, 1).flatten(1)
        return rows[: self.outputs, : self.inputs].clone()

    def set_invariant(self, is_invariant: bool) -> None:
        """Changes nothing: it always is."""


def _padded(size: int, step: int) -> int:
    return -(-size // step) * step
