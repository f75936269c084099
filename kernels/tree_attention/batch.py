"""One packed forward's sequences as a few flat tensors: what the GPU kernels of tree attention read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

if TYPE_CHECKING:
    from specdec.kernels.tree_attention.api import SequencePlan

# Tail keys per mask word.
WORD = 64


@dataclass(frozen=True)
class Batch:
    """Who sees whom in one packed forward, on the device of the cache; integers are int32.

    Sequence b has the query rows `starts_4b[0, b]` to `starts_4b[0, b + 1]`, the keys of `slots_K` from `starts_4b[1, b]` on,
    and the last of them, from `starts_4b[2, b]` on in `tail_positions_M`, are its tail; `starts_4b[3, b]` is 1 where
    `words_TW` (int64, bit j % 64 of word j // 64) says which of the tail a row sees, and 0 where it is causal.

    The integers bound the grids and choose the launch, so that kernels never wait for the device: whoever captures a graph
    makes a batch of its own with tensors of fixed sizes and integers for the largest case; unused rows belong to sequences
    of no rows.
    """

    starts_4b: Tensor
    slots_K: Tensor
    tail_positions_M: Tensor
    positions_T: Tensor
    words_TW: Tensor
    max_queries: int
    max_keys: int

    @property
    def num_rows(self) -> int:
        return self.positions_T.shape[0]

    @property
    def num_sequences(self) -> int:
        return self.starts_4b.shape[1] - 1


def make_batch(sequences: list[SequencePlan]) -> Batch:
    """The tensors of `sequences`; no work waits for the device."""
    device = sequences[0].tail_positions_M.device
    rows, keys, tails, trees = [0], [0], [0], []
    for part in sequences:
        rows.append(rows[-1] + part.num_queries)
        keys.append(keys[-1] + part.num_keys)
        tails.append(tails[-1] + part.tail_positions_M.shape[0])
        trees.append(int(part.tail_mask_QM is not None))
    starts = torch.tensor([rows, keys, tails, [*trees, 0]], dtype=torch.int32)
    if device.type == "cuda":
        # From pinned memory the copy need not wait for what the device still does.
        starts = starts.pin_memory()
    longest = max((part.tail_mask_QM.shape[1] for part in sequences if part.tail_mask_QM is not None), default=0)
    width = -(-longest // WORD) * WORD
    masks_TM = torch.cat([_mask(part, width) for part in sequences])
    bits_W = torch.arange(WORD, device=device)
    return Batch(
        starts.to(device, non_blocking=True),
        torch.cat([_slots(part) for part in sequences]).int(),
        torch.cat([part.tail_positions_M for part in sequences]).int(),
        torch.cat([part.tail_positions_M[-part.num_queries :] for part in sequences]).int(),
        (masks_TM.unflatten(1, (-1, WORD)).long() << bits_W).sum(-1) if width else masks_TM.long(),
        max(part.num_queries for part in sequences),
        max(part.num_keys for part in sequences),
    )


def _mask(part: SequencePlan, width: int) -> Tensor:
    if part.tail_mask_QM is None:
        return torch.zeros(part.num_queries, width, dtype=torch.bool, device=part.tail_positions_M.device)
    return pad(part.tail_mask_QM, (0, width - part.tail_mask_QM.shape[1]))


def _slots(part: SequencePlan) -> Tensor:
    if part.first_slot is None:
        assert part.slots is not None
        return part.slots
    return torch.arange(part.first_slot, part.first_slot + part.num_keys, device=part.tail_positions_M.device)
