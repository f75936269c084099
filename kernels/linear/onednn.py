"""Weights in oneDNN's own layout, which serves every CPU that multiplies bfloat16 natively."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

# oneDNN's kernel for up to this many rows gives each row the same bits wherever it stands; larger ones block otherwise.
MAX_ROWS = 32
_NUM_COMPARED = 300_000


class OneDnnWeight:
    """See `PackedWeight`. Where it is invariant, products of more than `MAX_ROWS` rows go in pieces, and rows of zeros fill
    up those of fewer than were found to be stable."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        self._outputs, self._inputs = weight_OI.shape
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight_OI.detach(), None)
        self._bias_O = bias_O
        # None: as fast as it goes.
        self._min_rows: int | None = None

    def multiply(self, input: Tensor) -> Tensor:
        count = math.prod(input.shape[:-1])
        if self._min_rows is None or self._min_rows <= count <= MAX_ROWS:
            return self._run(input)
        rows = input.flatten(0, -2)
        if count < self._min_rows:
            out = self._run(pad(rows, (0, 0, 0, self._min_rows - count)))[:count]
        else:
            out = torch.cat([self._run(piece) for piece in rows.tensor_split(-(-count // MAX_ROWS))])
        return out.view(*input.shape[:-1], out.shape[-1])

    def plain(self) -> Tensor:
        return self._weight.to_dense()

    @property
    def is_invariant(self) -> bool:
        return self._min_rows is not None

    def set_invariant(self, is_invariant: bool) -> None:
        self._min_rows = fewest_stable_rows(self._outputs, self._inputs) if is_invariant else None

    def _run(self, input: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(input, self._weight, self._bias_O, "none", [], "")


@cache
def fewest_stable_rows(outputs: int, inputs: int) -> int:
    """The least number of rows from which on a row's bits do not depend on how many there are, for one shape of weight.

    Differences are rare, for rounding to bfloat16 hides most: so many numbers are compared that one in 10^5 is found.
    """
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(outputs, inputs, generator=generator).to(torch.bfloat16)
    weight = OneDnnWeight(weight_OI, None)
    trials = -(-_NUM_COMPARED // (MAX_ROWS * outputs))
    batches = torch.randn(trials, MAX_ROWS, inputs, generator=generator).to(torch.bfloat16)
    wanted = [weight.multiply(rows) for rows in batches]
    least = MAX_ROWS
    for count in (24, 16, 8, 4, 2, 1):
        pieces = [slice(at, at + count) for at in range(0, MAX_ROWS - count + 1, count)]
        if any(
            not torch.equal(weight.multiply(rows[piece]), all_rows[piece])
            for rows, all_rows in zip(batches, wanted, strict=True)
            for piece in pieces
        ):
            break
        least = count
    return least
