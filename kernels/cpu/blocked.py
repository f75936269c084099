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
        ("scales", ctypes.c_void_p),
        ("inputs", ctypes.c_long),
        ("outputs", ctypes.c_long),
    )


class BlockedWeight:
    """A weight [outputs, inputs] as blocks of 16 outputs and 32 inputs, a block's pairs of inputs behind one another.

    `room` is where the blocks go, `room_for` numbers of bfloat16; zeros fill up the last ones. Where `int8`, they hold
    whole numbers from -127 to 127, which a scale per output turns into the weight rounded; products read half as much then.
    A row of a product has the same bits whatever rows are beside it: each sum runs over the inputs in one order.
    """

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, room: Tensor, int8: bool = False) -> None:
        self.outputs, self.inputs = weight_OI.shape
        outputs, inputs = _padded(self.outputs, OUTPUTS), _padded(self.inputs, INPUTS)
        weight_OI = pad(weight_OI.detach(), (0, inputs - self.inputs, 0, outputs - self.outputs))
        shape = outputs // OUTPUTS, inputs // INPUTS, INPUTS // 2
        self._scales_O: Tensor | None = None
        if int8:
            self._scales_O = _int8_scales(weight_OI)
            weight_OI = (weight_OI.float() / self._scales_O[:, None]).round()
            # A pair's first input for all outputs, then its second.
            self._blocks = room.view(torch.int8).view(*shape, 2, OUTPUTS).transpose(3, 4)
        else:
            self._blocks = room.view(*shape, OUTPUTS, 2)
        self._blocks.copy_(weight_OI.view(-1, OUTPUTS, inputs // INPUTS, INPUTS // 2, 2).permute(0, 2, 3, 1, 4))
        self._bias_O = None if bias_O is None else pad(bias_O.detach(), (0, outputs - self.outputs)).contiguous()
        self.struct = WeightStruct(
            self._blocks.data_ptr(),
            None if self._bias_O is None else self._bias_O.data_ptr(),
            None if self._scales_O is None else self._scales_O.data_ptr(),
            inputs,
            self.outputs,
        )
        self._run, self._address = library().specdec_linear, ctypes.addressof(self.struct)

    @staticmethod
    def room_for(outputs: int, inputs: int, int8: bool = False) -> int:
        return _padded(outputs, OUTPUTS) * _padded(inputs, INPUTS) // (2 if int8 else 1)

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
        if self._scales_O is not None:
            rows = (rows.float() * self._scales_O[:, None]).bfloat16()
        return rows[: self.outputs, : self.inputs].clone()

    def set_invariant(self, is_invariant: bool) -> None:
        """Changes nothing: it always is."""


def _int8_scales(weight_OI: Tensor) -> Tensor:
    """Per output [O] in float32 what 1 stands for, where its largest weight is to be 127."""
    largest_O = weight_OI.abs().amax(1).float()
    return torch.where(largest_O > 0, largest_O / 127, 1.0)


def _padded(size: int, step: int) -> int:
    return -(-size // step) * step
