"""Attention of training: packed texts that do not see one another, and the unroll of training-time test."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def packed_attention(query_THE: Tensor, key_TGE: Tensor, value_TGE: Tensor, lengths: Seq[int]) -> Tensor:
    """Causal attention within each text of a row [T, H, E], scaled by E ** -0.5."""
    parts = []
    for query, key, value in zip(
        *(states.split(list(lengths)) for states in (query_THE, key_TGE, value_TGE)), strict=True
    ):
        query, key, value = (states.transpose(0, 1)[None] for states in (query, key, value))
        out = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)


class UnrollAttention:
    """Attention over the steps of training-time test (Li et al. 2025, EAGLE-3, section 3.2 and figure 6).

    The first call is the step on the target's features: causal within each text, and its keys are kept. `select` then says
    which tokens go on. In call j + 1 the entry behind token t sees the first step's entries up to t and, of the later
    steps, those behind the same t: what a chain of j drafted tokens sees when it is served.
    """

    def __init__(self, lengths: Seq[int]) -> None:
        self._lengths = list(lengths)
        self._first: tuple[Tensor, Tensor] | None = None
        self._own: list[tuple[Tensor, Tensor]] = []
        self._texts: list[tuple[slice, slice, Tensor]] = []

    def select(self, tokens_M: Tensor) -> None:
        """The tokens that go on behind the first step, by their places in the row, ascending."""
        ends = torch.tensor(self._lengths).cumsum(0)
        counts = torch.searchsorted(tokens_M.cpu(), ends).tolist()
        begin = first = 0
        for length, end, count in zip(self._lengths, ends.tolist(), counts, strict=True):
            if count > begin:
                places_m = tokens_M[begin:count] - first
                hidden_mL = torch.arange(length, device=tokens_M.device) > places_m[:, None]
                self._texts.append((slice(begin, count), slice(first, end), hidden_mL))
            begin, first = count, end

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key = query.to(value.dtype), key.to(value.dtype)
        if self._first is None:
            self._first = key, value
            return packed_attention(query, key, value, self._lengths)
        self._own.append((key, value))
        return self._later(query)

    def _later(self, query_MHE: Tensor) -> Tensor:
        assert self._first is not None
        first_key, first_value = self._first
        own_key_MGJE, own_value_MGJE = (torch.stack(states, 2) for states in zip(*self._own, strict=True))
        size, groups = query_MHE.shape[2], first_key.shape[1]
        query_MGXE = query_MHE.unflatten(1, (groups, -1)) * size**-0.5
        own_scores_MGXJ = query_MGXE @ own_key_MGJE.transpose(2, 3)
        parts = []
        for rows, text, hidden_mL in self._texts:
            # Query heads of a group behind one another, so that its keys are multiplied once.
            query_GQE = query_MGXE[rows].permute(1, 2, 0, 3).flatten(1, 2)
            scores_GXmL = (query_GQE @ first_key[text].permute(1, 2, 0)).unflatten(1, (-1, len(hidden_mL)))
            scores_GXmL = scores_GXmL.masked_fill(hidden_mL, -torch.inf)
            scores = torch.cat([scores_GXmL, own_scores_MGXJ[rows].permute(1, 2, 0, 3)], -1)
            weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(scores.dtype)
            seen = hidden_mL.shape[1]
            out_GQE = weights[..., :seen].flatten(1, 2) @ first_value[text].transpose(0, 1)
            out_mGXE = out_GQE.unflatten(1, (-1, len(hidden_mL))).permute(2, 0, 1, 3)
            parts.append(out_mGXE + weights[..., seen:].permute(2, 0, 1, 3) @ own_value_MGJE[rows])
        return torch.cat(parts).flatten(1, 2)
