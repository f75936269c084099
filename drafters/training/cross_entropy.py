"""Cross-entropy behind a linear layer without keeping logits: gradients are made chunk by chunk on the way forward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

# Token ids [M], or what gives the target's logits [m, R] of a slice of the rows.
Targets = Tensor | Callable[[slice], Tensor]
# Logits that exist at one time: 2 ** 24 numbers, 64 MiB in float32.
_CHUNK = 1 << 24


@dataclass(frozen=True)
class CrossEntropy:
    """`loss` is the weighted sum over rows; `correct_M` says where the largest logit is the target's (likeliest) token."""

    loss: Tensor
    correct_M: Tensor


def linear_cross_entropy(
    hidden_MD: Tensor,
    weight_RD: Tensor,
    targets: Targets,
    weights_M: Tensor,
    bias_R: Tensor | None = None,
    chunk_numbers: int = _CHUNK,
) -> CrossEntropy:
    """The sum of `weights_M` times the cross-entropy of softmax(hidden W^T + bias) against `targets`: token ids [M], or
    logits whose softmax is the target law (a soft cross-entropy: its minimum is that law's entropy).

    Products run in autocast's type where autocast is on; softmax, loss and the weight's gradient in float32 at least. The
    logits of a few rows exist at a time, those of all rows never do: the gradient is computed beside the loss, as it is
    linear in what comes from above. `bias_R` gets no gradient.
    """
    device = hidden_MD.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_MD.dtype
    needs_gradient = torch.is_grad_enabled() and (hidden_MD.requires_grad or weight_RD.requires_grad)
    with torch.autocast(device, enabled=False):
        loss, correct_M = _LinearCrossEntropy.apply(
            hidden_MD, weight_RD, targets, weights_M, bias_R, dtype, needs_gradient, chunk_numbers
        )
    return CrossEntropy(loss, correct_M)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_MD: Tensor,
        weight_RD: Tensor,
        targets: Targets,
        weights_M: Tensor,
        bias_R: Tensor | None,
        dtype: torch.dtype,
        needs_gradient: bool,
        chunk_numbers: int,
    ) -> tuple[Tensor, Tensor]:
        exact = torch.promote_types(dtype, torch.float32)
        weight, hidden = weight_RD.to(dtype), hidden_MD.to(dtype)
        rows = max(chunk_numbers // max(len(weight), 1), 1)
        loss = torch.zeros((), dtype=exact, device=hidden.device)
        correct_M = torch.empty(len(hidden), dtype=torch.bool, device=hidden.device)
        by_hidden = torch.empty_like(hidden) if needs_gradient and hidden_MD.requires_grad else None
        by_weight = torch.zeros_like(weight_RD, dtype=exact) if needs_gradient and weight_RD.requires_grad else None
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            logits = linear(hidden[part], weight, None if bias_R is None else bias_R.to(dtype)).to(exact)
            scale = weights_M[part, None].to(exact)
            logs = logits.log_softmax(-1)
            if isinstance(targets, Tensor):
                wanted = targets[part]
                loss -= (scale[:, 0] * logs.gather(1, wanted[:, None])[:, 0]).sum()
                correct_M[part] = logits.argmax(-1) == wanted
                gradient = logs.exp_()
                gradient.scatter_add_(1, wanted[:, None], gradient.new_full((len(wanted), 1), -1.0))
            else:
                wanted = targets(part)
                law = wanted.to(exact).softmax(-1)
                loss -= (scale * law * logs).sum()
                correct_M[part] = logits.argmax(-1) == wanted.argmax(-1)
                gradient = logs.exp_().sub_(law)
            gradient = gradient.mul_(scale).to(dtype)
            if by_hidden is not None:
                by_hidden[part] = gradient @ weight
            if by_weight is not None:
                by_weight += gradient.T @ hidden[part]
        ctx.save_for_backward(by_hidden, by_weight)
        ctx.dtypes = hidden_MD.dtype, weight_RD.dtype
        ctx.mark_non_differentiable(correct_M)
        return loss, correct_M

    @staticmethod
    def backward(ctx: Any, *above: Any) -> tuple[Tensor | None, ...]:
        by_hidden, by_weight = ctx.saved_tensors
        for_hidden, for_weight = ctx.dtypes
        scale = above[0]
        return (
            None if by_hidden is None else (by_hidden.to(for_hidden) * scale.to(for_hidden)),
            None if by_weight is None else (by_weight.to(for_weight) * scale.to(for_weight)),
            *[None] * 6,
        )
