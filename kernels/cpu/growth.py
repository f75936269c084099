"""Confidence trees of an EAGLE head in one call: its layer, its LM head and the choice of nodes, level after level."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.kernels.cpu.blocked import BlockedWeight, WeightStruct
from specdec.kernels.cpu.build import library
from specdec.kernels.cpu.stack import DecoderStack


@dataclass(frozen=True)
class GrowingRoot:
    """Where a tree grows from: how deep it may get, the root's position among the head's entries, the entries up to it, and
    where these and the nodes behind them lie: in `slots`, or in one run from `first_slot`."""

    limit: int
    position: int
    visible_len: int
    first_slot: int | None
    slots: Tensor | None


@dataclass(frozen=True)
class GrownTrees:
    """Nodes [B, N] without the roots, in an order that has parents first; what lies behind `num_nodes_B` says nothing.

    `parents_BN` count the root as 0. `expanded_BN` is a node's number among those that were run (-1: it was not),
    `confidence_BN` how likely it is behind its parent.
    """

    tokens_BN: Tensor
    parents_BN: Tensor
    expanded_BN: Tensor
    confidence_BN: Tensor
    num_nodes_B: Tensor


class _Head(ctypes.Structure):
    _fields_ = (
        ("stack", ctypes.c_void_p),
        ("embeddings", ctypes.c_void_p),
        ("embedding_norm", ctypes.c_void_p),
        ("feature_norm", ctypes.c_void_p),
        ("last_norm", ctypes.c_void_p),
        ("norm_before_residual", ctypes.c_int64),
        ("fc", ctypes.POINTER(WeightStruct)),
        ("lm_head", ctypes.POINTER(WeightStruct)),
        ("ids", ctypes.c_void_p),
    )


class _Root(ctypes.Structure):
    _fields_ = (
        ("limit", ctypes.c_int64),
        ("position", ctypes.c_int64),
        ("visible_len", ctypes.c_int64),
        ("slots", ctypes.c_void_p),
        ("first_slot", ctypes.c_int64),
    )


class _Growth(ctypes.Structure):
    _fields_ = (
        ("num_sequences", ctypes.c_int64),
        ("max_nodes", ctypes.c_int64),
        ("depth", ctypes.c_int64),
        ("num_children", ctypes.c_int64),
        ("num_threads", ctypes.c_int64),
        ("roots", ctypes.c_void_p),
        ("states", ctypes.c_void_p),
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("tokens", ctypes.c_void_p),
        ("parents", ctypes.c_void_p),
        ("expanded", ctypes.c_void_p),
        ("confidence", ctypes.c_void_p),
        ("num_nodes", ctypes.c_void_p),
    )


class TreeGrower:
    """An EAGLE head that grows trees: its layer `stack`, embeddings [V, D], norms and LM head, all in bfloat16.

    With `norms` (of embedding, feature and output) it is of version 3, its layer reading both side by side; with `fc`, which
    joins the two, of version 1. `ids_R` are the tokens of the LM head's outputs (None: their numbers).
    """

    def __init__(
        self,
        stack: DecoderStack,
        embeddings_VD: Tensor,
        lm_head: BlockedWeight,
        ids_R: Tensor | None,
        *,
        norms: tuple[Tensor, Tensor, Tensor] | None = None,
        norm_before_residual: bool = False,
        fc: BlockedWeight | None = None,
    ) -> None:
        assert (norms is None) != (fc is None)
        self.num_outputs = lm_head.outputs
        # What the structure points to.
        self._kept = stack, embeddings_VD, lm_head, ids_R, norms, fc
        self._head = _Head(
            stack.address,
            embeddings_VD.data_ptr(),
            *(None, None, None) if norms is None else (weight.data_ptr() for weight in norms),
            norm_before_residual,
            None if fc is None else ctypes.pointer(fc.struct),
            ctypes.pointer(lm_head.struct),
            None if ids_R is None else ids_R.data_ptr(),
        )

    def grow(
        self,
        roots: Seq[GrowingRoot],
        states_BD: Tensor,
        cos_PE: Tensor,
        sin_PE: Tensor,
        keys: int,
        values: int,
        max_nodes: int,
        depth: int,
        num_children: int,
    ) -> GrownTrees:
        """The trees behind the roots, whose states the head has given: of each level the `num_children` likeliest nodes are
        run, each gets as many children, and the `max_nodes` likeliest of all are kept, the root not counted."""
        assert num_children <= self.num_outputs
        batch = len(roots)
        tokens_BN, parents_BN, expanded_BN = (torch.zeros(batch, max_nodes, dtype=torch.int64) for _ in range(3))
        confidence_BN, num_nodes_B = torch.zeros(batch, max_nodes), torch.zeros(batch, dtype=torch.int64)
        places = (_Root * batch)(
            *(
                _Root(
                    one.limit,
                    one.position,
                    one.visible_len,
                    None if one.slots is None else one.slots.data_ptr(),
                    one.first_slot or 0,
                )
                for one in roots
            )
        )
        states_BD = states_BD.contiguous()
        growth = _Growth(
            batch,
            max_nodes,
            depth,
            num_children,
            torch.get_num_threads(),
            ctypes.addressof(places),
            states_BD.data_ptr(),
            cos_PE.data_ptr(),
            sin_PE.data_ptr(),
            keys,
            values,
            tokens_BN.data_ptr(),
            parents_BN.data_ptr(),
            expanded_BN.data_ptr(),
            confidence_BN.data_ptr(),
            num_nodes_B.data_ptr(),
        )
        library().specdec_grow(ctypes.addressof(self._head), ctypes.addressof(growth))
        return GrownTrees(tokens_BN, parents_BN, expanded_BN, confidence_BN, num_nodes_B)
