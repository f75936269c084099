"""PickedStates: the target's hidden states of some rows of a step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.int_tensor import int_tensor


@dataclass(frozen=True, slots=True)
class PickedStates(Mapping[int, Tensor]):
    """Of a step's states [T, D] per layer those of `rows`, taken when somebody asks for them: most are never asked for."""

    step: dict[int, Tensor]
    rows: slice | list[int]

    def __getitem__(self, layer: int) -> Tensor:
        states = self.step[layer]
        return states[self.rows] if isinstance(self.rows, slice) else states[int_tensor(self.rows, states.device)]

    def __iter__(self) -> Iterator[int]:
        return iter(self.step)

    def __len__(self) -> int:
        return len(self.step)

    @property
    def count(self) -> int:
        """How many rows."""
        return self.rows.stop - self.rows.start if isinstance(self.rows, slice) else len(self.rows)

    def first(self, count: int) -> PickedStates:
        """Those of the first `count` rows."""
        if count == self.count:
            return self
        rows = self.rows
        part = slice(rows.start, rows.start + count) if isinstance(rows, slice) else rows[:count]
        return PickedStates(self.step, part)

    @staticmethod
    def joined(each: Seq[PickedStates], layers: Seq[int], most: int) -> list[Tensor]:
        """States [n, layers * D] of each of these, all of one step, those of the layers side by side: views of copies that have
        no more than `most` times as many rows, made for many at once, for there may be one of each sequence."""
        found, group, num_rows, fewest = list[Tensor](), list[PickedStates](), 0, 0
        for one in each:
            if group and num_rows + one.count > most * min(fewest, one.count):
                found += _joined(group, layers)
                group, num_rows = [], 0
            fewest = min(fewest, one.count) if group else one.count
            num_rows += one.count
            group.append(one)
        return found + (_joined(group, layers) if group else [])


def _joined(group: list[PickedStates], layers: Seq[int]) -> list[Tensor]:
    rows = [row for one in group for row in _listed(one.rows)]
    begin, end = rows[0], rows[-1] + 1
    step = group[0].step
    # Most often they are one behind another.
    picked = PickedStates(step, slice(begin, end) if rows == [*range(begin, end)] else rows)
    states = torch.cat([picked[layer] for layer in layers], 1)
    return [*states.split([one.count for one in group])]


def _listed(rows: slice | list[int]) -> list[int]:
    return [*range(rows.start, rows.stop)] if isinstance(rows, slice) else rows
