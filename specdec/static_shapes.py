"""Packed forwards of fixed shape: which shape serves which segments, and the buffers that hold them, padded."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from specdec.kernels.tree_attention import AttentionPlan, SequencePlan
from specdec.kernels.tree_attention.batch import WORD, Batch

if TYPE_CHECKING:
    from specdec.model import Segment


@dataclass(frozen=True)
class Rung:
    """A shape: so many sequences, with so many rows, mask words (64 tail keys each) and keys each."""

    batch: int
    nodes: int
    words: int
    keys: int

    @property
    def rows(self) -> int:
        return self.batch * self.nodes


@dataclass(frozen=True)
class Ladder:
    """The shapes that there are; what is smaller is padded to the next, what is larger goes without.

    Lengths go by powers of two from `min_keys` on: a longer context reads what it holds, not what it might hold, and only how
    it is split among programs hangs on the rung.
    """

    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    nodes: tuple[int, ...] = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
    max_rows: int = 512
    max_words: int = 8
    min_keys: int = 1024
    max_keys: int = 1 << 17

    def rung(self, segments: Seq[Segment]) -> Rung | None:
        """The smallest shape that holds them; None where there is none, as for chunks of prompts."""
        batch = _at_least(self.batches, len(segments))
        nodes = _at_least(self.nodes, max(len(one.token_ids_Q) for one in segments))
        tails = [one.tail_len for one in segments]
        keys = max(one.visible_len + tail for one, tail in zip(segments, tails, strict=True))
        words = -(-max(tails) // WORD)
        if batch is None or nodes is None or batch * nodes > self.max_rows:
            return None
        if words > self.max_words or keys > self.max_keys:
            return None
        return Rung(batch, nodes, words, max(self.min_keys, 1 << (keys - 1).bit_length()))


class StaticPlan(AttentionPlan):
    """A plan that is nothing but the flat tensors of fixed size. Kernels read these; `sequences` reads them back, waiting for
    the device, for what goes sequence by sequence. Attention of rows that belong to no sequence is undefined.
    """

    def __init__(self, slots_T: Tensor, batch: Batch) -> None:
        self.slots_T, self.first_slot, self.batch = slots_T, None, batch

    @property
    def sequences(self) -> list[SequencePlan]:  # type: ignore[override]
        batch = self.batched()
        rows, keys, tails, trees = batch.starts_4b.tolist()
        bits_W = torch.arange(WORD, device=batch.words_TW.device)
        plans = []
        for b in range(batch.num_sequences):
            queries, num_keys, tail = (ends[b + 1] - ends[b] for ends in (rows, keys, tails))
            if not queries:
                continue
            mask_QM = None
            if trees[b]:
                mask_QM = (batch.words_TW[rows[b] : rows[b + 1], :, None] >> bits_W & 1).flatten(1)[:, :tail].bool()
            positions_M = batch.tail_positions_M[tails[b] : tails[b + 1]].long()
            slots_K = batch.slots_K[keys[b] : keys[b + 1]].long()
            plans.append(SequencePlan(rows[b], queries, num_keys - tail, mask_QM, positions_M, None, slots_K))
        return plans


@dataclass
class StaticInputs:
    """The buffers of one rung on a device. Rows behind the packed ones belong to no sequence: they write to the scratch slot,
    and what they give is ignored. `extra` are further inputs [T, ...] of whoever runs more than a model.
    """

    rung: Rung
    device: torch.device
    extra: tuple[Tensor, ...] = ()
    tokens_T: Tensor = field(init=False)
    positions_T: Tensor = field(init=False)
    rows_T: Tensor = field(init=False)
    plan: AttentionPlan = field(init=False)

    def __post_init__(self) -> None:
        rung, place = self.rung, self.device
        self.tokens_T = torch.zeros(rung.rows, dtype=torch.int64, device=place)
        self.positions_T = torch.zeros_like(self.tokens_T)
        self.rows_T = torch.arange(rung.rows, device=place)

        def ints(*sizes: int) -> Tensor:
            return torch.zeros(sizes, dtype=torch.int32, device=place)

        batch = Batch(
            starts_4b=ints(4, rung.batch + 1),
            slots_K=ints(rung.batch * rung.keys),
            tail_positions_M=ints(rung.batch * rung.words * WORD),
            positions_T=ints(rung.rows),
            words_TW=torch.zeros(rung.rows, rung.words, dtype=torch.int64, device=place),
            max_queries=rung.nodes,
            max_keys=rung.keys,
        )
        self.plan = StaticPlan(torch.zeros_like(self.tokens_T), batch)

    def fill(
        self, tokens_T: Tensor, positions_T: Tensor, plan: AttentionPlan, scratch_slot: int, extra: Seq[Tensor] = ()
    ) -> None:
        """Takes in one packed forward; nothing here waits for the device."""
        given, own = plan.batched(), self.plan.batched()
        _put(self.tokens_T, tokens_T)
        _put(self.positions_T, positions_T)
        _put(self.plan.slots_T, plan.slots_T, scratch_slot)
        _put(own.slots_K, given.slots_K)
        _put(own.tail_positions_M, given.tail_positions_M)
        _put(own.positions_T, given.positions_T)
        own.words_TW.zero_()
        own.words_TW[: given.words_TW.shape[0], : given.words_TW.shape[1]] = given.words_TW
        count = given.starts_4b.shape[1]
        own.starts_4b[:, :count] = given.starts_4b
        # Sequences of no rows and no keys; the last column of the fourth row is zero, causal.
        own.starts_4b[:, count:] = given.starts_4b[:, -1:]
        for buffer, values in zip(self.extra, extra, strict=True):
            _put(buffer, values)


def _put(buffer: Tensor, values: Tensor, padding: int = 0) -> None:
    buffer[: len(values)] = values
    buffer[len(values) :] = padding


def _at_least(steps: tuple[int, ...], wanted: int) -> int | None:
    return next((step for step in steps if step >= wanted), None)
