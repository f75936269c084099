"""PickedStates: the target's hidden states of some rows of a step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

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

    def apart(self, most: int) -> Mapping[int, Tensor]:
        """The same; as copies where the step, which would be kept alive, has more than `most` times as many rows."""
        count = self.rows.stop - self.rows.start if isinstance(self.rows, slice) else len(self.rows)
        # All layers have the same rows.
        if next(iter(self.step.values())).shape[0] <= most * count:
            return self
        return {layer: self[layer].clone() for layer in self.step}
