"""Packed weights on the CPU: linear layers in a layout of their own, those that read one input as a single product."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Any

import torch
from torch import Tensor, nn

from specdec.kernels.linear import Arena, PackedWeight, can_pack, pack, room_for

__all__ = ["PackedLinear", "can_pack", "linear_rows", "pack_linears", "set_invariant"]


def pack_linears(model: nn.Module, run: Callable[[], object], int8: bool = False) -> int:
    """Replaces every plain linear layer of `model` by a packed one and returns their number.

    A product with few rows is bound by reading the weight, which the plain layout makes slower by half; and layers such as
    the query, key and value projections read the same tensor one after another, so one product serves them. Which do is
    seen by watching one forward, `run`, so no architecture is named here. The plain weights are freed as they go. `int8`
    rounds weights to 8 bits where our own kernels run, which halves what is read: for drafters, whose rounding no text shows.
    """
    groups = _groups(model, run)
    sizes = [[getattr(parent, name).weight.shape for parent, name in group] for group in groups]
    arena = Arena(sum(room_for(sum(size[0] for size in one), one[0][1], int8) for one in sizes))
    for group in groups:
        parent = group[0][0]
        product = SharedProduct([getattr(parent, name) for _, name in group], arena, int8)
        for index, (owner, name) in enumerate(group):
            setattr(owner, name, PackedLinear(product, index))
    _move_out(model)
    return sum(isinstance(module, PackedLinear) for module in model.modules())


def _move_out(model: nn.Module) -> None:
    """Copies what is left, for it may lie in a file that was mapped as a whole, with all of the plain weights."""
    for one in model.parameters():
        one.data = one.data.clone()


def set_invariant(model: nn.Module, is_invariant: bool) -> None:
    """Whether every packed layer gives a row of its input the same bits whatever rows are beside it."""
    for product in dict.fromkeys(module.product for module in model.modules() if isinstance(module, PackedLinear)):
        product.weight.set_invariant(is_invariant)


def linear_rows(linear: nn.Module, ids_R: Tensor) -> nn.Linear:
    """A plain layer that computes some of a linear layer's outputs; that one may be packed.

    Raises ValueError where it is of another kind, for it may then do more than multiply.
    """
    if isinstance(linear, PackedLinear):
        weight_VD, bias_V = linear.plain()
    elif type(linear) is nn.Linear:
        weight_VD, bias_V = linear.weight, linear.bias
    else:
        raise ValueError(f"an LM head of type {type(linear).__name__} is no plain linear layer: it cannot be cut")
    rows = nn.Linear(weight_VD.shape[1], len(ids_R), bias_V is not None, device="meta")
    at = ids_R.to(weight_VD.device)
    rows.weight = nn.Parameter(weight_VD.detach()[at], requires_grad=False)
    if bias_V is not None:
        rows.bias = nn.Parameter(bias_V.detach()[at], requires_grad=False)
    return rows


class PackedLinear(nn.Module):
    """One linear layer of a shared product."""

    def __init__(self, product: SharedProduct, index: int) -> None:
        super().__init__()
        self.in_features, self.out_features = product.in_features, product.sizes[index]
        self.product, self.index = product, index

    def forward(self, input: Tensor) -> Tensor:
        return self.product.output(input, self.index)

    def plain(self) -> tuple[Tensor, Tensor | None]:
        """Weight [out, in] and bias, unpacked: copies that take as much memory again."""
        return self.product.plain(self.index)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, shared_by={len(self.product.sizes)}"


class SharedProduct:
    """The product of one input with the stacked weights of the layers that read it; the first to ask computes it."""

    def __init__(self, linears: Seq[nn.Linear], arena: Arena, int8: bool = False) -> None:
        self.in_features = linears[0].in_features
        self.sizes = [linear.out_features for linear in linears]
        biases: list[Tensor] = [linear.bias for linear in linears if linear.bias is not None]
        self._bias = torch.cat(biases) if biases else None
        weights: list[Tensor] = [linear.weight for linear in linears]
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        self.weight: PackedWeight = pack(weight, self._bias, arena, int8)
        self._input: Tensor | None = None
        self._outputs: tuple[Tensor, ...] = ()

    def output(self, input: Tensor, index: int) -> Tensor:
        if len(self.sizes) == 1:
            return self.weight.multiply(input)
        if input is not self._input:
            self._input, self._outputs = input, self.weight.multiply(input).split(self.sizes, -1)
        out = self._outputs[index]
        if index == len(self.sizes) - 1:
            self._input, self._outputs = None, ()
        return out

    def plain(self, index: int) -> tuple[Tensor, Tensor | None]:
        weight = self.weight.plain().split(self.sizes)[index]
        return weight, None if self._bias is None else self._bias.split(self.sizes)[index]


def _groups(model: nn.Module, run: Callable[[], object]) -> list[list[tuple[nn.Module, str]]]:
    """All plain linear layers as (parent, name), together where one forward gave them the same tensor in a row."""
    places: dict[nn.Linear, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for name, child in parent.named_children():
            # A subclass may do more than multiply.
            if type(child) is nn.Linear:
                places.setdefault(child, []).append((parent, name))
    # A layer that stands in two places keeps the weight that they share.
    where = {linear: found[0] for linear, found in places.items() if len(found) == 1}
    calls: list[tuple[nn.Linear, Tensor]] = []

    def note(layer: Any, args: tuple[Tensor, ...]) -> None:
        calls.append((layer, args[0]))

    hooks = [linear.register_forward_pre_hook(note) for linear in where]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    times = Counter(linear for linear, _ in calls)
    groups: list[list[nn.Linear]] = [[linear] for linear in where if times[linear] != 1]
    last: Tensor | None = None
    for linear, read in calls:
        if times[linear] != 1:
            last = None
            continue
        if read is last and _fit(groups[-1][0], linear) and where[groups[-1][0]][0] is where[linear][0]:
            groups[-1].append(linear)
        else:
            groups.append([linear])
        last = read
    return [[where[linear] for linear in group] for group in groups]


def _fit(one: nn.Linear, other: nn.Linear) -> bool:
    return one.in_features == other.in_features and (one.bias is None) == (other.bias is None)
