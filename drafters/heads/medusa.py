"""Medusa heads: one small network per drafted place, all reading the target's last hidden state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn.functional import silu


@dataclass(frozen=True)
class MedusaConfig:
    """Shape of Medusa heads. `num_layers` counts the residual blocks of a head; without `has_own_lm_head` the heads end in
    the target's LM head, which keeps checkpoints small."""

    hidden_size: int
    vocab_size: int
    num_heads: int
    num_layers: int = 1
    has_own_lm_head: bool = True

    def __post_init__(self) -> None:
        for name in ("hidden_size", "vocab_size", "num_heads", "num_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} of Medusa heads must be >= 1")


class ResidualBlock(nn.Module):
    """x + silu(W x + b)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden_TD: Tensor) -> Tensor:
        return hidden_TD + silu(self.linear(hidden_TD))


class MedusaHeads(nn.ModuleList):
    """`num_heads` heads of residual blocks and an LM head (Cai et al. 2024, Medusa, section 2.1.1).

    Head i reads the target's state behind its final norm of a token and predicts the token i + 2 places further (the
    target itself predicts the next one). Parameters are named as in published checkpoints: `{head}.{block}.linear.weight`,
    and the LM head `{head}.{num_layers}.weight`.
    """

    def __init__(self, config: MedusaConfig) -> None:
        super().__init__()
        self.config = config
        for _ in range(config.num_heads):
            head = nn.Sequential(*(ResidualBlock(config.hidden_size) for _ in range(config.num_layers)))
            if config.has_own_lm_head:
                head.append(nn.Linear(config.hidden_size, config.vocab_size, bias=False))
            self.append(head)

    @staticmethod
    def initial(config: MedusaConfig, lm_head_VD: Tensor | None = None) -> MedusaHeads:
        """New heads, each the target's own prediction: blocks of zeros, LM heads a copy of the target's (section 2.2.1).

        Raises ValueError where the heads have LM heads of their own and none of that shape is given.
        """
        heads = MedusaHeads(config)
        wanted = (config.vocab_size, config.hidden_size)
        if config.has_own_lm_head and (lm_head_VD is None or lm_head_VD.shape != wanted):
            found = None if lm_head_VD is None else tuple(lm_head_VD.shape)
            raise ValueError(f"Medusa heads start from an LM head of shape {wanted}, not {found}: give the target's")
        with torch.no_grad():
            for head in heads:
                assert isinstance(head, nn.Sequential)
                for parameter in head[: config.num_layers].parameters():
                    parameter.zero_()
                if config.has_own_lm_head and lm_head_VD is not None:
                    head[-1].get_parameter("weight").copy_(lm_head_VD)
        return heads

    def forward(self, hidden_TD: Tensor) -> list[Tensor]:
        """Per head the state [T, D] before its LM head."""
        return [self._blocks(head, hidden_TD) for head in self]

    def logits(
        self, hidden_TD: Tensor, lm_head: Callable[[Tensor], Tensor] | None = None, num_heads: int | None = None
    ) -> Tensor:
        """Logits [num_heads, T, V] of the first `num_heads` heads (None: all); `lm_head`, the target's, is used where the
        heads have none of their own."""
        heads = [*self][:num_heads]
        if self.config.has_own_lm_head:
            return torch.stack([head(hidden_TD) for head in heads])
        assert lm_head is not None, "heads without an LM head need the target's"
        return lm_head(torch.stack([self._blocks(head, hidden_TD) for head in heads]))

    def _blocks(self, head: nn.Module, hidden_TD: Tensor) -> Tensor:
        assert isinstance(head, nn.Sequential)
        for block in islice(head, self.config.num_layers):
            hidden_TD = block(hidden_TD)
        return hidden_TD
