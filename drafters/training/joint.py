"""Medusa-2: heads and target trained together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.drafters.heads import MedusaHeads
from specdec.drafters.training.cross_entropy import linear_cross_entropy
from specdec.drafters.training.objectives import Objective, medusa_losses
from specdec.drafters.training.rows import Row


class MedusaJointObjective(Objective):
    """Medusa-2: the target's own next-token loss plus `heads_weight` (lambda_0) times Medusa-1's (Cai et al. 2024, section
    2.2.2 and equation 2).

    lambda_0 grows linearly over the first `warmup_steps` steps, and the heads learn `heads_rate` times as fast as the
    target. `model` is trained in place; it must read packed rows (transformers' `sdpa` attention does, by positions).
    """

    first_offset = 2
    layers = ()

    def __init__(
        self,
        heads: MedusaHeads,
        model: PreTrainedModel,
        decay: float = 0.8,
        heads_weight: float = 0.2,
        heads_rate: float = 4.0,
        warmup_steps: int = 0,
    ) -> None:
        super().__init__(heads)
        self.model = model.requires_grad_(True)
        self.decay, self.heads_weight, self.heads_rate = decay, heads_weight, heads_rate
        self._warmup_steps, self._ramp = warmup_steps, 1.0

    def at_step(self, step: int) -> None:
        self._ramp = min(1.0, (step + 1) / (self._warmup_steps + 1))

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        return [
            {"params": list(self.model.parameters()), "lr": learning_rate},
            {"params": list(self.head.parameters()), "lr": learning_rate * self.heads_rate},
        ]

    def forward(self, row: Row, states: Mapping[int, Tensor], seed: int) -> dict[str, Tensor]:
        base = getattr(self.model, self.model.base_model_prefix)
        hidden_TD = base(
            input_ids=row.token_ids_T[None], position_ids=row.positions_T[None], use_cache=False
        ).last_hidden_state[0]
        last: Any = self.model.get_output_embeddings()
        tokens_M = row.is_learnt(1).nonzero()[:, 0]
        own = linear_cross_entropy(
            hidden_TD[tokens_M],
            last.weight,
            row.ahead(1)[tokens_M],
            torch.ones(len(tokens_M), device=row.device),
            last.bias,
        )
        out = medusa_losses(self.head, hidden_TD, row, self.decay, (last.weight, last.bias))
        out["loss"] = own.loss + self._ramp * self.heads_weight * out["loss"]
        return {**out, "language": own.loss.detach()}
