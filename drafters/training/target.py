"""The target as training sees it: frozen, with the hidden states of packed rows, embeddings and LM head."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from specdec.drafters.training.rows import Row
from specdec.model import PagedModel, Segment
from specdec.pages import PagePool, PageTable


class States(Protocol):
    """Where the target's hidden states [T, D] of a row come from, by transformers' layer index: the target or a cache."""

    def __call__(self, records: Seq[int], row: Row, layers: Seq[int]) -> dict[int, Tensor]: ...


class TrainingTarget:
    """A target that only answers: hidden states of whole rows in one forward, its embeddings, its LM head's weights.

    `model` must have been loaded without packed weights; with `pack` it is packed here where that pays, once the LM head's
    weights have been put by. Raises ValueError where its logits are not its LM head's: soft-capped or scaled ones would
    teach a head another law than the target's.
    """

    def __init__(self, model: PagedModel, pack: bool = True) -> None:
        head = model.model.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise ValueError(f"{model.name}: its LM head is no plain linear layer: load the target with packed=false")
        self.model, self.device = model, model.device
        self.num_layers, self.hidden_size, self.vocab_size = model.num_layers, model.hidden_size, model.vocab_size
        self.lm_head_VD: Tensor = head.weight.detach()
        self.lm_head_bias_V: Tensor | None = None if head.bias is None else head.bias.detach()
        self._pool = PagePool(0)
        self._cache = model.new_cache(self._pool)
        self._check_lm_head()
        if pack:
            model.pack()

    def embed(self, token_ids_T: Tensor) -> Tensor:
        with torch.no_grad():
            return self.model.embed(token_ids_T)

    def lm_head(self, hidden_TD: Tensor) -> Tensor:
        """Logits of states behind the final norm, differentiable by them."""
        return linear(hidden_TD, self.lm_head_VD.to(hidden_TD.dtype), self.lm_head_bias_V)

    def __call__(self, records: Seq[int], row: Row, layers: Seq[int]) -> dict[int, Tensor]:
        """The hidden states [T, D] of each of `layers` at every token of the row, from one forward."""
        return self._forward(row, layers, torch.zeros(0, dtype=torch.int64))[0]

    def _forward(self, row: Row, layers: Seq[int], wanted_R: Tensor) -> tuple[dict[int, Tensor], Tensor]:
        tables = [PageTable(self._pool) for _ in row.lengths]
        need = sum(self._pool.pages_for(length) for length in row.lengths)
        self._pool.grow(need)
        try:
            segments = []
            parts = zip(row.token_ids_T.split(row.lengths), row.positions_T.split(row.lengths), strict=True)
            for table, (tokens, positions) in zip(tables, parts, strict=True):
                table.reserve(len(tokens), 0)
                segments.append(Segment(table, 0, tokens, positions))
            result = self.model.forward(segments, self._cache, wanted_R.to(self.device), list(layers))
        finally:
            for table in tables:
                table.release()
        # Tensors of inference mode cannot be saved for a backward pass; copies can.
        return {layer: states.clone() for layer, states in result.hidden.items()}, result.logits_RV.clone()

    def _check_lm_head(self) -> None:
        tokens = torch.arange(min(8, self.vocab_size), device=self.device)
        row = Row(tokens, torch.ones_like(tokens, dtype=torch.bool), (len(tokens),))
        states, logits = self._forward(row, [self.num_layers], torch.arange(len(tokens)))
        ours = self.lm_head(states[self.num_layers])
        if ours.shape != logits.shape or not torch.allclose(ours.float(), logits.float(), rtol=0.05, atol=0.05):
            raise ValueError(
                f"{self.model.name}: its logits are not its LM head's alone (soft-capped or scaled), and training does not "
                f"support that: choose another target"
            )


def as_trained(states: Tensor) -> Tensor:
    """Features in the precision of the trained weights: float32, whatever the target computes in."""
    return states.to(torch.promote_types(states.dtype, torch.float32))
