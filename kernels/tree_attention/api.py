"""Tree attention over pages: what a kernel is told about one packed forward, and the dispatch."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from specdec.kernels.dispatch import use_triton
from specdec.kernels.tree_attention.batch import Batch, make_batch
from specdec.kernels.tree_attention.invariant import PathTiles, path_tiles, tree_attention_invariant
from specdec.kernels.tree_attention.launch import MAX_HEAD_SIZE
from specdec.kernels.tree_attention.reference import tree_attention_reference


@dataclass
class SequencePlan:
    """One sequence's share of a packed forward: its query rows, its keys, and who sees whom.

    Keys are the first `visible_len` slots, seen by every query, followed by a tail of m slots seen as `tail_mask_QM`
    says (None: causal, each new token sees the tail up to itself). The queries are the last Q keys. `slots` is the index
    of each key in the cache, or `first_slot` where all keys lie in one run.
    """

    row: int
    num_queries: int
    visible_len: int
    tail_mask_QM: Tensor | None
    tail_positions_M: Tensor
    first_slot: int | None
    slots: Tensor | None
    _masks: dict[int | None, Tensor | None] = field(default_factory=dict)
    _tiles: dict[tuple[int | None, int], PathTiles] = field(default_factory=dict)

    @property
    def num_keys(self) -> int:
        return self.visible_len + self.tail_positions_M.shape[0]

    def mask(self, window: int | None) -> Tensor | None:
        """Bool [Q, num_keys], True where a query sees a key; None where every query sees every key."""
        if window not in self._masks:
            self._masks[window] = self._build_mask(window)
        return self._masks[window]

    def tiles(self, window: int | None, num_heads_per_group: int, dtype: torch.dtype) -> PathTiles:
        """The keys of every query's path in tiles of positions; see `invariant.py`."""
        key = window, num_heads_per_group
        if key not in self._tiles:
            self._tiles[key] = path_tiles(self, window, num_heads_per_group, dtype)
        return self._tiles[key]

    def _build_mask(self, window: int | None) -> Tensor | None:
        rows, tail = self.num_queries, self.tail_positions_M.shape[0]
        reach = self.num_keys if window is None else window
        narrows = self.num_keys > reach
        if not narrows and self.tail_mask_QM is None and rows == tail == 1:
            return None
        device = self.tail_positions_M.device
        seen = self.tail_mask_QM
        if seen is None:
            seen = torch.ones(rows, tail, dtype=torch.bool, device=device).tril(tail - rows)
        mask = torch.cat([seen.new_ones(rows, self.visible_len), seen], 1)
        if narrows:
            # A query at position i sees keys at positions i - window + 1 .. i, whatever slot they lie in.
            keys = torch.cat([torch.arange(self.visible_len, device=device), self.tail_positions_M])
            mask &= self.tail_positions_M[tail - rows :, None] - keys < reach
        return mask


@dataclass
class AttentionPlan:
    """Where one packed forward writes and reads: the slot of every new token and a plan per sequence.

    `batch` is the same in tensors, for the GPU: made when first asked for and shared by all layers, or given by whoever keeps
    tensors of fixed sizes for a captured graph, in which case `sequences` may be empty.
    """

    slots_T: Tensor
    first_slot: int | None
    sequences: list[SequencePlan]
    batch: Batch | None = None

    @property
    def num_rows(self) -> int:
        return sum(part.num_queries for part in self.sequences) if self.batch is None else self.batch.num_rows

    def batched(self) -> Batch:
        if self.batch is None:
            self.batch = make_batch(self.sequences)
        return self.batch


def tree_attention(
    query_THE: Tensor,
    key_cache_SGE: Tensor,
    value_cache_SGE: Tensor,
    plan: AttentionPlan,
    *,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
    is_invariant: bool = False,
) -> Tensor:
    """Attention of packed queries over each sequence's own slots; returns [T, H, E_v].

    H must be a multiple of the cache's G kv heads (grouped-query attention). `window` counts positions including the
    query's own, `softcap` bounds scores by softcap * tanh(score / softcap), `sinks_H` adds one logit per head to the
    softmax's denominator. `is_invariant` makes a token's bits depend on its own path alone (on the CPU in bfloat16 and without
    softcap only). Raises ValueError for shapes that do not fit, and for what the kernels do not do.
    """
    if query_THE.shape[1] % key_cache_SGE.shape[1]:
        raise ValueError(f"{query_THE.shape[1]} query heads are not a multiple of {key_cache_SGE.shape[1]} kv heads")
    if query_THE.shape[0] != plan.num_rows:
        raise ValueError(f"{query_THE.shape[0]} query rows do not match the plan's")
    if use_triton(query_THE, _obstacle(query_THE, value_cache_SGE)):
        # Here, since triton need not be installed where it is not used.
        from specdec.kernels.tree_attention.invariant_triton import tree_attention_invariant_triton
        from specdec.kernels.tree_attention.triton import tree_attention_triton

        kernel = tree_attention_invariant_triton if is_invariant else tree_attention_triton
        return kernel(query_THE, key_cache_SGE, value_cache_SGE, plan.batched(), scaling, window, softcap, sinks_H)
    if is_invariant:
        if softcap is not None or query_THE.dtype != torch.bfloat16 or query_THE.device.type != "cpu":
            raise ValueError(
                f"invariant attention is for bfloat16 on the CPU without softcap, not {query_THE.dtype} on "
                f"{query_THE.device.type}{'' if softcap is None else f' with softcap {softcap}'}"
            )
        if key_cache_SGE.shape[2] != value_cache_SGE.shape[2]:
            raise ValueError(
                f"invariant attention is for keys and values of one size, not {key_cache_SGE.shape[2]} and "
                f"{value_cache_SGE.shape[2]}"
            )
        # Here, since the CPU's kernels know these plans.
        from specdec.kernels.cpu import can_run, path_attention

        attend = path_attention if can_run() else tree_attention_invariant
        return attend(query_THE, key_cache_SGE, value_cache_SGE, plan.sequences, scaling, window, sinks_H)
    return tree_attention_reference(
        query_THE, key_cache_SGE, value_cache_SGE, plan.sequences, scaling, window, softcap, sinks_H
    )


def _obstacle(query_THE: Tensor, value_cache_SGE: Tensor) -> str | None:
    """Why the Triton kernels cannot do it; None where they can."""
    size = max(query_THE.shape[2], value_cache_SGE.shape[2])
    if query_THE.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"attention in {query_THE.dtype} has no Triton kernel; use another dtype"
    return None if size <= MAX_HEAD_SIZE else f"heads of {size} numbers exceed {MAX_HEAD_SIZE}; use another model"
