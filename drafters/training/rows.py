"""Rows: several records behind one another in one forward, and the plan of which records make which row."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from specdec.drafters.training.records import Record


@dataclass(frozen=True)
class Row:
    """T tokens of several texts, nothing padded: `lengths` of the texts, positions that start anew with each of them.

    Texts do not see one another; whoever attends keeps them apart by `lengths`.
    """

    token_ids_T: Tensor
    loss_mask_T: Tensor
    lengths: tuple[int, ...]

    @staticmethod
    def of(records: Seq[Record], device: torch.device | str = "cpu") -> Row:
        return Row(
            torch.cat([one.token_ids_T for one in records]).to(device),
            torch.cat([one.loss_mask_T for one in records]).to(device),
            tuple(len(one.token_ids_T) for one in records),
        )

    @property
    def device(self) -> torch.device:
        return self.token_ids_T.device

    @cached_property
    def positions_T(self) -> Tensor:
        return torch.cat([torch.arange(length) for length in self.lengths]).to(self.device)

    @cached_property
    def _lengths_T(self) -> Tensor:
        lengths = torch.tensor(self.lengths)
        return lengths.repeat_interleave(lengths).to(self.device)

    def ahead(self, offset: int) -> Tensor:
        """Per token the id of the one `offset` places on in its text [T]; any id where there is none."""
        return self.token_ids_T.roll(-offset)

    def is_learnt(self, offset: int) -> Tensor:
        """Per token whether the one `offset` places on is in its text and is one to be learnt [T]."""
        return self.loss_mask_T.roll(-offset) & (self.positions_T + offset < self._lengths_T)


def plan_rows(lengths: Seq[int], row_tokens: int, seed: int, epoch: int) -> list[list[int]]:
    """The records of each row of an epoch, by index: shuffled anew each epoch, filled up to `row_tokens` tokens.

    A record longer than that makes a row alone. The order depends on the arguments and nothing else.
    """
    generator = torch.Generator().manual_seed((seed << 20) + epoch)
    rows: list[list[int]] = []
    room = 0
    for index in torch.randperm(len(lengths), generator=generator).tolist():
        if lengths[index] > room:
            rows.append([])
            room = row_tokens
        rows[-1].append(index)
        room -= lengths[index]
    return rows


class RowSchedule:
    """Which rows each training step takes: epoch after epoch, `rows_per_step` at a time, so that a step's number says it all.

    Rows left over at the end of an epoch that do not fill a step are left out. Raises ValueError where there are too few.
    """

    def __init__(self, lengths: Seq[int], row_tokens: int, rows_per_step: int, seed: int) -> None:
        self._lengths, self._row_tokens, self._seed = list(lengths), row_tokens, seed
        self.rows_per_step = rows_per_step
        self._starts = [0]
        self._epoch = self._plan(0)
        if len(self._epoch[1]) < rows_per_step:
            raise ValueError(
                f"the data makes {len(self._epoch[1])} rows of {row_tokens} tokens, and a step takes {rows_per_step}: "
                f"make more data, or lower row_tokens or rows_per_step"
            )

    def step(self, step: int) -> list[list[int]]:
        """The records of each row of step 0, 1, 2, ..."""
        epoch = self.epoch_of(step)
        if self._epoch[0] != epoch:
            self._epoch = self._plan(epoch)
        first = (step - self._starts[epoch]) * self.rows_per_step
        return self._epoch[1][first : first + self.rows_per_step]

    def num_tokens(self, num_steps: int) -> int:
        """Tokens in the rows of the first `num_steps` steps, those that are only read included."""
        steps = (self.step(step) for step in range(num_steps))
        return sum(self._lengths[record] for rows in steps for records in rows for record in records)

    def epoch_of(self, step: int) -> int:
        # Epochs differ in their number of rows, for other neighbours fill rows differently.
        while self._starts[-1] <= step:
            rows = self._plan(len(self._starts) - 1)[1]
            self._starts.append(self._starts[-1] + max(len(rows) // self.rows_per_step, 1))
        return next(epoch for epoch, end in enumerate(self._starts[1:]) if step < end)

    def _plan(self, epoch: int) -> tuple[int, list[list[int]]]:
        return epoch, plan_rows(self._lengths, self._row_tokens, self._seed, epoch)
