"""Eager tree attention: the reference for every kernel, and what serves the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

if TYPE_CHECKING:
    from specdec.kernels.tree_attention.api import SequencePlan


def tree_attention_reference(
    query_THE: Tensor,
    key_cache_SGE: Tensor,
    value_cache_SGE: Tensor,
    sequences: list[SequencePlan],
    scaling: float,
    window: int | None,
    softcap: float | None,
    sinks_H: Tensor | None,
) -> Tensor:
    """See `tree_attention`; one sequence at a time, the query heads of a kv head stacked so keys are read once."""
    groups = key_cache_SGE.shape[1]
    out_THE = query_THE.new_empty(*query_THE.shape[:2], value_cache_SGE.shape[2])
    for part in sequences:
        rows = slice(part.row, part.row + part.num_queries)
        query_GQE = _stack_heads(query_THE[rows], groups)
        key_GKE = _keys(key_cache_SGE, part).transpose(0, 1)
        value_GKE = _keys(value_cache_SGE, part).transpose(0, 1)
        mask_QK = part.mask(window)
        if mask_QK is not None and groups < query_THE.shape[1]:
            mask_QK = mask_QK.repeat(query_THE.shape[1] // groups, 1)
        if softcap is None and sinks_H is None:
            out_GQE = scaled_dot_product_attention(
                query_GQE[None], key_GKE[None], value_GKE[None], attn_mask=mask_QK, scale=scaling
            )[0]
        else:
            sinks_GQ1 = None
            if sinks_H is not None:
                sinks_GQ1 = sinks_H.view(groups, -1).repeat_interleave(part.num_queries, 1)[..., None]
            out_GQE = _explicit(query_GQE, key_GKE, value_GKE, mask_QK, scaling, softcap, sinks_GQ1)
        out_THE[rows] = out_GQE.unflatten(1, (-1, part.num_queries)).permute(2, 0, 1, 3).flatten(1, 2)
    return out_THE


def _stack_heads(query_QHE: Tensor, groups: int) -> Tensor:
    """[Q, H, E] to [G, H/G * Q, E], the heads of one group behind one another."""
    return query_QHE.unflatten(1, (groups, -1)).permute(1, 2, 0, 3).flatten(1, 2)


def _keys(cache_SGE: Tensor, part: SequencePlan) -> Tensor:
    if part.first_slot is not None:
        return cache_SGE[part.first_slot : part.first_slot + part.num_keys]
    assert part.slots is not None
    return cache_SGE.index_select(0, part.slots)


def _explicit(
    query_GQE: Tensor,
    key_GKE: Tensor,
    value_GKE: Tensor,
    mask_QK: Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks_GQ1: Tensor | None,
) -> Tensor:
    scores = (query_GQE @ key_GKE.transpose(1, 2)) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    # Softmax in float32 at least, as models do it.
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if mask_QK is not None:
        scores = scores.masked_fill(~mask_QK, -torch.inf)
    if sinks_GQ1 is not None:
        scores = torch.cat([scores, sinks_GQ1.to(scores.dtype)], -1)
    weights = scores.softmax(-1)
    if sinks_GQ1 is not None:
        weights = weights[..., :-1]
    return weights.to(value_GKE.dtype) @ value_GKE
