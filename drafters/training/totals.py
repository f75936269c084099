"""What a training reports: sums over rows and processes, as means per token."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from accelerate import Accelerator
from torch import Tensor


class Totals:
    """Sums of what objectives give, over rows."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._grad_norms: list[float] = []

    def add(self, out: Mapping[str, Tensor]) -> None:
        for name, value in out.items():
            value = value.detach().double()
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def add_grad_norm(self, norm: float) -> None:
        self._grad_norms.append(norm)

    def means(self, accelerator: Accelerator) -> dict[str, float]:
        """`loss` per token that the first place learns; per drafted place k = 1, 2, ... `loss_k` and `accuracy_k` per token
        that it learns. Sums go over all processes, which must all call this."""
        sums = {name: accelerator.reduce(value, "sum") for name, value in sorted(self._sums.items())}
        counts_K = sums.pop("count_K").clamp_min(1)
        losses_K, correct_K = sums.pop("loss_K") / counts_K, sums.pop("correct_K") / counts_K
        means = {name: float(value / counts_K[0]) for name, value in sums.items()}
        for k, (loss, accuracy) in enumerate(zip(losses_K.tolist(), correct_K.tolist(), strict=True), 1):
            means |= {f"loss_{k}": loss, f"accuracy_{k}": accuracy}
        if self._grad_norms:
            means["grad_norm"] = torch.tensor(self._grad_norms).mean().item()
        return means
