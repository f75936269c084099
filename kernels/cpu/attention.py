"""Attention of packed tokens over pages, in C++: bfloat16, each token's bits depending on its own path alone."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from specdec.kernels.cpu.build import library

if TYPE_CHECKING:
    from specdec.kernels.tree_attention import SequencePlan


class _Sequence(ctypes.Structure):
    _fields_ = (
        ("row", ctypes.c_int64),
        ("num_queries", ctypes.c_int64),
        ("visible_len", ctypes.c_int64),
        ("num_keys", ctypes.c_int64),
        ("slots", ctypes.c_void_p),
        ("first_slot", ctypes.c_int64),
        ("tail_mask", ctypes.c_void_p),
    )


class _Heads(ctypes.Structure):
    _fields_ = (
        ("num_heads", ctypes.c_int64),
        ("num_groups", ctypes.c_int64),
        ("size", ctypes.c_int64),
        ("scaling", ctypes.c_float),
        ("window", ctypes.c_int64),
        ("sinks", ctypes.c_void_p),
    )


def path_attention(
    query_THE: Tensor,
    key_cache_SGE: Tensor,
    value_cache_SGE: Tensor,
    sequences: Seq[SequencePlan],
    scaling: float,
    window: int | None,
    sinks_H: Tensor | None,
) -> Tensor:
    """See `tree_attention`. Keys are summed in the order of positions along each token's own path."""
    _, num_heads, size = query_THE.shape
    query_THE, out_THE = query_THE.contiguous(), torch.empty(query_THE.shape, dtype=query_THE.dtype)
    assert key_cache_SGE.is_contiguous() and value_cache_SGE.is_contiguous()
    sinks_H = None if sinks_H is None else sinks_H.float().contiguous()
    heads = _Heads(
        num_heads,
        key_cache_SGE.shape[1],
        size,
        scaling,
        window or 0,
        None if sinks_H is None else sinks_H.data_ptr(),
    )
    places, _kept = described(sequences)
    library().specdec_attend(
        ctypes.addressof(places),
        len(places),
        ctypes.addressof(heads),
        query_THE.data_ptr(),
        key_cache_SGE.data_ptr(),
        value_cache_SGE.data_ptr(),
        out_THE.data_ptr(),
        torch.get_num_threads(),
    )
    return out_THE


def described(sequences: Seq[SequencePlan]) -> tuple[ctypes.Array[_Sequence], list[Tensor]]:
    """The sequences as C++ knows them, and the tensors that must live as long."""
    places, kept = (_Sequence * len(sequences))(), list[Tensor]()
    for place, part in zip(places, sequences, strict=True):
        kept += _fill(place, part)
    return places, kept


def _fill(place: _Sequence, part: SequencePlan) -> list[Tensor]:
    """Describes a sequence; returns the tensors that must live as long as the description."""
    mask, slots = part.tail_mask_QM, part.slots
    kept = []
    if mask is not None:
        mask = mask.contiguous()
        kept.append(mask)
    if slots is not None:
        slots = slots.contiguous()
        kept.append(slots)
    place.row, place.num_queries = part.row, part.num_queries
    place.visible_len, place.num_keys = part.visible_len, part.num_keys
    place.slots, place.first_slot = (None if slots is None else slots.data_ptr()), part.first_slot or 0
    place.tail_mask = None if mask is None else mask.data_ptr()
    return kept
