"""How a head is trained: sizes, rates, and when to look."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class TrainingParams:
    """A step takes `rows_per_step` rows of about `row_tokens` tokens, over all processes together.

    The learning rate rises linearly over `warmup_steps` and falls as a cosine to `final_rate` of its peak. `eval_every` and
    `save_every` count steps (0: only at the end); after `patience` evaluations in a row without a better score, training
    stops (0: never). `matrix_rate` lets Muon train the matrices within the head's layers, at this peak rate (None: AdamW trains
    everything). Raises ValueError naming the value out of range.
    """

    num_steps: int
    row_tokens: int = 2048
    rows_per_step: int = 1
    learning_rate: float = 1e-3
    matrix_rate: float | None = None
    final_rate: float = 0.1
    warmup_steps: int = 0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = 0.5
    eval_every: int = 0
    save_every: int = 0
    patience: int = 0
    log_every: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        at_least_one = ("num_steps", "row_tokens", "rows_per_step", "log_every")
        at_least_zero = ("warmup_steps", "eval_every", "save_every", "patience")
        checks = {name: (getattr(self, name) >= 1, "an integer >= 1") for name in at_least_one}
        checks |= {name: (getattr(self, name) >= 0, "an integer >= 0") for name in at_least_zero}
        checks |= {
            "learning_rate": (0 < self.learning_rate < math.inf, "a number > 0"),
            "matrix_rate": (self.matrix_rate is None or 0 < self.matrix_rate < math.inf, "a number > 0, or null"),
            "final_rate": (0 <= self.final_rate <= 1, "in [0, 1]"),
            "weight_decay": (self.weight_decay >= 0, "a number >= 0"),
            "betas": (len(self.betas) == 2 and all(0 <= one < 1 for one in self.betas), "two numbers in [0, 1)"),
            "max_grad_norm": (self.max_grad_norm > 0, "a number > 0"),
        }
        for name, (holds, wanted) in checks.items():
            if not holds:
                raise ValueError(f"{name}={getattr(self, name)!r} is out of range: it must be {wanted}")

    def rate(self, step: int) -> float:
        """The share of the peak learning rate that step 0, 1, ... uses."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        done = (step - self.warmup_steps) / max(self.num_steps - self.warmup_steps, 1)
        return self.final_rate + (1 - self.final_rate) * 0.5 * (1 + math.cos(math.pi * done))
